"""What pictures of a run show, and that all of it can be read."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bench import pictures as drawing
from bench.record import OURS, Row, Run
from fastbert.training.style import BLUE, ORANGE, PALE, STYLE
from tests.invented import SDPA, empty_run, invented_run, model_case, model_row, small_run, timing
from tests.legible import drawn_texts, illegible


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def dense(request: pytest.FixtureRequest) -> Run:
    return invented_run(request.param)


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert list(drawing.draw(invented_run("cpu"), tmp_path / folder)) == list(drawing.PICTURES)
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second


def test_there_is_one_for_light_and_one_for_dark_pages(tmp_path: Path) -> None:
    """The same drawing, small, with texts in the reader's fonts, in colours that stand out from its paper."""
    drawing.draw(invented_run("cuda"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}{variant}.svg" for name in drawing.PICTURES for variant in ("", "-dark")
    }
    for name in drawing.PICTURES:
        light, dark = ((tmp_path / f"{name}{variant}.svg").read_text() for variant in ("", "-dark"))
        assert len(light) < 60_000
        assert "-apple-system, 'Segoe UI'" in light
        assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
        for svg, paper in ((light, "#ffffff"), (dark, "#0d1117")):
            first, *colours = re.findall("(?:fill|stroke): (#[0-9a-f]{6})", svg)
            assert first == paper  # the background
            for colour in {*re.findall("<text.*?fill: (#[0-9a-f]{6})", svg)} - {paper}:
                assert contrast(colour, paper) >= 4.5, colour
            assert all(contrast(colour, paper) >= 1.4 for colour in {*colours} - {paper})


def contrast(a: str, b: str) -> float:
    """https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio"""

    def luminance(colour: str) -> float:
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.fixture(scope="module")
def pictures(dense: Run) -> dict[str, Figure]:
    with rc_context(STYLE):
        figures = drawing.figures(dense)
        for figure in figures.values():
            figure.draw_without_rendering()
    return figures


@pytest.mark.parametrize("name", drawing.PICTURES)
def test_no_text_covers_another(name: str, pictures: dict[str, Figure]) -> None:
    with rc_context(STYLE):
        assert not illegible(pictures[name])


def test_the_check_for_covered_texts_sees_them() -> None:
    figure = Figure((3, 3))
    figure.subplots().set_xticks([])
    figure.text(0.5, 0.5, "one")
    assert not illegible(figure)
    figure.text(0.52, 0.51, "two")
    figure.text(0.9, 0.8, "beyond the end")
    figure.axes[0].plot([0, 1], [0.2, 0.2])
    figure.axes[0].text(0.5, 0.2, "three", va="center")
    figure.axes[0].set(yticks=[], ylim=(0, 1))
    assert sorted(illegible(figure)) == ["'beyond the end' leaves", "'one' 'two'", "'three' under a line"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("headline", ["tokens a second, relative to transformers with SDPA (the line at 1 x)", "fastbert", "2 x"]),
        ("ceiling", ["100%", "fastbert", "forward", "backward", "linear + GELU", "hidden 768"]),
        ("breakdown", ["everything else", "matrix products", "69%", "480 ms", "400 ms"]),
    ],
)
def test_what_a_picture_says(name: str, expected: list[str], dense: Run, pictures: dict[str, Figure]) -> None:
    texts = [text.get_text() for text in drawn_texts(pictures[name])]
    for line in expected:
        assert any(text.startswith(line) for text in texts), line
    where = f"{dense.name}, 2030-01-02, torch 2.13.0, triton 3.7.1, transformers 5.23.0, commit abc1234"
    assert any(text.replace("\n", " ").endswith(where) for text in texts)


def bars(figure: Figure) -> list[tuple[str, float, str]]:
    """Every bar's figure beside it, length and colour, axes by axes."""
    return [
        (text.get_text(), float(patch.get_width()), to_hex(patch.get_facecolor()))
        for ax in figure.axes
        for text, patch in zip([text for text in ax.texts if text.get_ha() == "left"], ax.patches, strict=True)
    ]


def headline(ours: float) -> Figure:
    rows = [model_row({SDPA: 2.0, f"{SDPA}, compiled": 1.6, OURS: ours})]
    with rc_context(STYLE):
        figure = drawing.headline(empty_run(rows=rows))
    assert figure is not None
    return figure


def test_bars_are_as_long_as_their_texts_say_and_losses_have_a_colour_of_their_own() -> None:
    assert bars(headline(0.5)) == [("4.00 x", 4.0, BLUE), ("1.25 x", 1.25, PALE)]
    assert bars(headline(4.0)) == [("0.50 x", 0.5, ORANGE), ("1.25 x", 1.25, PALE)]
    texts = [text.get_text() for text in drawn_texts(headline(4.0))]
    assert "fastbert, where it is slower" in texts
    assert any(text.startswith("Below 1 x fastbert is slower.") for text in texts)
    assert "fastbert, where it is slower" not in [text.get_text() for text in drawn_texts(headline(0.5))]


def ceiling(run: Run) -> Figure:
    with rc_context(STYLE):
        figure = drawing.ceiling(run)
    assert figure is not None
    return figure


def test_shares_of_the_ceiling() -> None:
    assert bars(ceiling(small_run())) == [
        ("50%", 0.5, BLUE),
        ("25% PyTorch", 0.25, PALE),
        ("25%", 0.25, ORANGE),
        ("50% SDPA", 0.5, PALE),
    ]


def test_what_exceeds_its_ceiling_is_the_ceiling(dense: Run) -> None:
    """As on a machine that was disturbed while its ceilings were measured."""
    run = small_run()
    run.rows[-1].timings[OURS] = timing(0.25)
    figure = ceiling(run)
    assert bars(figure)[2:] == [("100%*", 1.0, BLUE), ("25%* SDPA", 0.25, PALE)]
    (foot,) = [text.get_text() for text in drawn_texts(figure) if text.get_text().startswith("* ")]
    assert foot.startswith("* faster than its ceiling as measured")
    for row in dense.find("roof"):
        row.timings = {name: timing(3 * it.median) for name, it in row.timings.items()}
    shares = [share for _, share, _ in bars(ceiling(dense))]
    assert max(shares) == 1
    assert not illegible(ceiling(dense))


def test_what_is_little_is_not_drawn_apart() -> None:
    values = {"matrix products": 0.5, "attention": 0.44, "GELU": 0.02, "gaps": 0.04}
    rows = [Row("breakdown", model_case(provider=name), values=values, unit="s") for name in (OURS, SDPA)]
    with rc_context(STYLE):
        figure = drawing.breakdown(empty_run(rows=rows))
    assert figure is not None
    widths = [round(float(patch.get_width()), 9) for patch in figure.axes[0].patches]
    assert widths == [0.5, 0.44, 0.06] * 2
