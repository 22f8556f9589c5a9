"""What the host costs: its time of a layer, the nodes of a CUDA graph of a whole forward, its share of many texts.

A layer's time is that of launching it, by the CPU time of the thread that launches: the difference of two models with
many and with few layers, of one short sequence, for which the GPU has next to nothing to do. The share is what is left
of the time from strings to vectors when the encoder's is taken off: its forwards alone, their inputs made before.
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
from bench import clock, peers, texts
from bench.attempts import is_error
from bench.bench_model import case_of, make_batch, make_model, make_step
from bench.harness import Bench, Figures
from bench.record import OURS

SDPA = "transformers SDPA"
LAYERS = 4, 12
ROUNDS = 5, 40  # left out, counted
TURNS = {"cpu": 3, "cuda": 10}  # from strings to vectors, of which the first is left out


def _cases(model: str, S: int, dtype: str) -> list[dict[str, Any]]:
    case = case_of(model, "inference", 1, S, "full", dtype)
    return [{"what": "layer", **case, "S": 8}, {"what": "graph", **case}]


def _share_of(model: str, count: int, dtype: str) -> dict[str, Any]:
    return {"what": "share", "model": model, "task": "queries", "texts": count, "dtype": dtype}


SMALLEST = [*_cases("tiny", 16, "float32"), _share_of("tiny", 32, "fp32")]
GOALS = {
    "cuda": [
        *(case for model in ("base", "large") for case in _cases(model, 128, "bfloat16")),
        *(_share_of(model, 1024, "bf16") for model in ("MiniLM", "base")),
    ]
}
CASES = {"cpu": [*_cases("MiniLM", 128, "float32"), _share_of("MiniLM", 1024, "fp32")], "cuda": GOALS["cuda"]}


def test_host(case: dict[str, Any], untimed: Bench) -> None:
    make, unit = {"layer": (_layer, ""), "graph": (_graph, "nodes"), "share": (_share, "%")}[case["what"]]
    names = (OURS, f"{OURS} int8") if case["what"] == "share" else (OURS, SDPA)
    row = untimed.figures("host", case, {name: partial(make, case, untimed, name) for name in names}, unit)
    assert untimed.measure or not any(map(is_error, row.failures.values())), row.failures


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


def _share(case: dict[str, Any], bench: Bench, name: str) -> Figures:
    """Percent of the time that are tokenisation and all else around the encoder."""
    task = texts.TASKS[case["task"]]
    engine: Any = peers.peer(name, case["model"], False, task.max_length, bench.device, case["dtype"])
    engine, items = engine.engine, texts.items(case["task"], case["texts"])
    inputs = [batch.inputs() for batch in engine.batches(engine.tokenize(items))]

    def encoder() -> None:
        with torch.inference_mode():
            for batch in inputs:
                engine.model(**batch)
            if bench.device == "cuda":
                torch.cuda.synchronize()

    steps = {"whole": partial(engine.encode, items), "encoder": encoder}
    timings, _ = clock.cpu_timings(steps, time.perf_counter, 0.0, TURNS[bench.device] - clock.LEFT_BEHIND)
    return Figures(values={name: 100 * (1 - timings["encoder"].median / timings["whole"].median)})
