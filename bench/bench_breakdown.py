"""Where a step's time goes, from PyTorch's profiler: matrix products, attention, the rest, and gaps.

On a GPU a part is the time of its kernels, and a gap is when none runs. On a CPU a part is the time of its operators
without those that they call, but attention with all of its own, and a gap is what is left of the wall clock: Python.
"""

import re
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fastbert
from bench.bench_model import case_of, make_batch, make_model, make_step
from bench.harness import Bench, Figures
from bench.record import OURS
from fastbert import prepared

STEPS = 3
IN_ONE = "all layers in one call"
PARTS = {  # by names of kernels and operators; the first that matches counts
    IN_ONE: re.escape(prepared.NAME),
    "cross-entropy": r"nll_loss|cross_entropy|log_softmax|rescale",
    "attention": r"attention|flash|fmha|sdpa|softmax",
    "LayerNorm": r"layer_?norm|GammaBeta|_sum_partials",
    "GELU": r"gelu",
    "embedding": r"embedding|radix|sort",
    "optimizer": r"adam|optimizer|multi_tensor",
    "dropout": r"dropout|bernoulli",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|\bmm\b|addmm|bmm|matmul|linear",
}
GAPS, OTHER = "gaps", "other"


def _cases(*cases: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**case, "provider": provider} for case in cases for provider in (OURS, "transformers SDPA")]


SMALLEST = _cases(
    case_of("tiny", "inference", 2, 16, "wikipedia", "float32"),
    case_of("tiny", "training", 2, 16, "full", "float32"),
    case_of("tiny albert", "training", 2, 16, "wikipedia", "float32"),
)
GOALS = {
    "cuda": _cases(
        case_of("large", "training", 64, 512, "wikipedia", "bfloat16"),
        case_of("base", "training", 256, 128, "full", "bfloat16"),
        case_of("large", "inference", 256, 128, "full", "bfloat16"),
        case_of("base", "inference", 1, 128, "full", "bfloat16"),
    )
}
CASES = {
    "cpu": _cases(
        case_of("MiniLM", "inference", 16, 384, "squad", "float32"),
        case_of("MiniLM", "training", 8, 512, "wikipedia", "float32"),
    ),
    "cuda": GOALS["cuda"],
}


def test_breakdown(case: dict[str, Any], untimed: Bench) -> None:
    def parts() -> Figures:
        model = make_model(case, untimed.device)
        if case["provider"] == OURS:
            fastbert.patch(model, strict=True)
        step = make_step(case, model, make_batch(case, untimed.device))
        found = on_gpu(step) if untimed.device == "cuda" else on_cpu(step)
        assert found["matrix products"] + found[IN_ONE] > 0, f"no matrix product among {found}"
        return Figures(values=found)

    row = untimed.figures("breakdown", case, {case["provider"]: parts}, unit="s")
    assert untimed.measure or not row.failures, row.failures


def on_cpu(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each part of a step."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wall = time.perf_counter() - start
    events = [event for event in profiled.events() if event.device_type == DeviceType.CPU]
    parts = _parts((_within_attention(event) or event.name, event.self_cpu_time_total * 1e-6) for event in events)
    parts[GAPS] = max(0.0, wall - sum(parts.values()))
    return {part: seconds / STEPS for part, seconds in parts.items()}


def _within_attention(event: Any) -> str | None:
    """The attention operator that called this one, whichever products and sums it is made of."""
    caller = event.cpu_parent
    while caller is not None:
        if part_of(caller.name) == "attention":
            return str(caller.name)
        caller = caller.cpu_parent
    return None


def on_gpu(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds of each part of a step."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    return parts_of_kernels(profiled.events())


def parts_of_kernels(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of each part of one of STEPS, from the profiler's events: those of kernels, without annotations."""
    kernels = [it for it in events if it.device_type == DeviceType.CUDA and not it.is_user_annotation]
    parts = _parts((it.name, it.time_range.elapsed_us() * 1e-6) for it in kernels)
    parts[GAPS] = idle([(it.time_range.start, it.time_range.end) for it in kernels]) * 1e-6
    return {part: seconds / STEPS for part, seconds in parts.items()}


def idle(intervals: Iterable[tuple[float, float]]) -> float:
    """How long none of them runs, between the first start and the last end."""
    ordered = sorted(intervals)
    end, gaps = ordered[0][0] if ordered else 0.0, 0.0
    for start, stop in ordered:
        gaps += max(0.0, start - end)
        end = max(end, stop)
    return gaps


@cache
def part_of(name: str) -> str:
    """Which part of a step a kernel or an operator belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _parts(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    parts = dict.fromkeys((*PARTS, OTHER), 0.0)
    for name, seconds in times:
        parts[part_of(name)] += seconds
    return parts
