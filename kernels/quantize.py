r"""Rows as int8, alone, behind a GELU, and behind bias + residual add + LayerNorm: what a product of int8 takes.

    scale = max |h| / 127,   q = round(h / scale),   to nearest even:   h is about q * scale

    quantize_rows    h = x, or gelu(x)
    layer_norm_int8  h = y = LayerNorm(x + x_bias + residual), of which y is given too, for the residual stream

A row's scale is known only once all of it is, and a tile of a product does not have all of it: so the GELU of a
feed-forward rides here, on what the first product wrote, and the LayerNorm of a layer has its row anyway.
A row of zeros is zeros, with a small scale; where one is not finite its scale is NaN. For inference: no gradients.
Traffic: quantize_rows 3 bytes an element in 16 bits, layer_norm_int8 7 with a residual. Specification:
`fastbert.reference.quantize_rows`, `fastbert.reference.layer_norm_int8`.
"""

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _int8, _launch
from fastbert.kernels._gelu import gelu as gelu_of
from fastbert.kernels._int8 import scales, store_int8
from fastbert.kernels._norm import load_rows, load_vector, normalise, parts, rows_and_warps, store_rows
from fastbert.kernels._triton import tl, triton


@triton.jit
def _values(
    x_ptr, rows, in_rows, stride_xm, ACTIVATION: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr
):
    h = load_rows(x_ptr, rows, in_rows, stride_xm, N, FIRST, COLS)
    if ACTIVATION is not None:
        h = gelu_of(h, ACTIVATION, x_ptr.dtype.element_ty == tl.float32)
    return h


@triton.jit(do_not_specialize=["M"])
def _quantize_rows_kernel(
    x_ptr,  # (M, N)
    q_ptr,  # (M, N) int8   out
    scale_ptr,  # (M,) fp32  out
    stride_xm: tl.constexpr,
    M,
    ACTIVATION: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS0: tl.constexpr,
    COLS1: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < M
    h0 = _values(x_ptr, rows, in_rows, stride_xm, ACTIVATION, N, 0, COLS0)
    h1 = h0
    if COLS1 > 0:
        h1 = _values(x_ptr, rows, in_rows, stride_xm, ACTIVATION, N, COLS0, COLS1)
    scale, inverse = scales(h0, h1, COLS1)
    store_int8(q_ptr, h0, inverse, rows, in_rows, N, 0, COLS0)
    if COLS1 > 0:
        store_int8(q_ptr, h1, inverse, rows, in_rows, N, COLS0, COLS1)
    tl.store(scale_ptr + rows, scale, mask=in_rows)


@triton.jit
def _before_norm(
    x_ptr, x_bias_ptr, residual_ptr, rows, in_rows, stride_xm, stride_rm,
    N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    h = load_rows(x_ptr, rows, in_rows, stride_xm, N, FIRST, COLS)
    if x_bias_ptr is not None:
        h += load_vector(x_bias_ptr, N, FIRST, COLS)
    if residual_ptr is not None:
        h += load_rows(residual_ptr, rows, in_rows, stride_rm, N, FIRST, COLS)
    return h


@triton.jit(do_not_specialize=["M"])
def _layer_norm_int8_kernel(
    x_ptr,  # (M, N)
    x_bias_ptr,  # (N,), or None
    residual_ptr,  # (M, N), or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    y_ptr,  # (M, N)         out
    q_ptr,  # (M, N) int8    out
    scale_ptr,  # (M,) fp32  out
    stride_xm: tl.constexpr,
    stride_rm: tl.constexpr,
    M,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS0: tl.constexpr,
    COLS1: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < M
    h0 = _before_norm(x_ptr, x_bias_ptr, residual_ptr, rows, in_rows, stride_xm, stride_rm, N, 0, COLS0)
    h1 = h0
    if COLS1 > 0:
        h1 = _before_norm(x_ptr, x_bias_ptr, residual_ptr, rows, in_rows, stride_xm, stride_rm, N, COLS0, COLS1)
    x0, x1, _, _ = normalise(h0, h1, eps, N, COLS0, COLS1)
    y0 = x0 * load_vector(weight_ptr, N, 0, COLS0) + load_vector(bias_ptr, N, 0, COLS0)
    y1 = y0
    if COLS1 > 0:
        y1 = x1 * load_vector(weight_ptr, N, COLS0, COLS1) + load_vector(bias_ptr, N, COLS0, COLS1)
    scale, inverse = scales(y0, y1, COLS1)
    store_rows(y_ptr, y0, rows, in_rows, N, N, 0, COLS0)
    store_int8(q_ptr, y0, inverse, rows, in_rows, N, 0, COLS0)
    if COLS1 > 0:
        store_rows(y_ptr, y1, rows, in_rows, N, N, COLS0, COLS1)
        store_int8(q_ptr, y1, inverse, rows, in_rows, N, COLS0, COLS1)
    tl.store(scale_ptr + rows, scale, mask=in_rows)


def _launch_quantize_rows(x: Tensor, gelu: str | None) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.quantize_rows(x, gelu)
    (M, N), (q, scale) = x.shape, _int8.outputs(x)
    per_program, num_warps = rows_and_warps(N)
    COLS0, COLS1 = parts(N)
    if M > 0:
        _launch.launch(
            _quantize_rows_kernel, (triton.cdiv(M, per_program),),
            x, q, scale, x.stride(0), M,
            ACTIVATION=gelu, N=N, ROWS=per_program, COLS0=COLS0, COLS1=COLS1, num_warps=num_warps,
        )  # fmt: skip
    return q, scale


def _launch_layer_norm_int8(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.layer_norm_int8(x, x_bias, residual, weight, bias, eps)
    M, N = x.shape
    y, q, scale = _fake_layer_norm_int8(x, x_bias, residual)
    per_program, num_warps = rows_and_warps(N)
    COLS0, COLS1 = parts(N)
    if M > 0:
        _launch.launch(
            _layer_norm_int8_kernel, (triton.cdiv(M, per_program),),
            x, x_bias, residual, weight, bias, y, q, scale,
            x.stride(0), 0 if residual is None else residual.stride(0), M, eps,
            N=N, ROWS=per_program, COLS0=COLS0, COLS1=COLS1, num_warps=num_warps,
        )  # fmt: skip
    return y, q, scale


def _fake_layer_norm_int8(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    like = x if residual is None else residual
    return like.new_empty(like.shape), *_int8.outputs(x)


quantize_rows_fwd = _library.define(
    "quantize_rows_fwd(Tensor x, str? gelu) -> (Tensor q, Tensor scale)",
    cuda=_launch_quantize_rows,
    cpu=_cpu.quantize_rows,
    fake=lambda x, gelu: _int8.outputs(x),
)

layer_norm_int8_fwd = _library.define(
    "layer_norm_int8_fwd(Tensor x, Tensor? x_bias, Tensor? residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor y, Tensor q, Tensor scale)",
    cuda=_launch_layer_norm_int8,
    cpu=_cpu.layer_norm_int8,
    fake=_fake_layer_norm_int8,
)
