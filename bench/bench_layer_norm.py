"""Bias + dropout + residual + LayerNorm."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Bench, Inputs, Provider, compiled
from bench.record import OURS, Work
from bench.rivals import liger_layer_norm
from fastbert import functional


def _case(pass_: str, tokens: int, hidden: int, dtype: str, dropout: float) -> dict[str, Any]:
    return {"pass": pass_, "tokens": tokens, "hidden": hidden, "dtype": dtype, "dropout": dropout}


PASSES = ("forward", "backward")
SMALLEST = [_case(pass_, 7, 384, "float32", dropout) for pass_ in PASSES for dropout in (0.0, 0.1)]
GOALS = {
    "cuda": [_case(p, 65536, N, "bfloat16", d) for N in (768, 1024) for p, d in (("forward", 0.1), ("backward", 0.1))]
}
CASES = {
    "cpu": [_case(p, 8192, N, dtype, 0.0) for dtype in ("float32", "bfloat16") for N in (384, 768) for p in PASSES]
    + [_case(p, 8192, 768, "float32", 0.1) for p in PASSES],
    "cuda": [
        _case(p, tokens, N, dtype, dropout)
        for dtype in ("bfloat16", "float16")
        for tokens in (65536, 16384)
        for N in (768, 1024)
        for dropout in (0.1, 0.0)
        for p in PASSES
    ],
}


def eager(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float) -> Tensor:
    h = x + x_bias
    h = (F.dropout(h, dropout_p) if dropout_p else h) + residual
    return F.layer_norm(h, (x.shape[-1],), weight, bias, 1e-12)


def fast(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float) -> Tensor:
    return functional.layer_norm(x, weight, bias, residual=residual, x_bias=x_bias, dropout_p=dropout_p)


def _providers(bench: Bench, dropout_p: float) -> dict[str, Provider]:
    providers = {"PyTorch": Provider(partial(eager, dropout_p=dropout_p))}
    if bench.compiles:
        providers["torch.compile"] = Provider(compiled(partial(eager, dropout_p=dropout_p), dynamic=False))
    if bench.device == "cuda":
        providers["Liger"] = Provider(partial(liger_layer_norm, dropout_p=dropout_p))
    return providers | {OURS: Provider(partial(fast, dropout_p=dropout_p))}


def test_layer_norm(case: dict[str, Any], bench: Bench) -> None:
    M, N, dtype = case["tokens"], case["hidden"], getattr(torch, case["dtype"])

    def inputs() -> Inputs:
        rows = torch.randn(2, M, N, device=bench.device).to(dtype).unbind()
        return Inputs((*rows, *torch.randn(3, N, device=bench.device).to(dtype).unbind()))

    # forward: x, residual, y; backward: dy, x, residual, dx and, where dropout makes it another one, dresidual
    tensors = 3 if case["pass"] == "forward" else 5 if case["dropout"] else 4
    bench.operator(
        "layer_norm",
        case,
        _providers(bench, case["dropout"]),
        inputs,
        Work(bytes=tensors * M * N * dtype.itemsize),
        exact=partial(eager, dropout_p=0.0),
        check=_providers(bench, 0.0),
    )
