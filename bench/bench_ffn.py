"""Linear + bias + GELU, forward and backward, against PyTorch's operators one after the other."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.harness import Row, compare
from bench.operators import forward_backward
from fastbert import functional

CASES = [
    {"tokens": tokens, "hidden": hidden, "dtype": dtype}
    for tokens in (512, 2048)
    for hidden in (384, 768)
    for dtype in ("float32", "bfloat16")
]
SMALLEST = [{"tokens": 7, "hidden": 384, "dtype": "float32"}]


def test_linear_gelu(case: dict[str, Any], benchmark: BenchmarkFixture, results: Callable[[Row | None], None]) -> None:
    torch.manual_seed(0)
    M, K, dtype = case["tokens"], case["hidden"], getattr(torch, case["dtype"])
    leaves = [t.to(dtype) for t in (torch.randn(M, K), torch.randn(4 * K, K) * K**-0.5, torch.randn(4 * K))]

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    steps = [forward_backward(f, *leaves) for f in (eager, functional.linear_gelu)]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    results(compare(benchmark, case, *steps, tolerance=tolerance, seconds=0.5))
