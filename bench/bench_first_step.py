"""How long a first training step takes, with no kernel compiled: what Triton costs a user once on a machine.

In a process of its own, which has launched nothing, with an empty cache on disk. transformers' steps go first, so that
what cuBLAS and CUDA take at their first use is not counted.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch

import fastbert
from bench.bench_model import case_of, make_batch, make_model, make_step
from bench.harness import Bench, Figures
from bench.record import OURS

SMALLEST = [case_of("tiny", "training", 2, 16, "full", "float32")]
GOALS = {"cuda": [case_of("base", "training", 32, 128, "full", "bfloat16")]}
CASES: dict[str, list[dict[str, Any]]] = {"cpu": [], "cuda": GOALS["cuda"]}


def test_first_step(case: dict[str, Any], untimed: Bench) -> None:
    def measured() -> Figures:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return Figures(values=process.submit(first_step, case, untimed.device).result())

    row = untimed.figures("first_step", case, {OURS: measured}, unit="s")
    assert untimed.measure or not row.failures, row.failures


def first_step(case: dict[str, Any], device: str) -> dict[str, float]:
    model, batch = make_model(case, device), make_batch(case, device)
    step = make_step(case, model, batch)
    values = {f"transformers, {which} step": _seconds(step, device) for which in ("first", "second")}
    fastbert.patch(model, strict=True)
    with tempfile.TemporaryDirectory() as empty, mock.patch.dict(os.environ, TRITON_CACHE_DIR=empty):
        # A warm-up that compiles in threads belongs here, as one more value.
        values |= {f"fastbert, {which} step": _seconds(step, device) for which in ("first", "second")}
    return values


def _seconds(step: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
