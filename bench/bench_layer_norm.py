"""Bias + residual + LayerNorm, forward and backward, against PyTorch's operators one after the other."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.harness import Row, compare
from bench.operators import forward_backward
from fastbert import functional

CASES = [{"tokens": tokens, "hidden": hidden} for tokens in (512, 4096) for hidden in (384, 768)]
SMALLEST = [{"tokens": 7, "hidden": 384}]


def test_layer_norm(case: dict[str, Any], benchmark: BenchmarkFixture, results: Callable[[Row | None], None]) -> None:
    torch.manual_seed(0)
    M, N = case["tokens"], case["hidden"]
    x, residual = torch.randn(2, M, N)
    x_bias, weight, bias = torch.randn(3, N)

    def eager(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + x_bias + residual, (N,), weight, bias, 1e-12)

    def fast(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, weight, bias, residual=residual, x_bias=x_bias)

    steps = [forward_backward(f, x, residual, x_bias, weight, bias) for f in (eager, fast)]
    results(compare(benchmark, case, *steps, tolerance=1e-5, seconds=0.5))
