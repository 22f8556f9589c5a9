"""Packed attention, forward and backward, against SDPA on the padded batch with a mask."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.harness import Row, compare
from bench.operators import forward_backward
from fastbert import functional
from fastbert.packing import Packing

HEADS = 12
CASES = [
    {"S": S, "padding": padding, "head_dim": D} for S in (128, 512) for padding in ("half", "none") for D in (32, 64)
]
SMALLEST = [{"S": 16, "padding": "half", "head_dim": 32}]


def test_attention(case: dict[str, Any], benchmark: BenchmarkFixture, results: Callable[[Row | None], None]) -> None:
    torch.manual_seed(0)
    B, S, D = 8, case["S"], case["head_dim"]
    lengths = torch.linspace(1, S, B).round().long() if case["padding"] == "half" else torch.full((B,), S)
    packing = Packing.from_lengths(lengths, S)
    mask = None if case["padding"] == "none" else (torch.arange(S) < lengths[:, None])[:, None, None]
    q, k, v = torch.randn(3, packing.tokens, HEADS, D).unbind()
    padded = [packing.unpack(t) for t in (q, k, v)]

    def sdpa(*qkv: Tensor) -> Tensor:
        o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv), attn_mask=mask)
        return packing.pack(o.transpose(1, 2))

    def fast(*qkv: Tensor) -> Tensor:
        return functional.attention(*qkv, packing.cu_seqlens, packing.max_seqlen)

    baseline = forward_backward(sdpa, *padded)
    results(
        compare(
            benchmark,
            case,
            lambda: packing.pack(baseline()),
            forward_backward(fast, q, k, v),
            tolerance=1e-4,
            seconds=0.5,
        )
    )
