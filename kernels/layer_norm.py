r"""Bias + dropout + residual add + LayerNorm, fused.

    h      = dropout(x + x_bias) + residual
    y      = x_hat * weight + bias,   x_hat = (h - mean(h)) * rstd,   rstd = (var(h) + eps)^-1/2
    dh     = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),          g = dy * weight
    dresidual = dh,   dx = dropout(dh),   dx_bias = sum of the rows of dx

y has the residual's dtype, so that a float32 residual stream stays float32 under autocast.
Kept for the backward: x and the residual, which other operators keep too, and two statistics a row.
Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450. Specification: `fastbert.reference.layer_norm`.
Traffic, forward: 3 M N elements with a residual, 2 M N without; statistics are fp32.
"""

from typing import Any

from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu


def _fake_fwd(x: Tensor, x_bias: Any, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    M = x.shape[0]
    statistics = reference.accumulator(x)
    y = x.new_empty(x.shape, dtype=x.dtype if residual is None else residual.dtype)
    return y, x.new_empty(M, dtype=statistics), x.new_empty(M, dtype=statistics)


def _fake_bwd(
    dy: Tensor, x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dropout_p = rest[2]
    same = residual is None or (dropout_p == 0 and residual.dtype == x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(0) if same or residual is None else residual.new_empty(x.shape),
        x.new_empty(0) if x_bias is None else x_bias.new_empty(x_bias.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    )


layer_norm_bwd = _library.define(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor mean, Tensor rstd,"
    " float dropout_p, Tensor? seed, int stream)"
    " -> (Tensor dx, Tensor dresidual, Tensor dx_bias, Tensor dweight, Tensor dbias)",
    cuda=reference.layer_norm_backward,
    cpu=_cpu.layer_norm_backward,
    fake=_fake_bwd,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x_bias, residual, weight, _bias, _eps, ctx.dropout_p, seed, ctx.stream = inputs
    _y, mean, rstd = output
    ctx.save_for_backward(x, x_bias, residual, weight, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    dx, dresidual, dx_bias, dweight, dbias = layer_norm_bwd(dy, *tensors, ctx.dropout_p, seed, ctx.stream)
    _x, x_bias, residual, *_ = tensors
    if residual is None:
        dresidual = None
    elif dresidual.numel() == 0:
        dresidual = dx
    return dx, None if x_bias is None else dx_bias, dresidual, dweight, dbias, None, None, None, None


layer_norm_fwd = _library.define(
    "layer_norm_fwd(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps,"
    " float dropout_p, Tensor? seed, int stream) -> (Tensor y, Tensor mean, Tensor rstd)",
    cuda=reference.layer_norm,
    cpu=_cpu.layer_norm,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
)
