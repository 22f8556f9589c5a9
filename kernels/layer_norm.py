r"""Bias + dropout + residual add + LayerNorm, fused.

    h      = dropout(x + x_bias) + residual
    y      = x_hat * weight + bias,   x_hat = (h - mean(h)) * rstd,   rstd = (var(h) + eps)^-1/2
    dh     = rstd * (g - mean(g) - x_hat * mean(g * x_hat)),          g = dy * weight
    dresidual = dh,   dx = dropout(dh),   dx_bias = sum of the rows of dx

y has the residual's dtype, so that a float32 residual stream stays float32 under autocast.
Kept for the backward: x and the residual, which other operators keep too, and two statistics a row.
Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450. Specification: `fastbert.reference.layer_norm`.
Traffic, forward: 3 M N elements with a residual, 2 M N without; backward: 4 M N, or 5 M N where dresidual is not dx.
Statistics are fp32. The backward walks the rows with a few programs on each multiprocessor, which keep the sums over
rows in registers; a second kernel adds theirs up in one order.

Chosen by what it compiles to (`make codegen`, bench/results/codegen.md), for nothing here has been timed yet. At 768
features in bf16, all loads and stores of activations are 16 bytes wide and a row is one warp's own: no shared memory,
no barrier. Two rows a program cost 17 instructions an element (30 with dropout), one row 20 (31); four rows save two
more, but take 142 registers instead of 76.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _launch
from fastbert.kernels._device import keep_features
from fastbert.kernels._norm import (
    input_gradient,
    load_rows,
    load_vector,
    normalise,
    parts,
    programs_and_warps,
    rows_and_warps,
    store_partial,
    store_rows,
    sum_partials,
    x_hat_of,
)
from fastbert.kernels._triton import tl, triton


@triton.jit
def _before_norm(
    x_ptr, x_bias_ptr, residual_ptr, numbers, rows, in_rows, stride_xm, stride_rm, seed, stream, keep_scale,
    THRESHOLD: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One part of h, and its dropout mask, which goes by the rows' numbers."""
    h = load_rows(x_ptr, rows, in_rows, stride_xm, N, FIRST, COLS)
    if x_bias_ptr is not None:
        h += load_vector(x_bias_ptr, N, FIRST, COLS)
    keep = h
    if THRESHOLD > 0:
        keep = keep_features(seed, numbers, FIRST, stream, THRESHOLD, COLS)
        h = tl.where(keep, h * keep_scale, 0.0)
    if residual_ptr is not None:
        h += load_rows(residual_ptr, rows, in_rows, stride_rm, N, FIRST, COLS)
    return h, keep


@triton.jit
def _numbers(numbers_ptr, rows, in_rows, THRESHOLD: tl.constexpr):
    numbers = rows
    if numbers_ptr is not None:
        if THRESHOLD > 0:
            numbers = tl.load(numbers_ptr + rows, mask=in_rows, other=0)
    return numbers


@triton.jit(do_not_specialize=["M", "stream"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (M, N)
    x_bias_ptr,  # (N,), or None
    residual_ptr,  # (M, N), or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    seed_ptr,  # () int64, or None
    numbers_ptr,  # (M,) int64, the rows' numbers for dropout; None for 0, 1, ...
    y_ptr,  # (M, N)   out
    mean_ptr,  # (M,)  out, fp32
    rstd_ptr,  # (M,)  out, fp32
    stride_xm: tl.constexpr,
    stride_rm: tl.constexpr,
    stride_ym: tl.constexpr,
    M,
    eps,
    keep_scale,
    stream,
    THRESHOLD: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,  # per program
    COLS0: tl.constexpr,
    COLS1: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # int64: row * stride may pass 2^31
    in_rows = rows < M
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    numbers = _numbers(numbers_ptr, rows, in_rows, THRESHOLD)
    h0, _ = _before_norm(
        x_ptr, x_bias_ptr, residual_ptr, numbers, rows, in_rows, stride_xm, stride_rm, seed, stream, keep_scale,
        THRESHOLD, N, 0, COLS0,
    )  # fmt: skip
    h1 = h0
    if COLS1 > 0:
        h1, _ = _before_norm(
            x_ptr, x_bias_ptr, residual_ptr, numbers, rows, in_rows, stride_xm, stride_rm, seed, stream, keep_scale,
            THRESHOLD, N, COLS0, COLS1,
        )  # fmt: skip
    x0, x1, mean, rstd = normalise(h0, h1, eps, N, COLS0, COLS1)
    y0 = x0 * load_vector(weight_ptr, N, 0, COLS0) + load_vector(bias_ptr, N, 0, COLS0)
    store_rows(y_ptr, y0, rows, in_rows, stride_ym, N, 0, COLS0)
    if COLS1 > 0:
        y1 = x1 * load_vector(weight_ptr, N, COLS0, COLS1) + load_vector(bias_ptr, N, COLS0, COLS1)
        store_rows(y_ptr, y1, rows, in_rows, stride_ym, N, COLS0, COLS1)
    tl.store(mean_ptr + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)


@triton.jit(do_not_specialize=["M", "programs", "stream"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (M, N)
    x_ptr,  # (M, N)
    x_bias_ptr,  # (N,), or None
    residual_ptr,  # (M, N), or None
    weight_ptr,  # (N,)
    mean_ptr,  # (M,) fp32
    rstd_ptr,  # (M,) fp32
    seed_ptr,  # () int64, or None
    numbers_ptr,  # (M,) int64, the rows' numbers for dropout; None for 0, 1, ...
    dx_ptr,  # (M, N)         out
    dresidual_ptr,  # (M, N)  out, or None where it equals dx or nobody needs it
    partials_ptr,  # (3, programs, N)  out, fp32: dweight, dbias, dx_bias, the last with x_bias only
    stride_dym: tl.constexpr,
    stride_xm: tl.constexpr,
    stride_rm: tl.constexpr,
    stride_dxm: tl.constexpr,
    stride_drm: tl.constexpr,
    M,
    programs,
    keep_scale,
    stream,
    THRESHOLD: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,  # per step
    COLS0: tl.constexpr,
    COLS1: tl.constexpr,
):
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    dweight0 = tl.zeros([ROWS, COLS0], tl.float32)
    dbias0 = tl.zeros([ROWS, COLS0], tl.float32)
    dx_bias0 = tl.zeros([ROWS, COLS0], tl.float32)
    dweight1 = dweight0
    dbias1 = dbias0
    dx_bias1 = dx_bias0
    if COLS1 > 0:
        dweight1 = tl.zeros([ROWS, COLS1], tl.float32)
        dbias1 = tl.zeros([ROWS, COLS1], tl.float32)
        dx_bias1 = tl.zeros([ROWS, COLS1], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), programs):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < M
        numbers = _numbers(numbers_ptr, rows, in_rows, THRESHOLD)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        dy0 = load_rows(dy_ptr, rows, in_rows, stride_dym, N, 0, COLS0)
        h0, keep0 = _before_norm(
            x_ptr, x_bias_ptr, residual_ptr, numbers, rows, in_rows, stride_xm, stride_rm, seed, stream, keep_scale,
            THRESHOLD, N, 0, COLS0,
        )  # fmt: skip
        x0 = x_hat_of(h0, mean, rstd, N, 0, COLS0)
        dweight0 += dy0 * x0
        dbias0 += dy0
        g0 = dy0 * load_vector(weight_ptr, N, 0, COLS0)  # from the cache, for want of registers
        g1 = g0
        x1 = x0
        keep1 = keep0
        if COLS1 > 0:
            dy1 = load_rows(dy_ptr, rows, in_rows, stride_dym, N, COLS0, COLS1)
            h1, keep1 = _before_norm(
                x_ptr, x_bias_ptr, residual_ptr, numbers, rows, in_rows, stride_xm, stride_rm, seed, stream, keep_scale,
                THRESHOLD, N, COLS0, COLS1,
            )  # fmt: skip
            x1 = x_hat_of(h1, mean, rstd, N, COLS0, COLS1)
            dweight1 += dy1 * x1
            dbias1 += dy1
            g1 = dy1 * load_vector(weight_ptr, N, COLS0, COLS1)
        d0, d1 = input_gradient(g0, x0, g1, x1, rstd, N, COLS1)
        if dresidual_ptr is not None:
            store_rows(dresidual_ptr, d0, rows, in_rows, stride_drm, N, 0, COLS0)
            if COLS1 > 0:
                store_rows(dresidual_ptr, d1, rows, in_rows, stride_drm, N, COLS0, COLS1)
        if THRESHOLD > 0:
            d0 = tl.where(keep0, d0 * keep_scale, 0.0)
        store_rows(dx_ptr, d0, rows, in_rows, stride_dxm, N, 0, COLS0)
        dx_bias0 += d0
        if COLS1 > 0:
            if THRESHOLD > 0:
                d1 = tl.where(keep1, d1 * keep_scale, 0.0)
            store_rows(dx_ptr, d1, rows, in_rows, stride_dxm, N, COLS0, COLS1)
            dx_bias1 += d1
    store_partial(partials_ptr, 0, dweight0, programs, N, 0, COLS0)
    store_partial(partials_ptr, 1, dbias0, programs, N, 0, COLS0)
    if x_bias_ptr is not None:
        store_partial(partials_ptr, 2, dx_bias0, programs, N, 0, COLS0)
    if COLS1 > 0:
        store_partial(partials_ptr, 0, dweight1, programs, N, COLS0, COLS1)
        store_partial(partials_ptr, 1, dbias1, programs, N, COLS0, COLS1)
        if x_bias_ptr is not None:
            store_partial(partials_ptr, 2, dx_bias1, programs, N, COLS0, COLS1)


def _launch_fwd(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.layer_norm(x, x_bias, residual, weight, bias, eps, dropout_p, seed, stream, rows)
    M, N = x.shape
    y, mean, rstd = _fake_fwd(x, x_bias, residual)
    per_program, num_warps = rows_and_warps(N)
    COLS0, COLS1 = parts(N)
    _launch.launch(
        _layer_norm_fwd_kernel, (triton.cdiv(M, per_program),),
        x, x_bias, residual, weight, bias, seed, rows, y, mean, rstd,
        x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0),
        M, eps, reference.keep_scale(dropout_p), stream,
        THRESHOLD=reference.drop_threshold(dropout_p), N=N, ROWS=per_program, COLS0=COLS0, COLS1=COLS1,
        num_warps=num_warps,
    )  # fmt: skip
    return y, mean, rstd


def _launch_bwd(
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
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.layer_norm_backward(dy, x, x_bias, residual, weight, mean, rstd, dropout_p, seed, stream, rows)
    M, N = x.shape
    dx, dresidual, dx_bias, dweight, dbias = _fake_bwd(dy, x, x_bias, residual, weight, mean, rstd, dropout_p)
    other = dresidual if dresidual.numel() or (M == 0 and dresidual.ndim == 2) else None
    programs, num_warps = programs_and_warps(M, N, _launch.chip(x.device))
    COLS0, COLS1 = parts(N)
    sums = 2 if x_bias is None else 3
    partials = x.new_empty(sums, programs, N, dtype=torch.float32)
    _launch.launch(
        _layer_norm_bwd_kernel, (programs,),
        dy, x, x_bias, residual, weight, mean, rstd, seed, rows, dx, other, partials,
        dy.stride(0), x.stride(0), 0 if residual is None else residual.stride(0), dx.stride(0),
        0 if other is None else other.stride(0),
        M, programs, reference.keep_scale(dropout_p), stream,
        THRESHOLD=reference.drop_threshold(dropout_p), N=N, ROWS=1, COLS0=COLS0, COLS1=COLS1, num_warps=num_warps,
    )  # fmt: skip
    sum_partials(partials, dweight, dbias, None if x_bias is None else dx_bias)
    return dx, dresidual, dx_bias, dweight, dbias


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
    " float dropout_p, Tensor? seed, int stream, Tensor? rows=None)"
    " -> (Tensor dx, Tensor dresidual, Tensor dx_bias, Tensor dweight, Tensor dbias)",
    cuda=_launch_bwd,
    cpu=_cpu.layer_norm_backward,
    fake=_fake_bwd,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, x_bias, residual, weight, _bias, _eps, ctx.dropout_p, seed, ctx.stream, rows = inputs
    _y, mean, rstd = output
    ctx.save_for_backward(x, x_bias, residual, weight, mean, rstd, seed, rows)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed, rows = ctx.saved_tensors
    dx, dresidual, dx_bias, dweight, dbias = layer_norm_bwd(
        dy.contiguous(), *tensors, ctx.dropout_p, seed, ctx.stream, rows
    )
    _x, x_bias, residual, *_ = tensors
    if residual is None:
        dresidual = None
    elif dresidual.numel() == 0:
        dresidual = dx
    return dx, None if x_bias is None else dx_bias, dresidual, dweight, dbias, None, None, None, None, None


layer_norm_fwd = _library.define(
    "layer_norm_fwd(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps,"
    " float dropout_p, Tensor? seed, int stream, Tensor? rows=None) -> (Tensor y, Tensor mean, Tensor rstd)",
    cuda=_launch_fwd,
    cpu=_cpu.layer_norm,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
)
