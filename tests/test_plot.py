"""Curves of runs: what is drawn, and that it can be read."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.figure import Figure

from fastbert.errors import InputError
from fastbert.training import plot as curves
from fastbert.training.plot import plot, read_log
from fastbert.training.style import GREY, STYLE
from tests.legible import drawn_texts, illegible

PHASES = [[128, 0.9], [512, 0.1]]


def write_run(
    folder: Path, *, steps: int = 1000, every: int = 10, phases: Any = PHASES, held_out: int = 0, panels: int = 8
) -> Path:
    """A run's folder, whose loss jumps where the second phase begins."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"fixed": {"steps": steps, "phases": phases}, "entropy": 6.73}))
    records: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        noise = 0.3 * (step // every % 2)
        loss = 8 * math.exp(-3 * step / steps) + noise - (2 if step > phases[0][1] * steps else 0)
        figures = {"mlm_loss": loss, "mlm_accuracy": 0.4, "nsp_loss": 0.69 + noise, "nsp_accuracy": 0.5 + noise}
        figures |= {"learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 12_345.0, "data_wait": 0.004}
        records.append({"step": step, **dict(list(figures.items())[:panels])})
    for step in range(held_out, steps + 1, held_out or steps + 1):
        if step:
            records.append({"step": step, "eval_mlm_loss": 4.0, "eval_mlm_accuracy": 0.3, "eval_nsp_accuracy": 0.6})
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def figure_of(monkeypatch: pytest.MonkeyPatch, *runs: Path) -> Figure:
    kept: list[Figure] = []

    def keep(figure: Figure, target: Path) -> None:
        figure.draw_without_rendering()
        kept.append(figure)

    monkeypatch.setattr(curves, "save", keep)
    plot(runs, Path("none.png"))
    return kept[0]


def test_phases_are_told_and_smoothed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, write_run(tmp_path / "run"))
    loss, *_ = figure.axes
    assert loss.get_title(loc="left") == "masked-LM loss, nats"
    logged, first, second, _, landmark, boundary = loss.lines
    assert len(logged.get_xdata()) == 100
    assert list(first.get_xdata()) == list(range(10, 901, 10))
    assert list(second.get_xdata()) == list(range(910, 1001, 10))
    jumps = [abs(float(b) - float(a)) for a, b in zip(first.get_ydata()[:-1], first.get_ydata()[1:], strict=True)]
    assert max(jumps) < 0.3  # the noise: it is gone
    assert first.get_ydata()[-1] - second.get_ydata()[0] > 1.5  # the jump: it is there
    assert list(boundary.get_xdata()) == [900, 900]
    assert landmark.get_ydata()[0] == 6.73
    texts = [text.get_text() for text in drawn_texts(figure)]
    assert {"run", "128 tokens", "512 tokens", "unigram\nentropy 6.73", "a coin 0.69", "chance 0.50"} <= {*texts}
    assert {"smoothed", "as logged", "1e-4", "40%", "10,000"} <= {*texts}
    assert "held out" not in texts


def test_held_out_points_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = figure_of(monkeypatch, write_run(tmp_path / "run", held_out=250))
    for panel, value in ((0, 4.0), (1, 0.3), (3, 0.6)):
        (line,) = [line for line in figure.axes[panel].lines if line.get_marker() == "o"]
        assert list(line.get_xdata()) == [250, 500, 750, 1000]
        assert set(line.get_ydata()) == {value}
    assert "held out" in [text.get_text() for text in drawn_texts(figure)]


def test_all_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [[64, 0.5], [128, 0.02], [256, 0.28], [512, 0.2]]
    one = write_run(tmp_path / "one", phases=many, held_out=100)
    others = [write_run(tmp_path / f"{name}/{'run' * 20}", steps=1_500_000, every=500_000) for name in "ab"]
    for runs in ((one,), (one, *others)):
        figure = figure_of(monkeypatch, *runs)
        with rc_context(STYLE):
            assert not illegible(figure)


def test_names_tell_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / name, panels=1) for name in ("a/run", "b/run", "c")]
    texts = {text.get_text() for text in drawn_texts(figure_of(monkeypatch, *runs))}
    assert {str(Path(name)) for name in ("a/run", "b/run", "c")} <= texts
    assert "run" in {text.get_text() for text in drawn_texts(figure_of(monkeypatch, runs[0] / "log.jsonl"))}


def test_boundaries_of_other_phases_have_their_runs_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [
        write_run(tmp_path / name, phases=[[128, share], [512, 1 - share]], panels=1)
        for name, share in (("a", 0.9), ("b", 0.5))
    ]
    boundaries = {
        line.get_xdata()[0]: line.get_color()
        for line in figure_of(monkeypatch, *runs).axes[0].lines
        if line.get_linestyle() == ":"
    }
    assert boundaries.keys() == {900, 500}
    assert len({*boundaries.values()} - {GREY}) == 2


def test_a_run_that_has_just_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", steps=10, panels=1)
    (run / "run.json").unlink()
    figure = figure_of(monkeypatch, run)
    assert figure.axes[0].lines[0].get_marker() == "o"  # of one point there is no line
    assert "smoothed" not in [text.get_text() for text in drawn_texts(figure)]


@pytest.mark.parametrize(("name", "begin"), [("curves.png", b"\x89PNG"), ("curves.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_the_name_says_the_format(name: str, begin: bytes, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", panels=1)
    plot([run], tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)


@pytest.mark.parametrize("name", ["curves.txt", "none/curves.png", "none/curves.svg"])
def test_what_cannot_be_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        plot([write_run(tmp_path / "run", panels=1)], tmp_path / name)


@pytest.mark.parametrize("log", ["[1]\n", "{}\n", "x", '{"step": 1'])
def test_what_is_no_log(log: str, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(log)
    with pytest.raises(InputError, match="is no log of a run"):
        read_log(tmp_path)


def test_the_trainer_is_not_needed() -> None:
    code = "import fastbert.training.plot, sys; assert not {'accelerate', 'transformers.trainer'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
