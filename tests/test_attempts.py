"""Benches on a GPU that is not there: graphs, events, and processes that end without losing what they measured."""

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from bench import clock
from bench.attempts import STOPPED, TIME_OVER, Attempts, NotApplicableError
from bench.harness import Bench, Figures, Ready
from bench.record import OURS, Recorder, Row, Run, Timing, Work
from tests.fake_cuda import FakeCuda

RIVAL = "SDPA cuDNN"


class ProcessEnded(BaseException):
    """In the place of the process's end."""


def end() -> NoReturn:
    raise ProcessEnded


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """There is one after each provider and before each timing."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda().install(monkeypatch.setattr)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Run.here("cpu").write(tmp_path / "run.json")
    return tmp_path / "run.json"


def process(path: Path, cuda: FakeCuda, budget: float | None = None) -> Bench:
    """A new one, which goes on with the run in the file."""
    cuda.spoilt = ""
    recorder = Recorder(Run.read(path), path)
    limit = clock.Budget(budget, time.monotonic)
    attempts = Attempts(recorder, device="cuda", budget=limit, resume=True, end=end)
    return Bench(
        None, attempts, device="cuda", measure=True, compiles=False, timer=time.perf_counter, seconds=0.0
    )  # fmt: skip


def ready(step: Callable[[], Any], **options: Any) -> Callable[[], Ready]:
    return lambda: Ready([step], graph=True, **options)


def refusing(cuda: FakeCuda) -> Callable[[], None]:
    """A step that no graph takes."""

    def step() -> None:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        cuda.now += 3.0

    return step


def nothing() -> None:
    pass


def fails(error: BaseException) -> Callable[[], Ready]:
    def make() -> Ready:
        raise error

    return make


def rows(path: Path) -> list[Row]:
    return Run.read(path).rows


def never() -> Ready:
    raise AssertionError("tried again")


def test_a_gpu_is_timed_between_flushes_by_graph_replays(cuda: FakeCuda, path: Path) -> None:
    steps = [lambda: cuda.log.append("first"), lambda: cuda.log.append("second")]
    row = process(path, cuda).steps("op", {}, {OURS: lambda: Ready(list(steps), graph=True)}, Work())
    assert row.timings[OURS] == Timing(1e-3, 1e-3, 1e-3, clock.ROUNDS[0], "graph", peak_bytes=3000)
    captured = cuda.log.index("capture")
    assert cuda.log[:captured] == ["first", *["first", "second"] * 2]
    assert cuda.log[captured + 1 :] == [
        "first",
        "second",
        *["replay"] * clock.LEFT_BEHIND,
        *["flush", "replay"] * clock.ROUNDS[0],
    ]
    assert not Run.read(path).uncaptured


def test_a_gpu_is_timed_by_events_where_nothing_is_to_be_captured(cuda: FakeCuda, path: Path) -> None:
    row = process(path, cuda).steps("op", {}, {OURS: lambda: Ready([refusing(cuda)])}, Work())
    assert row.timings[OURS].how == "events"
    assert row.timings[OURS].median == pytest.approx(3e-3)
    assert "capture" not in cuda.log


def test_inputs_go_round_beyond_the_cache(cuda: FakeCuda) -> None:
    assert clock.sets_of_inputs(10 << 20) == 8  # at most
    assert clock.sets_of_inputs(60 << 20) == 3
    assert clock.sets_of_inputs(1 << 30) == 1


@pytest.mark.parametrize(
    ("name", "by_events_first"),
    [(OURS, False), (f"{OURS} in Triton", False), ("PyTorch, all rows", False), (RIVAL, True), ("torch.compile", True)],
)
def test_rivals_have_a_time_before_they_are_captured_for_the_first_time(
    name: str, by_events_first: bool, cuda: FakeCuda, path: Path
) -> None:
    bench = process(path, cuda)
    for first in (True, False):
        cuda.log.clear()
        row = bench.steps("op", {"first": first}, {name: ready(nothing)}, Work())
        assert row.timings[name].how == "graph"
        flushes = cuda.log[: cuda.log.index("capture")].count("flush")
        assert flushes == (clock.ROUNDS[0] if by_events_first and first else 0)


def test_a_rival_that_cannot_be_captured_keeps_its_time_and_costs_nobody_anything(cuda: FakeCuda, path: Path) -> None:
    providers = {OURS: ready(nothing), RIVAL: ready(refusing(cuda)), "other": ready(nothing)}
    with pytest.raises(ProcessEnded):
        process(path, cuda).steps("op", {"dropout": 0.0}, providers, Work())
    assert cuda.spoilt
    run = Run.read(path)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert run.uncaptured == {f"op: {RIVAL}": reason}
    (row,) = run.rows
    assert {name: timing.how for name, timing in row.timings.items()} == {OURS: "graph", RIVAL: "events"}
    assert not row.failures

    cuda.log.clear()
    bench = process(path, cuda)
    bench.steps("op", {"dropout": 0.0}, providers | {OURS: never, RIVAL: never}, Work())
    assert cuda.log.count("capture") == 1  # the other's
    bench.steps("op", {"dropout": 0.1}, providers, Work())
    first, second = rows(path)
    assert {name: timing.how for name, timing in first.timings.items()} == {
        OURS: "graph",
        RIVAL: "events",
        "other": "graph",
    }
    assert second.timings[RIVAL].how == "events"
    assert Run.read(path).uncaptured == {f"op: {RIVAL}": reason}


def test_what_is_captured_at_once_and_cannot_be_is_timed_by_events_by_the_next_process(
    cuda: FakeCuda, path: Path
) -> None:
    providers = {OURS: ready(refusing(cuda)), "other": ready(nothing)}
    with pytest.raises(ProcessEnded):
        process(path, cuda).steps("op", {}, providers, Work())
    (row,) = rows(path)
    assert (row.timings, row.failures) == ({}, {})
    process(path, cuda).steps("op", {}, providers, Work())
    (row,) = rows(path)
    assert {name: timing.how for name, timing in row.timings.items()} == {OURS: "events", "other": "graph"}


def test_where_the_graph_is_the_point_there_is_no_time_without_one(cuda: FakeCuda, path: Path) -> None:
    name = f"{OURS}, CUDA graph"
    providers = {name: ready(refusing(cuda), only=True), "other": ready(nothing)}
    with pytest.raises(ProcessEnded):
        process(path, cuda).steps("model", {"batch": 1}, providers, Work())
    process(path, cuda).steps("model", {"batch": 1}, providers | {name: never}, Work())
    process(path, cuda).steps("model", {"batch": 8}, providers, Work())
    for row in rows(path):
        assert set(row.timings) == {"other"}
        assert row.failures[name].startswith("cannot be captured: RuntimeError: operation not permitted")


def test_a_process_that_dies_as_it_captures_leaves_word(cuda: FakeCuda, path: Path) -> None:
    def deadly() -> None:
        if cuda.capturing:
            raise ProcessEnded  # without anybody's doing

    with pytest.raises(ProcessEnded):
        process(path, cuda).steps("op", {}, {OURS: ready(deadly), RIVAL: ready(nothing)}, Work())
    assert Run.read(path).uncaptured == {f"op: {OURS}": STOPPED}
    row = process(path, cuda).steps("op", {}, {OURS: ready(deadly), RIVAL: ready(nothing)}, Work())
    assert {name: timing.how for name, timing in row.timings.items()} == {OURS: "events", RIVAL: "graph"}


@pytest.mark.parametrize("name", [OURS, RIVAL])
def test_after_an_illegal_access_the_process_ends_and_the_next_goes_on_behind_it(
    name: str, cuda: FakeCuda, path: Path
) -> None:
    def illegal() -> Ready:
        cuda.spoilt = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(cuda.spoilt)

    providers = {"before": ready(nothing), name: illegal, "after": ready(nothing)}
    with pytest.raises(ProcessEnded):
        process(path, cuda).steps("op", {}, providers, Work())
    (row,) = rows(path)
    assert (set(row.timings), list(row.failures)) == ({"before"}, [name])
    process(path, cuda).steps("op", {}, {"before": never, name: never, "after": ready(nothing)}, Work())
    (row,) = rows(path)
    assert set(row.timings) == {"before", "after"}
    assert row.failures == {name: "RuntimeError: CUDA error: an illegal memory access was encountered"}


def test_a_provider_that_a_process_died_of_is_not_tried_again(cuda: FakeCuda, path: Path) -> None:
    with pytest.raises(ProcessEnded):
        process(path, cuda).steps("op", {}, {"deadly": fails(ProcessEnded()), OURS: ready(nothing)}, Work())
    assert rows(path)[0].failures == {"deadly": STOPPED}
    row = process(path, cuda).steps("op", {}, {"deadly": never, OURS: ready(nothing)}, Work())
    assert (set(row.timings), row.failures) == ({OURS}, {"deadly": STOPPED})


def test_what_was_not_measured_for_want_of_time_is_measured_later(cuda: FakeCuda, path: Path) -> None:
    providers = {OURS: ready(nothing), RIVAL: ready(nothing)}
    row = process(path, cuda, budget=0.0).steps("op", {}, providers, Work())
    assert row.failures == dict.fromkeys(providers, TIME_OVER)
    row = process(path, cuda).steps("op", {}, providers, Work())
    assert (set(row.timings), row.failures) == (set(providers), {})


def test_out_of_memory_is_reported_and_leaves_the_memory(cuda: FakeCuda, path: Path) -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def too_large() -> Ready:
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("while that was handled") from error

    def next_one() -> Ready:
        gc.collect()
        assert [it() for it in held] == [None] * len(held)
        return Ready([nothing])

    row = process(path, cuda).steps("op", {}, {"large": too_large, "next": next_one}, Work())
    assert row.failures == {"large": "RuntimeError: while that was handled"}
    assert set(row.timings) == {"next"}
    with pytest.raises(RuntimeError, match="while that was handled"):  # fastbert's own, after the others
        process(path, cuda).steps("op", {"own": True}, {OURS: too_large, "next": next_one}, Work())
    assert set(rows(path)[1].timings) == {"next"}


def test_work_that_only_a_provider_can_count_is_kept(cuda: FakeCuda, path: Path) -> None:
    counted = Work(flops=7, tokens=3)
    process(path, cuda).steps("op", {}, {OURS: lambda: Ready([nothing], work=counted)}, Work(tokens=3))
    assert rows(path)[0].work == counted


class TestFigures:
    def test_of_all_kinds(self, cuda: FakeCuda, path: Path) -> None:
        makes: dict[str, Callable[[], Figures]] = {
            OURS: lambda: Figures([1.0, 2.0, 3.0], {OURS: 127}),
            "other": lambda: Figures(values={"other": 300}),
        }
        row = process(path, cuda).figures("host", {"what": "graph"}, makes, unit="nodes")
        assert rows(path) == [row]
        assert (row.timings[OURS].median, row.timings[OURS].how, row.unit) == (2.0, "clock", "nodes")
        assert row.values == {OURS: 127, "other": 300}

    def test_a_failed_capture_ends_the_process_and_is_not_tried_again(self, cuda: FakeCuda, path: Path) -> None:
        def graph(bench: Bench) -> Callable[[], Figures]:
            return lambda: Figures(values={OURS: float(bench.captured(OURS, refusing(cuda)) is not None)})

        bench = process(path, cuda)
        with pytest.raises(ProcessEnded):
            bench.figures("host", {}, {OURS: graph(bench), "other": never})  # type: ignore[dict-item]
        for case in ({}, {"model": "large"}):
            cuda.log.clear()
            bench = process(path, cuda)
            row = bench.figures("host", case, {OURS: graph(bench), "other": lambda: Figures(values={"other": 1})})
            assert "capture" not in cuda.log
            assert row.failures[OURS].startswith("cannot be captured: RuntimeError")
            assert row.values == {"other": 1}

    def test_fastberts_error_is_raised_after_the_others(self, cuda: FakeCuda, path: Path) -> None:
        def broken() -> Figures:
            raise ValueError("no")

        def absent() -> Figures:
            raise NotApplicableError("is not installed")

        with pytest.raises(ValueError, match="no"):
            process(path, cuda).figures(
                "host", {}, {OURS: broken, "absent": absent, "other": lambda: Figures(values={"other": 1})}
            )
        (row,) = rows(path)
        assert row.failures == {OURS: "ValueError: no", "absent": "is not installed"}
        assert row.values == {"other": 1}
