"""Linear + bias + GELU, and the whole feed-forward; their ceiling is the plain products."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Bench, Inputs, Provider, compiled
from bench.record import OURS, Work
from fastbert import functional


def _case(pass_: str, tokens: int, hidden: int, dtype: str) -> dict[str, Any]:
    return {"pass": pass_, "tokens": tokens, "hidden": hidden, "dtype": dtype}


PASSES = ("forward", "backward")
SMALLEST = [_case(pass_, 7, 384, "float32") for pass_ in PASSES]
GOALS = {"cuda": [_case(p, 16384, N, "bfloat16") for N in (768, 1024) for p in PASSES]}
CASES = {
    "cpu": [_case(p, 2048, N, dtype) for dtype in ("float32", "bfloat16") for N in (384, 768) for p in PASSES],
    "cuda": [
        _case(p, tokens, N, dtype)
        for dtype in ("bfloat16", "float16")
        for tokens in (16384, 65536)
        for N in (768, 1024)
        for p in PASSES
    ],
}


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def test_linear_gelu(case: dict[str, Any], bench: Bench) -> None:
    M, K, dtype = case["tokens"], case["hidden"], getattr(torch, case["dtype"])
    N = 4 * K

    def inputs() -> Inputs:
        leaves = torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.randn(N)
        return Inputs(tuple(t.to(bench.device, dtype) for t in leaves))

    providers = {OURS: Provider(functional.linear_gelu), "PyTorch": Provider(eager)}
    if bench.compiles:
        providers["torch.compile"] = Provider(compiled(eager, dynamic=False))
    passes = _passes(case)
    work = Work(flops=2 * M * N * K * len(passes), products=tuple((name, M, K, N) for name in passes))
    bench.operator("ffn", case, providers, inputs, work, exact=eager)


def _passes(case: dict[str, Any]) -> tuple[str, ...]:
    return ("forward",) if case["pass"] == "forward" else ("dgrad", "wgrad")


def both_products(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor) -> Tensor:
    return F.linear(eager(x, weight, bias), out_weight)


def test_feed_forward(case: dict[str, Any], bench: Bench) -> None:
    M, K, dtype = case["tokens"], case["hidden"], getattr(torch, case["dtype"])
    N = 4 * K

    def inputs() -> Inputs:
        leaves = torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.randn(N), torch.randn(K, N) * N**-0.5
        return Inputs(tuple(t.to(bench.device, dtype) for t in leaves))

    providers = {OURS: Provider(functional.feed_forward), "PyTorch": Provider(both_products)}
    if bench.compiles:
        providers["torch.compile"] = Provider(compiled(both_products, dynamic=False))
    passes = _passes(case)
    products = tuple((name, M, *shape) for shape in ((K, N), (N, K)) for name in passes)
    work = Work(flops=4 * M * N * K * len(passes), products=products)
    bench.operator("feed_forward", case, providers, inputs, work, exact=both_products)
