"""Word + position + token type + LayerNorm, forward and backward, against PyTorch's operators one after the other."""

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


def test_embedding(case: dict[str, Any], benchmark: BenchmarkFixture, results: Callable[[Row | None], None]) -> None:
    torch.manual_seed(0)
    T, N = case["tokens"], case["hidden"]
    ids = torch.randint(0, 30522, (T,)), torch.arange(T) % 512, torch.randint(0, 2, (T,))
    tables = torch.randn(30522, N), torch.randn(512, N), torch.randn(2, N)
    norm = torch.randn(2, N).unbind()

    def eager(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        h = F.embedding(ids[0], word) + F.embedding(ids[2], token_type) + F.embedding(ids[1], position)
        return F.layer_norm(h, (N,), weight, bias, 1e-12)

    def fast(word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.embedding(*ids, word, position, token_type, weight, bias)

    steps = [forward_backward(f, *tables, *norm) for f in (eager, fast)]
    results(compare(benchmark, case, *steps, tolerance=1e-5, seconds=0.5))
