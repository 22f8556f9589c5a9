"""Pictures of fine-tuning runs: what is drawn, and that it can be read."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastbert.training import plot as pretraining
from fastbert.training import plot_finetuning
from fastbert.training.plot_finetuning import plot
from fastbert.training.style import STYLE
from tests.command import Run, is_one_line
from tests.finetuning_runs import write_finetuning
from tests.legible import drawn_texts, illegible
from tests.test_plot import write_run

LONG = ("shipping and delivery", "product quality", "customer service on the telephone", "price", "something else")


def figure_of(monkeypatch: pytest.MonkeyPatch, *runs: Path) -> Figure:
    kept: list[Figure] = []

    def keep(figure: Figure, target: Path) -> None:
        figure.draw_without_rendering()
        kept.append(figure)

    monkeypatch.setattr(pretraining, "save", keep)
    plot(runs, Path("none.png"))
    return kept[0]


def titles(figure: Figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def texts_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in drawn_texts(figure)]


def panel(figure: Figure, title: str) -> Any:
    (found,) = [axis for axis in figure.axes if axis.get_title(loc="left") == title]
    return found


def test_one_training_is_drawn_raw_and_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, write_finetuning(tmp_path / "run"))
    curves = ["training loss", "dev accuracy", "dev loss", "dev F1 macro", "learning rate"]  # f1_micro is the accuracy
    assert titles(figure)[:5] == curves
    raw, smooth = panel(figure, "training loss").lines
    assert len(raw.get_xdata()) == len(smooth.get_xdata()) == 60
    rough, fine = (max(abs(b - a) for a, b in pairwise(y)) for y in (raw.get_ydata(), smooth.get_ydata()))
    assert fine < rough / 2
    (dev,) = panel(figure, "dev accuracy").lines
    assert list(dev.get_xdata()) == [40, 80, 120]
    assert max(dev.get_ydata()) == pytest.approx(0.9)
    assert {"run, accuracy 90.00", "smoothed", "as logged", "dev"} <= {*texts_of(figure)}


def test_a_row_of_the_matrix_is_a_true_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_finetuning(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["splits"]["dev"]["confusion"] = [[30, 10], [0, 60]]
    (run / "results.json").write_text(json.dumps(results))
    axis = panel(figure_of(monkeypatch, run), "dev: 100 examples")
    assert axis.get_ylim() == (2, 0)  # the first class is on top
    cells = {text.get_text().replace("\n", ", "): text.get_position() for text in axis.texts}
    assert cells == {"30, 75 %": (0.5, 0.5), "10, 25 %": (1.5, 0.5), "0, 0 %": (0.5, 1.5), "60, 100 %": (1.5, 1.5)}
    assert axis.collections[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["bad", "good"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"classes": LONG},
        {"classes": [f"class number {i}" for i in range(20)]},
        {"classes": [f"class number {i}" for i in range(60)]},
        {"numbers": 200},
        {"rates": (5e-5, 3e-5, 2e-5), "seeds": 3},
        {"rates": (5e-5, 4e-5, 3e-5, 2e-5), "seeds": 5, "classes": LONG},
        {"steps": 6},
        {"done": False},
    ],
    ids=str,
)
def test_all_can_be_read(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, write_finetuning(tmp_path / "run", **options))
    with rc_context(STYLE):
        assert not illegible(figure)


def test_many_classes_are_told_by_their_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"c{i}" for i in range(30)]
    run = write_finetuning(tmp_path / "run", classes=names)
    results = json.loads((run / "results.json").read_text())
    confusion = [[100 * (i == j) for j in range(30)] for i in range(30)]
    confusion[3][7], confusion[8][1] = 9, 12
    results["splits"]["dev"]["confusion"] = confusion
    (run / "results.json").write_text(json.dumps(results))
    axis = panel(figure_of(monkeypatch, run), "the most frequent mistakes")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["c8, taken for c1", "c3, taken for c7"]
    assert [text.get_text() for text in axis.texts] == ["12", "9"]


def test_numbers_are_drawn_over_what_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, write_finetuning(tmp_path / "run", numbers=50))
    diagonal, points = panel(figure, "dev: 50 examples").lines
    assert len(points.get_xdata()) == 50
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert points.get_ydata()[-1] == pytest.approx(5 - 0.42818, abs=1e-4)
    assert sum(bar.get_height() for bar in panel(figure, "predicted minus true").patches) == 50


def thick(lines: Sequence[Any]) -> list[Any]:
    return [line for line in lines if line.get_linewidth() > 2]


def test_a_line_a_training_and_the_best_is_thick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, write_finetuning(tmp_path / "run", rates=(5e-5, 2e-5), seeds=2))
    loss, dev = (panel(figure, name).lines for name in ("training loss", "dev accuracy"))
    assert len(loss) == len(dev) == 4
    for lines in (loss, dev):
        (best,) = thick(lines)
        assert len({line.get_color() for line in lines}) == 2
        assert lines[-1] is best  # above the others
    assert thick(dev)[0].get_ydata()[-1] == pytest.approx(0.9)
    said = "run: best of 4, learning rate 5e-05, seed 1, accuracy 90.00"
    assert {said, "learning rate 5e-05", "learning rate 2e-05", "the best"} <= {*texts_of(figure)}


def test_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_finetuning(tmp_path / name, seeds=2) for name in ("a", "b")]
    figure = figure_of(monkeypatch, *runs)
    assert len(panel(figure, "dev accuracy").lines) == 4
    assert {"a", "b"} <= {*texts_of(figure)}
    assert not any("examples" in title for title in titles(figure))  # whose would it be?


@pytest.mark.parametrize(("name", "begin"), [("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml")])
def test_the_command(name: str, begin: bytes, run: Run, tmp_path: Path) -> None:
    folder = write_finetuning(tmp_path / "run")
    status, _, err = run("plot", folder, "-o", tmp_path / name)
    assert (status, err) == (0, f"fastbert: {tmp_path / name}\n")
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_what_cannot_be_drawn(run: Run, tmp_path: Path) -> None:
    tuned = write_finetuning(tmp_path / "tuned", done=False)
    status, _, err = run("plot", tuned, write_run(tmp_path / "pretrained"))
    assert (status, is_one_line(err)) == (1, True)
    assert "plot each kind for itself" in err
    for log in tuned.glob("runs/*/log.jsonl"):
        log.unlink()
    status, _, err = run("plot", tuned)
    assert (status, is_one_line(err)) == (1, True)
    assert "has not logged yet" in err


def test_the_kinds_are_told_apart(tmp_path: Path) -> None:
    assert plot_finetuning.is_finetuning(write_finetuning(tmp_path / "tuned"))
    assert not plot_finetuning.is_finetuning(write_run(tmp_path / "pretrained"))
    assert not plot_finetuning.is_finetuning(tmp_path / "nothing")
