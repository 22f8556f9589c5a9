"""A GPU for the benches' harness: CUDA's functions that it calls, on a CPU, with what can go wrong there."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from bench import clock


class FakeCuda:
    """Time that goes on where something is done, the order of what was done, and what is spoilt.

    Attributes:
        capturing: whether a graph is being captured.
        spoilt: why nothing works any more; nothing can be drawn after a capture that failed.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.capturing = False
        self.spoilt = ""

    def install(self, patch: Callable[[Any, str, Any], None] = setattr) -> "FakeCuda":
        cuda, fake = torch.cuda, self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def elapsed_time(self, end: "Event") -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                fake.now += 2.0
                fake.log.append("replay")

        class Flush:
            def zero_(self) -> None:
                fake.now += 100.0
                fake.log.append("flush")

        @contextlib.contextmanager
        def graph(_graph: Any, stream: Any) -> Iterator[None]:
            fake.log.append("capture")
            fake.capturing = True
            try:
                yield
            except Exception:
                fake.spoilt = "Offset increment outside graph capture encountered unexpectedly."
                raise
            finally:
                fake.capturing = False

        def works(*_: Any, **__: Any) -> None:
            if fake.spoilt:
                raise RuntimeError(fake.spoilt)

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": graph,
            "synchronize": works,
            "current_stream": lambda: None,
            "current_device": lambda: 0,
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=50 << 20),
            "reset_peak_memory_stats": lambda: None,
            "memory_allocated": lambda: 1000,
            "max_memory_allocated": lambda: 4000,
            "empty_cache": lambda: None,
            "Stream": lambda: None,
            "stream": lambda _: contextlib.nullcontext(),
        }.items():
            patch(cuda, name, value)
        patch(clock, "torch", SimpleNamespace(cuda=cuda, int8=torch.int8, empty=lambda *_, **__: Flush(), rand=works))
        return self
