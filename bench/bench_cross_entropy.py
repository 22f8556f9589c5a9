"""Vocabulary projection + cross-entropy of labelled rows, forward and backward, against PyTorch's on all rows."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.harness import Row, compare
from bench.operators import forward_backward
from fastbert import functional

CASES = [{"tokens": tokens, "hidden": 384, "vocabulary": 30522, "labelled": 0.15} for tokens in (512, 1024)]
SMALLEST = [{"tokens": 40, "hidden": 384, "vocabulary": 591, "labelled": 0.15}]


def test_linear_cross_entropy(
    case: dict[str, Any], benchmark: BenchmarkFixture, results: Callable[[Row | None], None]
) -> None:
    torch.manual_seed(0)
    M, N, V = case["tokens"], case["hidden"], case["vocabulary"]
    leaves = torch.randn(M, N), torch.randn(V, N) * N**-0.5, torch.randn(V)
    labels = torch.where(torch.rand(M) < case["labelled"], torch.randint(0, V, (M,)), -100)
    rows = (labels != -100).nonzero().squeeze(-1)

    def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), labels)

    def fast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x[rows], weight, bias, labels[rows])

    results(
        compare(benchmark, case, *(forward_backward(f, *leaves) for f in (eager, fast)), tolerance=1e-4, seconds=1.0)
    )
