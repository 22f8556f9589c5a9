"""Rows as int8: alone, behind the GELU of a feed-forward, and behind a LayerNorm with bias and residual."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Bench, Inputs, Provider, compiled
from bench.record import OURS, Work
from fastbert import functional


def _case(what: str, tokens: int, features: int) -> dict[str, Any]:
    return {"what": what, "pass": "forward", "tokens": tokens, "features": features, "dtype": "bfloat16"}


SMALLEST = [_case(what, 7, 96) for what in ("rows", "gelu", "layer_norm")]
CASES = {
    "cpu": [_case("rows", 2048, 384), _case("gelu", 2048, 1536), _case("layer_norm", 2048, 384)],
    "cuda": [
        _case(what, 65536, N * factor)
        for N in (768, 1024)
        for what, factor in (("rows", 1), ("gelu", 4), ("layer_norm", 1))
    ],
}


def _rounded(h: Tensor) -> Tensor:
    return (h * (127 / h.abs().amax(-1, keepdim=True))).round().clamp(-127, 127)  # 16 bits round 127 up


def eager_rows(x: Tensor) -> Tensor:
    return _rounded(x).to(torch.int8)


def eager_gelu(x: Tensor) -> Tensor:
    return _rounded(F.gelu(x)).to(torch.int8)


def eager_layer_norm(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _rounded(F.layer_norm(x + x_bias + residual, (x.shape[-1],), weight, bias, 1e-12)).to(torch.int8)


def fast_layer_norm(x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm_int8(x, weight, bias, residual=residual, x_bias=x_bias)[1]


EAGER: dict[str, Callable[..., Tensor]] = {"rows": eager_rows, "gelu": eager_gelu, "layer_norm": eager_layer_norm}
FAST: dict[str, Callable[..., Tensor]] = {
    "rows": lambda x: functional.quantize_rows(x)[0],
    "gelu": lambda x: functional.quantize_rows(x, gelu="none")[0],
    "layer_norm": fast_layer_norm,
}


def test_quantize(case: dict[str, Any], bench: Bench) -> None:
    what, M, N, dtype = case["what"], case["tokens"], case["features"], getattr(torch, case["dtype"])

    def inputs() -> Inputs:
        rows = torch.randn(2, M, N, device=bench.device).to(dtype).unbind()
        vectors = torch.randn(3, N, device=bench.device).to(dtype).unbind()
        return Inputs((*rows, *vectors) if what == "layer_norm" else rows[:1])

    providers = {OURS: Provider(FAST[what]), "PyTorch": Provider(EAGER[what])}
    if bench.compiles:
        providers["torch.compile"] = Provider(compiled(EAGER[what], dynamic=False))
    work = Work(bytes=(7 if what == "layer_norm" else 3) * M * N)
    bench.operator("quantize", case, providers, inputs, work, exact=lambda *leaves: EAGER[what](*leaves).float())
