"""How long a first training step takes, with no kernel compiled: what Triton costs a user once on a machine.

In a process that has launched nothing, with an empty cache on disk. transformers' steps go first, so that what cuBLAS
and CUDA take at their first use is not counted.
"""

import importlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastbert
from bench.bench_model import case_of, make_batch, make_model, make_step
from bench.harness import Bench, Figures, NotApplicableError
from bench.record import OURS

SMALLEST = [case_of("tiny", "training", 2, 16, "full", "float32")]
GOALS = {"cuda": [case_of("base", "training", 32, 128, "full", "bfloat16")]}
CASES: dict[str, list[dict[str, Any]]] = {"cpu": [], "cuda": GOALS["cuda"]}


def test_first_step(case: dict[str, Any], untimed: Bench) -> None:
    row = untimed.figures("first_step", case, {OURS: lambda: first_step(case, untimed.device)}, unit="s")
    assert untimed.measure or not row.failures, row.failures


def first_step(case: dict[str, Any], device: str) -> Figures:
    if launched():
        raise NotApplicableError("kernels were launched before: it needs a process of its own")
    model, batch = make_model(case, device), make_batch(case, device)
    step = make_step(case, model, batch)
    values = {f"transformers, {which} step": _seconds(step, device) for which in ("first", "second")}
    fastbert.patch(model, strict=True)
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TRITON_CACHE_DIR=empty):
        # A warm-up that compiles in threads belongs here, as one more value.
        values |= {f"fastbert, {which} step": _seconds(step, device) for which in ("first", "second")}
    return Figures(values=values)


def launched() -> bool:
    """Whether this process has compiled or loaded a kernel of fastbert's."""
    names = (path.stem for path in Path(fastbert.__file__).parent.glob("kernels/*.py"))
    kernels = (it for name in names for it in vars(importlib.import_module(f"fastbert.kernels.{name}")).values())
    return any(cache[0] for kernel in kernels for cache in getattr(kernel, "device_caches", {}).values())


def _seconds(step: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
