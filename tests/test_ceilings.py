"""Ceilings that are measured again: when, which, and that the best counts."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from bench import ceilings, clock
from bench.bench_roof import SMALLEST
from bench.ceilings import BEHIND, EVERY, Ceilings
from bench.record import Recorder, Row, Run, Timing, Work

HOUR = 3600.0


class Machine:
    """A run with ceilings that took an hour each; and a clock by which what is measured takes `step` seconds."""

    def __init__(self, path: Path, **options: Any) -> None:
        run = Run.here("cpu")
        slow = Timing(HOUR, HOUR, HOUR, 5, "clock")
        cases = SMALLEST[0], SMALLEST[-1]  # a copy, and a launch
        run.rows = [Row("roof", dict(case), Work(), {"PyTorch": slow}) for case in cases]
        self.path, self.time, self.step = path, 0.0, 2.0
        ticks = itertools.count()
        self.ceilings = Ceilings(
            Recorder(run, path),
            device="cpu",
            budget=options.pop("budget", clock.Budget(None, lambda: 0.0)),
            now=lambda: self.time,
            timer=lambda: self.step * next(ticks),
            **options,
        )

    def after(self, seconds: float, *, last: bool = False) -> set[float]:
        """Medians of what can be measured again, on the disk, once so much time is over."""
        self.time += seconds
        self.ceilings.again(last=last)
        if not self.path.exists():
            return {HOUR}
        rows = Run.read(self.path).rows
        assert [row.timings["PyTorch"].median for row in rows if row.case["what"] == "launch"] == [HOUR]
        return {row.timings["PyTorch"].median for row in rows if row.case["what"] != "launch"}


def test_the_best_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run.json")
    assert machine.after(0.9 * EVERY["cpu"]) == {HOUR}
    assert machine.after(0.2 * EVERY["cpu"]) == {2.0}
    machine.step = 3.0
    assert machine.after(EVERY["cpu"]) == {2.0}
    machine.step = 1.0
    assert machine.after(0.9 * EVERY["cpu"]) == {2.0}  # not yet
    assert machine.after(0.2 * EVERY["cpu"]) == {1.0}


def test_once_more_at_the_end(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run.json")
    assert machine.after(0.9 * BEHIND * EVERY["cpu"], last=True) == {HOUR}
    assert machine.after(0.2 * BEHIND * EVERY["cpu"], last=True) == {2.0}


def test_small_runs_do_so_only_at_the_end(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run.json", only_last=True)
    assert machine.after(HOUR) == {HOUR}
    assert machine.after(0.0, last=True) == {2.0}


def test_not_when_the_time_is_over(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "run.json", budget=clock.Budget(0.0, lambda: 1.0))
    assert machine.after(HOUR, last=True) == {HOUR}


def test_what_fails_is_said_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ceilings.bench_roof, "make", fails)
    assert Machine(tmp_path / "run.json").after(HOUR) == {HOUR}
    assert "ceilings were not measured again: out of memory" in capsys.readouterr().err


def test_on_a_gpu_it_is_copies_and_squares(tmp_path: Path) -> None:
    gpu = Ceilings(
        Recorder(Run.here("cpu"), tmp_path / "run.json"),
        device="cuda",
        budget=clock.Budget(None, lambda: 0.0),
        now=lambda: 0.0,
        timer=lambda: 0.0,
    )
    rows = [Row("roof", dict(case)) for case in SMALLEST]
    assert [row.case["what"] for row in rows if gpu._cheap(row)] == ["copy", "product"]
