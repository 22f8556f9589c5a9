"""`make gpu` without processes: what they would do, and the time they would take, is told."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import gpu
from bench.gpu import STAGES, Stage
from bench.record import OURS, Row, Run, Timing


class World:
    """Time, and what processes do in it.

    Attributes:
        calls: pytest's arguments, and when it was called.
        does: what a call does to the run's file, by the name of the bench or "tests"; returns seconds and exit status.
        words: what it says.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, Sequence[str]]] = []
        self.does: dict[str, Callable[[Call], tuple[float, int]]] = {}
        self.says: dict[str, str] = {}
        self.news = False  # whether processes give some all the time
        self.started = self.stopped = self.interrupted = 0

    def names(self) -> list[str]:
        return [name_of(arguments) for _, arguments in self.calls]

    def called(self, name: str) -> list[float]:
        return [when for when, arguments in self.calls if name_of(arguments) == name]


class Call:
    """What a process was called with, and the run that it goes on with."""

    def __init__(self, world: World, arguments: Sequence[str], figures: Path) -> None:
        self.world, self.arguments, self.figures = world, arguments, figures
        self.times = len(world.called(name_of(arguments)))

    @property
    def budget(self) -> float:
        return float(self.arguments[self.arguments.index("--budget") + 1])

    def write(self, change: Callable[[Run], None]) -> None:
        run = Run.read(self.figures)
        change(run)
        run.write(self.figures)


def name_of(arguments: Sequence[str]) -> str:
    found = re.fullmatch(r"bench/bench_(\w+)\.py", arguments[0])
    return found[1] if found else "tests"


def make_world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    """Processes of `make gpu` that take no time but what they are told to take."""
    world = World()
    figures = tmp_path / "gpu/bench.json"

    class Server:
        def __init__(self, fork: bool, imports: Sequence[str]) -> None:
            world.started += 1
            self.ends: float | None = None
            self.ready = True

        def call(self, arguments: Sequence[str], output: Path, variables: Mapping[str, str]) -> None:
            world.calls.append((world.now, arguments))
            name = name_of(arguments)
            with output.open("a") as words:
                words.write(world.says.get(name, "1 passed in 2.0s\n"))
            seconds, self.exit = world.does.get(name, lambda _: (1.0, 0))(Call(world, arguments, figures))
            self.ends = world.now + seconds

        def status(self, seconds: float) -> int | None:
            assert self.ends is not None
            if self.ends <= world.now + seconds:
                world.now = max(world.now, self.ends)
                return self.exit
            world.now += seconds
            return None

        def interrupt(self) -> None:
            world.interrupted += 1

        def stop(self) -> None:
            world.stopped += 1

    class Extension:
        def __init__(self, build: bool) -> None:
            self.build = build

        def wait(self, seconds: float) -> str:
            return f"extension, {self.build}, {seconds}"

        def stop(self) -> None:
            pass

    monkeypatch.setattr("bench.process.Server", Server)
    monkeypatch.setattr(gpu, "Extension", Extension)
    clock = SimpleNamespace(monotonic=lambda: world.now, time=lambda: world.now)
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(gpu, "_changed", lambda path: world.now if world.news else 0.0)
    here = Run.here
    monkeypatch.setattr(Run, "here", lambda device, command=(): here("cpu", command))
    monkeypatch.setattr("bench.record._clocks", lambda device: None)
    return world


def run_of(tmp_path: Path, *stages: Stage, budget: float = 545.0, device: str = "cuda") -> tuple[int, Run]:
    status = gpu.main(
        device=device, results=tmp_path / "gpu", budget=budget, smallest=False, stages=stages or STAGES
    )  # fmt: skip
    return status, Run.read(tmp_path / "gpu/bench.json")


def row(name: str = OURS, why: str | None = None, bench: str = "op") -> Row:
    it = Row(bench, {"case": 1})
    if why is None:
        it.timings[name] = Timing(1.0, 1.0, 1.0, 5, "events")
    else:
        it.failures[name] = why
    return it


def forever(call: Call) -> tuple[float, int]:
    """Without an end."""
    return 1e9, 0
