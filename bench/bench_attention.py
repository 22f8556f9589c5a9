"""Packed attention against PyTorch's backends, which pad it, and those that pack it too."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Bench, Inputs, Provider, compiled
from bench.record import OURS, Work
from bench.rivals import flash_attention, math_attention, padded_attention, sdpa_backends, varlen_attention
from bench.shapes import MAXIMA, tokens_of
from fastbert import functional
from fastbert.packing import Packing


def _case(
    pass_: str, tokens: int, heads: int, head_dim: int, lengths: str, dtype: str, dropout: float
) -> dict[str, Any]:
    return {
        "pass": pass_,
        "tokens": tokens,
        "heads": heads,
        "head_dim": head_dim,
        "lengths": lengths,
        "dtype": dtype,
        "dropout": dropout,
    }


PASSES = ("forward", "backward")
LENGTHS = ("128", "512", "wikipedia", "squad", "384", "256", "64")
SMALLEST = [_case(pass_, 40, 2, 32, "8", "float32", dropout) for pass_ in PASSES for dropout in (0.0, 0.1)] + [
    _case(pass_, 300, 2, 32, "wikipedia", "float32", 0.0) for pass_ in PASSES
]
GOALS = {
    "cuda": [
        _case(p, 65536, 16, 64, lengths, "bfloat16", dropout)
        for lengths in ("512", "128", "wikipedia")
        for dropout in (0.0, 0.1)
        for p in PASSES
    ]
}
CASES = {
    "cpu": [
        _case(p, 2048, 12, head_dim, lengths, "float32", 0.0)
        for head_dim, lengths in ((32, "128"), (64, "512"), (64, "wikipedia"), (64, "squad"))
        for p in PASSES
    ]
    + [_case(p, 2048, 12, 64, "wikipedia", "bfloat16", 0.0) for p in PASSES]
    + [_case(p, 2048, 12, 64, "wikipedia", "float32", 0.1) for p in PASSES],
    "cuda": [
        _case(p, tokens, heads, 64, lengths, dtype, dropout)
        for dtype in ("bfloat16", "float16")
        for tokens in (65536, 16384)
        for heads in (16, 12)
        for lengths in LENGTHS
        for dropout in (0.0, 0.1)
        for p in PASSES
    ]
    + [_case(p, 65536, 12, 32, lengths, "bfloat16", 0.0) for lengths in ("128", "squad") for p in PASSES],
}


def _fast(q: Tensor, k: Tensor, v: Tensor, *, packing: Packing, dropout_p: float) -> Tensor:
    return functional.attention(q, k, v, packing.cu_seqlens, packing.max_seqlen, dropout_p=dropout_p)


def _providers(bench: Bench, packing: Packing, dropout_p: float) -> dict[str, Provider]:
    eager = partial(math_attention, dropout_p=dropout_p)
    providers = {"PyTorch": padded_attention(packing, eager)}
    providers |= sdpa_backends(packing, dropout_p, bench.device)
    if bench.compiles:
        providers["torch.compile"] = padded_attention(packing, compiled(eager, dynamic=False))
    if bench.device == "cuda":
        providers["varlen_attn"] = Provider(partial(varlen_attention, packing=packing, dropout_p=dropout_p))
        providers["flash-attn"] = Provider(partial(flash_attention, packing=packing, dropout_p=dropout_p))
    return {OURS: Provider(partial(_fast, packing=packing, dropout_p=dropout_p))} | providers


def test_attention(case: dict[str, Any], bench: Bench) -> None:
    H, D, dtype = case["heads"], case["head_dim"], getattr(torch, case["dtype"])
    seqlens = tokens_of(case["lengths"], case["tokens"])
    packing = Packing.from_lengths(seqlens, MAXIMA.get(case["lengths"]), device=bench.device)
    T = packing.tokens
    scores = sum(n * n for n in seqlens)
    # forward: q, k, v, o; backward: those, do, dq, dk, dv
    tensors, products = (4, 2) if case["pass"] == "forward" else (8, 5)
    bench.operator(
        "attention",
        case,
        _providers(bench, packing, case["dropout"]),
        lambda: Inputs(torch.randn(3, T, H, D, device=bench.device).to(dtype).unbind()),
        Work(bytes=tensors * T * H * D * dtype.itemsize, flops=2 * products * H * D * scores),
        exact=_exact(packing),
        check=_providers(bench, packing, 0.0),
    )


def _exact(packing: Packing) -> Any:
    """Padded, in plain PyTorch, packed again."""
    provider = padded_attention(packing, partial(math_attention, dropout_p=0.0))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return provider.finish(provider.function(*(provider.prepare(t) for t in (q, k, v))))

    return attend
