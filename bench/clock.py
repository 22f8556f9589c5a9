"""How long steps take: by a host's clock in turn, or by CUDA events around replays of a graph.

A GPU is timed with its L2 cache flushed before each round, and an operator's steps go through several sets of
inputs, one after the other, that together are larger than the cache.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench.record import Timing

Step = Callable[[], Any]
ROUNDS = 5, 100  # at least, at most
LEFT_BEHIND = 1  # rounds that are not counted


def cpu_timings(
    steps: Mapping[str, Step], clock: Callable[[], float], seconds: float, turns: int = ROUNDS[0]
) -> tuple[dict[str, Timing], dict[str, list[float]]]:
    """Time steps in turn, so that whatever else the machine does hits all alike.

    Args:
        clock: returns seconds.  seconds: how long to go on for each step, within ROUNDS.
        turns: instead of the fewest of ROUNDS.

    Returns:
        The timings, and every counted time.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    total = LEFT_BEHIND + turns
    with _no_collection():
        for done in range(LEFT_BEHIND + ROUNDS[1]):
            for name, step in steps.items():
                start = clock()
                step()
                times[name].append(clock() - start)
            if done + 1 == LEFT_BEHIND:
                a_round = sum(taken[-1] for taken in times.values())
                total = LEFT_BEHIND + rounds(a_round / max(1, len(steps)), seconds, turns)
            if done + 1 >= total:
                break
    counted = {name: taken[LEFT_BEHIND:] for name, taken in times.items()}
    return {name: Timing.of(taken, "clock") for name, taken in counted.items()}, counted


def rounds(step_seconds: float, seconds: float, fewest: int = ROUNDS[0]) -> int:
    """How many rounds of a step fit into a time, within ROUNDS."""
    return max(fewest, min(ROUNDS[1], int(seconds / max(step_seconds, 1e-9))))


class CudaClock:
    """Events on the current stream, between flushes of the L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.empty(2 * max(_cache(), 32 << 20), dtype=torch.int8, device="cuda")

    def times(self, run: Step, seconds: float, steps: int = 1) -> list[float]:
        """Seconds of one of the steps that `run` does, for each round.

        The flush keeps the GPU busy while the host queues what is timed; only where queuing takes longer than the
        work itself do its gaps count, as they do for a user.
        """
        for _ in range(LEFT_BEHIND):
            first, last = _event(), _event()
            first.record()
            run()
            last.record()
        torch.cuda.synchronize()
        count = rounds(first.elapsed_time(last) * 1e-3, seconds)
        events = [(_event(), _event()) for _ in range(count)]
        with _no_collection():
            for start, end in events:
                self._flush.zero_()
                start.record()
                run()
                end.record()
            torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 / steps for start, end in events]


def captured(steps: Sequence[Step]) -> Step:
    """The steps one after the other in a CUDA graph, captured on the current stream, which is not the default one.

    Raises:
        RuntimeError: if one of them cannot be captured.
    """
    for _ in range(2):  # a compiler has compiled, and libraries have their workspaces
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        kept = [step() for step in steps]  # each its own memory: outputs that are written twice stay in the cache

    def replay(_kept: Any = kept) -> None:
        graph.replay()

    return replay


def check() -> None:
    """
    Raises:
        RuntimeError: if nothing works on the GPU any more in this process: after an illegal access, or after a capture
            that failed, when no random number can be drawn.
    """
    torch.cuda.synchronize()
    torch.rand(1, device="cuda")


def sets_of_inputs(a_set: int) -> int:
    """How many sets of inputs of so many bytes are three times as large as the L2 cache, at most eight."""
    return max(1, min(8, -(-3 * _cache() // max(1, a_set))))


@contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _cache() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


class Replay:
    """A clock for pytest-benchmark that shows times which were measured on a GPU."""

    def __init__(self) -> None:
        self._now = 0.0
        self._next: Iterator[float] = iter(())

    def __call__(self) -> float:
        return self._now

    def load(self, times: Sequence[float]) -> None:
        self._next = iter(times)

    def step(self) -> None:
        self._now += next(self._next, 0.0)  # pytest-benchmark calls once more than it counts


class Budget:
    """Seconds that a run may take, counted from its start.

    Args:
        seconds: None for no limit.
    """

    def __init__(self, seconds: float | None, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    def left(self) -> float:
        return float("inf") if self._end is None else self._end - self._clock()
