r"""Linear + bias as a Triton product, for the products of a layer that have no GELU behind them.

    y = x weight^T + bias
    dx = dy weight,   dweight = dy^T x,   dbias = sum of the rows of dy

Not the default: `fastbert.functional.linear` comes here only where `_product.TILES` says that this was measured to be
faster than cuBLAS. The backward's products are PyTorch's. Kept for it: x. Specification: `fastbert.reference.linear`.
Arithmetic, forward: 2 M N K flops.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _launch, _product


def _launch_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float64:
        return reference.linear(x, weight, bias)
    tiles = _product.tiles_for(x, weight, None) or _product.default_tiles(x.dtype, _launch.chip(x.device))
    return _product.launch(x, weight, bias, None, False, tiles)[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = dy @ weight if ctx.needs_input_grad[0] else None
    dweight = dy.T @ x if ctx.needs_input_grad[1] else None
    dbias = dy.sum(0, dtype=reference.accumulator(dy)).to(dy.dtype) if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias


linear_fwd = _library.define(
    "linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cuda=_launch_fwd,
    cpu=reference.linear,
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    setup_context=_save,
    backward=_backward,
    flops=lambda x, weight, *_: 2 * x.shape[0] * weight.numel(),
)
