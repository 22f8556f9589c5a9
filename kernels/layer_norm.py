r"""Bias + dropout + residual add + LayerNorm, fused.

    h      = dropout(x + x_bias) + residual
    y      = x_hat * weight + bias,   x_hat = (h - mean(h)) * rstd,   rstd = (var(h) + eps)^-1/2
    dh     = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),          g = dy * weight
    dresidual = dh,   dx = dropout(dh),   dx_bias = sum of the rows of dx

y has the residual's dtype, so that a float32 residual stream stays float32 under autocast.
Kept for the backward: x and the residual, which other operators keep too, and two statistics a row.
Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450. Specification: `fastbert.reference.layer_norm`.
Traffic, forward: 3 M N elements with a residual, 2 M N without; statistics are fp32.
The CPU side is PyTorch's own LayerNorm kernel; the CUDA side is the reference until the Triton kernel is in.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu


def _cpu_before_norm(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, dropout_p: float, seed: Tensor | None, stream: int
) -> Tensor:
    wide = reference.accumulator(x)
    h = x if x.dtype == wide else x.to(wide)  # adding in one dtype is several times faster than adding mixed ones
    if x_bias is not None:
        h = h + (x_bias if x_bias.dtype == wide else x_bias.to(wide))
    if dropout_p > 0:
        h = _cpu.dropout_(h.clone() if h is x else h, 0, dropout_p, seed, stream)
    if residual is None:
        return h
    residual = residual if residual.dtype == wide else residual.to(wide)
    return h + residual if h is x else h.add_(residual)


def _cpu_fwd(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _cpu_before_norm(x, x_bias, residual, dropout_p, seed, stream)
    if weight.dtype != h.dtype:
        weight, bias = weight.to(h.dtype), bias.to(h.dtype)
    y, mean, rstd = torch.native_layer_norm(h, h.shape[1:], weight, bias, eps)
    dtype = x.dtype if residual is None else residual.dtype
    return y if y.dtype == dtype else y.to(dtype), mean.view(-1), rstd.view(-1)


def _cpu_bwd(
    dy: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    h = _cpu_before_norm(x, x_bias, residual, dropout_p, seed, stream)
    stats = mean.view(-1, 1), rstd.view(-1, 1)
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.to(h.dtype), h, [h.shape[-1]], *stats, weight.to(h.dtype), weight.to(h.dtype), [True, True, True]
    )
    same = residual is None or (dropout_p == 0 and residual.dtype == x.dtype)
    dresidual = x.new_empty(0) if same or residual is None else dh.to(residual.dtype, copy=True)
    dx = _cpu.dropout_(dh, 0, dropout_p, seed, stream)
    return (
        dx.to(x.dtype),
        dresidual,
        x.new_empty(0) if x_bias is None else dx.sum(0).to(x_bias.dtype),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype),
    )


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
    cpu=_cpu_bwd,
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
    cpu=_cpu_fwd,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
)
