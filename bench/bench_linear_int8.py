"""A product of int8 with its scales and bias, against PyTorch's own of int8, and against the product in 16 bits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Bench, Inputs, Provider
from bench.record import OURS, Work
from fastbert import functional


def _case(tokens: int, inner: int, outer: int, dtype: str) -> dict[str, Any]:
    return {"pass": "forward", "tokens": tokens, "in": inner, "out": outer, "dtype": dtype}


SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (384, 1536))
SMALLEST = [_case(24, 384, 384, "float32")]
CASES = {
    "cpu": [_case(tokens, 384, 1536, "float32") for tokens in (16, 2048)],
    "cuda": [_case(tokens, *shape, "bfloat16") for tokens in (65536, 16384, 128) for shape in SHAPES],
}


def fast(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    return functional.linear_int8(x, x_scale, weight, weight_scale, bias, out_dtype=bias.dtype)


def eager(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    return (torch._int_mm(x, weight.T) * x_scale[:, None] * weight_scale + bias).to(bias.dtype)


def plain(*tensors: Tensor) -> Tensor:
    """In the dtype of what comes out, from operands that nobody has to convert."""
    *_, bias, x, weight = tensors
    return F.linear(x, weight, bias)


def exact(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, *_: Tensor) -> Tensor:
    return F.linear(x * x_scale[:, None], weight * weight_scale[:, None], bias)


def test_linear_int8(case: dict[str, Any], bench: Bench) -> None:
    M, K, N, dtype = case["tokens"], case["in"], case["out"], getattr(torch, case["dtype"])

    def inputs() -> Inputs:
        x, weight = functional.quantize_rows(torch.randn(M, K)), functional.quantize_rows(torch.randn(N, K) * K**-0.5)
        wide = [(q * scale[:, None]).to(dtype) for q, scale in (x, weight)]
        return Inputs(tuple(t.to(bench.device) for t in (*x, *weight, torch.randn(N).to(dtype), *wide)))

    providers = {OURS: Provider(fast), "PyTorch": Provider(eager), f"PyTorch, {case['dtype']}": Provider(plain)}
    bench.operator("linear_int8", case, providers, inputs, Work(flops=2 * M * N * K), exact=exact)
