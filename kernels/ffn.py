r"""Linear + bias + GELU, the first half of the feed-forward.

    y    = gelu(pre),   pre = x weight^T + bias,   gelu(z) = z Phi(z), or its tanh approximation
    dpre = dy * gelu'(pre),   dbias = sum of the rows of dpre,   dx = dpre weight,   dweight = dpre^T x

Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415. Specification: `fastbert.reference.linear_gelu`.
Arithmetic, forward: 2 M N K flops. Kept for the backward: x and pre.
The products are PyTorch's. The CUDA side is the reference until the Triton kernel is in.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu

gelu_bwd = _library.define(
    "gelu_bwd(Tensor dy, Tensor pre, str approximate) -> (Tensor dpre, Tensor dbias)",
    cuda=reference.gelu_backward,
    cpu=_cpu.gelu_backward,
    fake=lambda dy, pre, approximate: (pre.new_empty(pre.shape), pre.new_empty(pre.shape[1])),
)


def _fake_fwd(x: Tensor, weight: Tensor, bias: Any, approximate: Any, keep_pre: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep_pre else x.new_empty(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _bias, ctx.approximate, _keep_pre = inputs
    _y, pre = output
    ctx.save_for_backward(x, weight, pre)
    ctx.mark_non_differentiable(pre)


def _backward(ctx: Any, dy: Tensor, _dpre: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, pre = ctx.saved_tensors
    dpre, dbias = gelu_bwd(dy, pre, ctx.approximate)
    dx = dpre @ weight if ctx.needs_input_grad[0] else None
    dweight = dpre.T @ x if ctx.needs_input_grad[1] else None
    return dx, dweight, dbias, None, None


linear_gelu_fwd = _library.define(
    "linear_gelu_fwd(Tensor x, Tensor weight, Tensor bias, str approximate, bool keep_pre) -> (Tensor y, Tensor pre)",
    cuda=reference.linear_gelu,
    cpu=reference.linear_gelu,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
    flops=lambda x, weight, *_: 2 * x.shape[0] * weight.numel(),
)
