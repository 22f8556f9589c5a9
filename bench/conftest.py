"""`pytest bench` checks that the implementations agree, on the smallest cases; `pytest bench --benchmark` measures.

A bench lists its cases: SMALLEST, and by device GOALS and CASES. GOALS, what we have goals for, are measured first, and
without torch.compile, which takes minutes; they stand in CASES once more. What was measured is in the results file at
once; a table of it comes last.
"""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import load_timer

from bench import clock
from bench.harness import Bench, replay
from bench.record import Recorder, Run
from bench.table import terminal_table

SECONDS = {"cpu": 0.5, "cuda": 0.15}  # that a provider of a case is timed
ORDER = (
    "roof",
    "attention",
    "layer_norm",
    "ffn",
    "cross_entropy",
    "linear",
    "embedding",
    "model",
    "pretraining",
    "input",
    "breakdown",
    "memory",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--benchmark", action="store_true", help="measure, instead of one small case of each bench")
    group.addoption("--smallest", action="store_true", help="with --benchmark: only the smallest cases")
    group.addoption("--results", default=".out/bench.json", help="where --benchmark writes what it measured")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--budget", type=float, help="seconds after which nothing more is measured")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
        return
    device = config.getoption("--device")
    command = ["pytest", *(str(argument) for argument in config.invocation_params.args)]
    config.stash[_RECORDER] = Recorder(Run.here(device, command), Path(config.getoption("--results")))
    config.stash[_BUDGET] = clock.Budget(config.getoption("--budget"), time.monotonic)


_RECORDER = pytest.StashKey[Recorder]()
_BUDGET = pytest.StashKey[clock.Budget]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    module, config = metafunc.module, metafunc.config
    if config.getoption("--benchmark") and not config.getoption("--smallest"):
        device = config.getoption("--device")
        goals = getattr(module, "GOALS", {}).get(device, [])
        rest = module.CASES[device]
    else:
        goals, rest = module.SMALLEST, []
    cases = [pytest.param(case, marks=pytest.mark.goal) for case in goals] + list(rest)
    metafunc.parametrize("case", cases, ids=lambda case: " ".join(str(value) for value in case.values()))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most important first: this machine's ceilings, then what there are goals for, then the rest."""
    if not config.getoption("--benchmark"):
        return

    def rank(item: pytest.Item) -> tuple[bool, int]:
        name = item.path.stem.removeprefix("bench_")
        return item.get_closest_marker("goal") is None, ORDER.index(name) if name in ORDER else len(ORDER)

    items.sort(key=rank)
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=replay))


def pytest_sessionstart(session: pytest.Session) -> None:
    recorder = session.config.stash.get(_RECORDER, None)
    if recorder is not None:
        recorder.run.write(recorder.path)


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[Bench]:
    """Checks providers against each other, and times them with --benchmark."""
    yield from _bench(request, benchmark)


@pytest.fixture
def untimed(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """For benches that count or profile, and have no times to give to pytest-benchmark."""
    yield from _bench(request, None)


def _bench(request: pytest.FixtureRequest, benchmark: BenchmarkFixture | None) -> Iterator[Bench]:
    config = request.config
    device, measure = config.getoption("--device"), config.getoption("--benchmark")
    budget = config.stash.get(_BUDGET, None) or clock.Budget(None, time.monotonic)
    if budget.left() <= 0:
        pytest.skip("not measured: the time was over")
    timer: Any = load_timer(config.getoption("benchmark_timer"))
    # A graph is captured on a stream of its own, and a backward runs where its forward ran.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with stream:
        yield Bench(
            benchmark,
            config.stash.get(_RECORDER, None),
            device=device,
            measure=measure,
            compiles=measure and request.node.get_closest_marker("goal") is None,
            timer=timer.target,
            budget=budget,
            seconds=SECONDS[device],
        )
    if device == "cuda":
        torch.cuda.empty_cache()


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.stash.get(_RECORDER, None)
    if recorder is None:
        return
    stopped = session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if stopped or session.config.stash[_BUDGET].left() <= 0:
        recorder.run.write(recorder.path)
    else:
        recorder.finish()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash.get(_RECORDER, None)
    if recorder is not None and recorder.run.rows:
        terminalreporter.write_line(terminal_table(recorder.run))
        terminalreporter.write_line(f"{len(recorder.run.rows)} rows in {recorder.path}")
