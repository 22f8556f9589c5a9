"""A layer's products without a GELU: as the model takes them, and in Triton; its ceiling is the plain product."""

from typing import Any

import torch
import torch.nn.functional as F

from bench.harness import Bench, Inputs, NotApplicableError, Provider
from bench.record import OURS, Work
from fastbert import functional
from fastbert.kernels.linear import linear_fwd


def _case(tokens: int, inner: int, outer: int, dtype: str) -> dict[str, Any]:
    return {"pass": "forward", "tokens": tokens, "in": inner, "out": outer, "dtype": dtype}


SHAPES = ((768, 2304), (1024, 3072), (768, 768), (1024, 1024), (3072, 768), (4096, 1024))
SMALLEST = [_case(7, 384, 384, "float32")]
CASES = {
    "cpu": [_case(2048, 384, outer, "float32") for outer in (384, 1152)],
    "cuda": [_case(tokens, *shape, "bfloat16") for tokens in (65536, 16384) for shape in SHAPES],
}


def in_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if x.device.type != "cuda":
        raise NotApplicableError("needs a GPU")
    return linear_fwd(x, weight, bias)


def test_linear(case: dict[str, Any], bench: Bench) -> None:
    M, K, N, dtype = case["tokens"], case["in"], case["out"], getattr(torch, case["dtype"])

    def inputs() -> Inputs:
        leaves = torch.randn(M, K), torch.randn(N, K) * K**-0.5, torch.randn(N)
        return Inputs(tuple(t.to(bench.device, dtype) for t in leaves))

    providers = {
        OURS: Provider(functional.linear),
        f"{OURS} in Triton": Provider(in_triton),
        "PyTorch": Provider(F.linear),
    }
    work = Work(flops=2 * M * N * K, products=(("forward", M, K, N),))
    bench.operator("linear", case, providers, inputs, work, exact=F.linear)
