"""What launching costs: the host's time of a layer, and the nodes of a CUDA graph of a whole forward.

A layer's time is that of launching it, by the CPU time of the thread that launches: the difference of two models with
many and with few layers, of one short sequence, for which the GPU has next to nothing to do.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastbert
from bench import clock
from bench.bench_model import case_of, make_batch, make_model, make_step
from bench.harness import Bench, Figures
from bench.record import OURS

SDPA = "transformers SDPA"
LAYERS = 4, 12
ROUNDS = 5, 40  # left out, counted


def _cases(model: str, S: int, dtype: str) -> list[dict[str, Any]]:
    case = case_of(model, "inference", 1, S, "full", dtype)
    return [{"what": "layer", **case, "S": 8}, {"what": "graph", **case}]


SMALLEST = _cases("tiny", 16, "float32")
GOALS = {"cuda": [case for model in ("base", "large") for case in _cases(model, 128, "bfloat16")]}
CASES = {"cpu": _cases("MiniLM", 128, "float32"), "cuda": GOALS["cuda"]}


def test_host(case: dict[str, Any], untimed: Bench) -> None:
    make = {"layer": _layer, "graph": _graph}[case["what"]]
    providers = {name: partial(make, case, untimed, name) for name in (OURS, SDPA)}
    row = untimed.figures("host", case, providers, unit="nodes" if case["what"] == "graph" else "")
    assert untimed.measure or not row.failures, row.failures


def _step(case: dict[str, Any], device: str, name: str, layers: int | None = None) -> Callable[[], Any]:
    model = make_model(case, device, layers=layers)
    if name == OURS:
        fastbert.patch(model, strict=True)
    return make_step(case, model, make_batch(case, device))


def _layer(case: dict[str, Any], bench: Bench, name: str) -> Figures:
    few, many = (_step(case, bench.device, name, layers) for layers in LAYERS)
    times = []
    for i in range(sum(ROUNDS)):
        seconds = [_launching(step, bench.device) for step in (few, many)]
        if i >= ROUNDS[0]:
            times.append((seconds[1] - seconds[0]) / (LAYERS[1] - LAYERS[0]))
    return Figures(times)


def _launching(step: Callable[[], Any], device: str) -> float:
    """Seconds of the CPU; on a CPU what is launched is done in them as well."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.thread_time()
    step()
    return time.thread_time() - start


def _graph(case: dict[str, Any], bench: Bench, name: str) -> Figures:
    replay = bench.captured(name, _step(case, bench.device, name))
    if bench.device == "cuda":
        times, how = clock.CudaClock().times(replay, bench.seconds), "graph"
    else:
        _, them = clock.cpu_timings({name: replay}, time.perf_counter, bench.seconds)
        times, how = them[name], "clock"
    return Figures(times, {name: nodes(replay, bench.device)}, how)


def nodes(replay: Callable[[], Any], device: str) -> int:
    """Kernels, copies and fills of a replay, as the profiler sees them; on a CPU operators that call no other."""
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    counts = []
    for _ in range(3):  # its first events are sometimes missing
        with profile(activities=activities) as profiled:
            replay()
            if device == "cuda":
                torch.cuda.synchronize()
        events = [it for it in profiled.events() if it.device_type == kind and not it.is_user_annotation]
        counts.append(len([it for it in events if not it.cpu_children]))
    return int(statistics.median(counts))
