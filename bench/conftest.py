"""`pytest bench` checks that the implementations agree, on the smallest cases; `pytest bench --benchmark` measures.

A bench lists its cases: SMALLEST, and by device GOALS and CASES. GOALS, what we have goals for, are measured first, and
without torch.compile, which takes minutes; they stand in CASES once more. What was measured is in the results file at
once; a table of it comes last. With --resume a run goes on: what its file has is not measured again.
"""

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import load_timer

from bench import clock
from bench.attempts import TIME_OVER, Attempts, end_process
from bench.ceilings import Ceilings
from bench.clock import ROUNDS
from bench.harness import Bench, replay
from bench.record import BEGUN, FINISHED, LOST, Recorder, Run
from bench.table import terminal_table

SECONDS = {"cpu": 0.5, "cuda": 0.15}  # that a provider of a case is timed
ORDER = (
    "roof",
    "model",
    "inference",
    "attention",
    "layer_norm",
    "ffn",
    "cross_entropy",
    "breakdown",
    "host",
    "first_step",
    "pretraining",
    "finetuning",
    "embedding",
    "linear",
    "input",
    "memory",
    "quality",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--benchmark", action="store_true", help="measure, instead of one small case of each bench")
    group.addoption("--smallest", action="store_true", help="with --benchmark: only the smallest cases")
    group.addoption("--results", default=".out/bench.json", help="where --benchmark writes what it measured")
    group.addoption("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--budget", type=float, help="seconds after which nothing more is measured")
    group.addoption("--turns", type=int, default=ROUNDS[0], help="that all providers take at least, by a host's clock")
    group.addoption("--part", choices=("goals", "rest", "all"), default="all", help="of the cases that are measured")
    group.addoption("--resume", action="store_true", help="go on with the run in --results, if there is one")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True
        return
    device = config.getoption("--device")
    command = ["pytest", *(str(argument) for argument in config.invocation_params.args)]
    path = Path(config.getoption("--results"))
    goes_on = config.getoption("--resume") and path.exists()
    config.stash[_RECORDER] = recorder = Recorder(Run.read(path) if goes_on else Run.here(device, command), path)
    config.stash[_BUDGET] = budget = clock.Budget(config.getoption("--budget"), time.monotonic)
    options: Any = {"only_last": config.getoption("--smallest"), "now": time.monotonic}
    options["timer"] = load_timer(config.getoption("benchmark_timer")).target
    config.stash[_CEILINGS] = Ceilings(recorder, device=device, budget=budget, **options)


_RECORDER = pytest.StashKey[Recorder]()
_BUDGET = pytest.StashKey[clock.Budget]()
_CEILINGS = pytest.StashKey[Ceilings]()


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

    def label(case: dict[str, Any]) -> str:
        return " ".join(str(value) for value in case.values())

    cases = [pytest.param(case, id=f"goal {label(case)}", marks=pytest.mark.goal) for case in goals]
    metafunc.parametrize("case", [*cases, *(pytest.param(case, id=label(case)) for case in rest)])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The most important first: this machine's ceilings, then what there are goals for, then the rest."""
    if not config.getoption("--benchmark"):
        return
    part, nodes = config.getoption("--part"), config.stash[_RECORDER].run.nodes

    def wanted(item: pytest.Item) -> bool:
        is_goal = item.get_closest_marker("goal") is not None
        return nodes.get(item.nodeid) not in (FINISHED, LOST) and part in ("all", "goals" if is_goal else "rest")

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)

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
    """For benches that count, profile, or time by themselves, and have nothing to give to pytest-benchmark."""
    yield from _bench(request, None)


def _bench(request: pytest.FixtureRequest, benchmark: BenchmarkFixture | None) -> Iterator[Bench]:
    config, node = request.config, request.node
    device, measure = config.getoption("--device"), config.getoption("--benchmark")
    budget = config.stash.get(_BUDGET, None) or clock.Budget(None, time.monotonic)
    if budget.left() <= 0:
        pytest.skip(TIME_OVER)
    recorder, resume = config.stash.get(_RECORDER, None), config.getoption("--resume")
    # on a GPU a case's goal is measured first, and what takes longer is added to its row
    end = partial(_end, config)
    attempts = Attempts(recorder, device=device, budget=budget, resume=resume or device == "cuda", end=end)
    timer: Any = load_timer(config.getoption("benchmark_timer"))
    if recorder is not None and resume:
        recorder.mark(node.nodeid, BEGUN)
    # A graph is captured on a stream of its own, and a backward runs where its forward ran.
    stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext()
    with stream:
        yield Bench(
            benchmark,
            attempts,
            device=device,
            measure=measure,
            compiles=measure and node.get_closest_marker("goal") is None,
            timer=timer.target,
            seconds=SECONDS[device] / (10 if config.getoption("--smallest") else 1),
            turns=config.getoption("--turns"),
        )
    if recorder is not None and resume:
        recorder.mark(node.nodeid, None if attempts.over else FINISHED)
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if ceilings := item.config.stash.get(_CEILINGS, None):
        ceilings.again(last=nextitem is None)


def _end(config: pytest.Config) -> NoReturn:
    config.pluginmanager.getplugin("capturemanager").suspend_global_capture()
    print(f"\nThis process cannot go on; what it measured is in {config.getoption('--results')}: --resume goes on.")
    end_process()


def pytest_sessionfinish(session: pytest.Session) -> None:
    recorder = session.config.stash.get(_RECORDER, None)
    if recorder is None:
        return
    stopped = session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if stopped or session.config.getoption("--resume") or session.config.stash[_BUDGET].left() <= 0:
        recorder.run.write(recorder.path)
    else:
        recorder.finish()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    recorder = config.stash.get(_RECORDER, None)
    if recorder is not None and recorder.run.rows and not config.getoption("--resume"):
        terminalreporter.write_line(terminal_table(recorder.run))
        terminalreporter.write_line(f"{len(recorder.run.rows)} rows in {recorder.path}")
