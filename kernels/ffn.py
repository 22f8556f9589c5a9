r"""The feed-forward's products with its GELU: linear + bias + GELU, alone and with the second product behind it.

    y    = gelu(pre),   pre = x weight^T + bias,   gelu(z) = z Phi(z), or its tanh form
    out  = y out_weight^T                          (its bias is added by the LayerNorm that follows)

    dy   = dout out_weight,   dpre = dy gelu'(pre),   dbias = sum of the rows of dpre
    dx   = dpre weight,   dweight = dpre^T x,   dout_weight = dout^T y

Kept for the backward: x and pre. Not y: the pass over pre that makes dpre makes y once more, so a layer keeps N
features a token less, a quarter of all that BERT's layers keep, for one more write.

The first product is cuBLAS's, whose epilogue adds the bias, and a kernel computes the GELU, in place where nobody
needs pre; or it is one Triton product with the GELU in its epilogue, at sizes where that was measured to be faster
(`_product`). The backward's kernel makes dpre, y and the bias gradient in one pass: the programs of a strip of columns
walk the rows and keep their sums in registers, and a second kernel adds those up in one order.
Traffic of the GELU, forward: 2 M N elements; backward: 3 M N, with y 4 M N. Arithmetic, forward: 2 M N K flops.
Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415. Specification: `fastbert.reference.linear_gelu`,
`fastbert.reference.feed_forward`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _launch, _product
from fastbert.kernels._gelu import gelu, gelu_and_slope
from fastbert.kernels._norm import sum_partials
from fastbert.kernels._triton import tl, triton


@triton.jit
def _gelu_fwd_kernel(
    pre_ptr,  # (elements,)
    y_ptr,  # (elements,)  out, may be pre
    elements,
    APPROXIMATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < elements
    WIDE: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    y = gelu(tl.load(pre_ptr + offs, mask=mask, other=0.0).to(tl.float32), APPROXIMATE, WIDE)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "slabs"])
def _gelu_bwd_kernel(
    dy_ptr,  # (M, N)
    pre_ptr,  # (M, N)
    dpre_ptr,  # (M, N)          out
    y_ptr,  # (M, N)             out, or None
    partials_ptr,  # (slabs, N)  out, fp32: dbias
    stride_dym,
    M,
    N,
    slabs,
    APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    slab = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = (cols < N)[None, :]
    dtype = dpre_ptr.dtype.element_ty
    WIDE: tl.constexpr = dpre_ptr.dtype.element_ty == tl.float32
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(slab, tl.cdiv(M, BLOCK_M), slabs):
        rows = tl.cast(block, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & in_cols
        offs = rows[:, None] * N + cols[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * stride_dym + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        y, slope = gelu_and_slope(tl.load(pre_ptr + offs, mask=mask, other=0.0).to(tl.float32), APPROXIMATE, WIDE)
        dpre = dy * slope
        dbias += dpre
        tl.store(dpre_ptr + offs, dpre.to(dtype), mask=mask)
        if y_ptr is not None:
            tl.store(y_ptr + offs, y.to(dtype), mask=mask)
    tl.store(partials_ptr + slab * N + cols, tl.sum(dbias, axis=0), mask=cols < N)


def _launch_gelu(pre: Tensor, approximate: str, in_place: bool) -> Tensor:
    y = pre if in_place else torch.empty_like(pre)
    elements, BLOCK_N = pre.numel(), 2048
    _launch.launch(
        _gelu_fwd_kernel, (triton.cdiv(elements, BLOCK_N),), pre, y, elements, approximate, BLOCK_N, num_warps=4
    )
    return y


def _launch_linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, approximate: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.linear_gelu(x, weight, bias, approximate, keep_pre)
    tiles = _product.tiles_for(x, weight, approximate)
    if tiles is not None:
        return _product.launch(x, weight, bias, approximate, keep_pre, tiles)
    pre = F.linear(x, weight, bias)
    return _launch_gelu(pre, approximate, not keep_pre), pre if keep_pre else x.new_empty(0)


def _launch_gelu_bwd(dy: Tensor, pre: Tensor, approximate: str, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    if pre.dtype == torch.float64:
        return reference.gelu_backward(dy, pre, approximate, keep_y)
    M, N = pre.shape
    dpre, dbias, y = _fake_gelu_bwd(dy, pre, approximate, keep_y)
    BLOCK_M, BLOCK_N, num_warps = 8, 256, 4
    strips = triton.cdiv(N, BLOCK_N)
    slabs = max(1, min(triton.cdiv(M, BLOCK_M), triton.cdiv(8 * _launch.chip(pre.device).processors, strips)))
    partials = pre.new_empty(1, slabs, N, dtype=torch.float32)
    _launch.launch(
        _gelu_bwd_kernel, (strips, slabs),
        dy, pre, dpre, y if keep_y else None, partials, dy.stride(0), M, N, slabs,
        approximate, BLOCK_M, BLOCK_N, num_warps=num_warps,
    )  # fmt: skip
    sum_partials(partials, dbias, None, None)
    return dpre, dbias, y


def _launch_feed_forward_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, approximate: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    y, pre = _launch_linear_gelu_fwd(x, weight, bias, approximate, keep_pre)
    tiles = None if y.dtype == torch.float64 else _product.tiles_for(y, out_weight, None)
    if tiles is not None:
        return _product.launch(y, out_weight, None, None, False, tiles)[0], pre
    return F.linear(y, out_weight), pre


def _fake_gelu_bwd(dy: Tensor, pre: Tensor, approximate: str, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty(pre.shape[1]), pre.new_empty(pre.shape if keep_y else 0)


gelu_bwd = _library.define(
    "gelu_bwd(Tensor dy, Tensor pre, str approximate, bool keep_y) -> (Tensor dpre, Tensor dbias, Tensor y)",
    cuda=_launch_gelu_bwd,
    cpu=_cpu.gelu_backward,
    fake=_fake_gelu_bwd,
)


def _fake_linear_gelu_fwd(
    x: Tensor, weight: Tensor, bias: Any, approximate: Any, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep_pre else x.new_empty(0)


def _save_linear_gelu(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _bias, ctx.approximate, _keep_pre = inputs
    _y, pre = output
    ctx.save_for_backward(x, weight, pre)
    ctx.mark_non_differentiable(pre)


def _linear_gelu_backward(ctx: Any, dy: Tensor, _dpre: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, pre = ctx.saved_tensors
    dpre, dbias, _ = gelu_bwd(_rows(dy), pre, ctx.approximate, False)
    dx = dpre @ weight if ctx.needs_input_grad[0] else None
    dweight = dpre.T @ x if ctx.needs_input_grad[1] else None
    return dx, dweight, dbias, None, None


linear_gelu_fwd = _library.define(
    "linear_gelu_fwd(Tensor x, Tensor weight, Tensor bias, str approximate, bool keep_pre) -> (Tensor y, Tensor pre)",
    cuda=_launch_linear_gelu_fwd,
    cpu=reference.linear_gelu,
    fake=_fake_linear_gelu_fwd,
    setup_context=_save_linear_gelu,
    backward=_linear_gelu_backward,
    flops=lambda x, weight, *_: 2 * x.shape[0] * weight.numel(),
)


def _fake_feed_forward_fwd(
    x: Tensor, weight: Tensor, bias: Any, out_weight: Tensor, approximate: Any, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    pre = x.new_empty((x.shape[0], weight.shape[0]) if keep_pre else 0)
    return x.new_empty(x.shape[0], out_weight.shape[0]), pre


def _save_feed_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _bias, out_weight, ctx.approximate, _keep_pre = inputs
    _out, pre = output
    ctx.save_for_backward(x, weight, out_weight, pre)
    ctx.mark_non_differentiable(pre)


def _feed_forward_backward(ctx: Any, dout: Tensor, _dpre: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, out_weight, pre = ctx.saved_tensors
    need_dx, need_dweight, _, need_dout_weight = ctx.needs_input_grad[:4]
    dpre, dbias, y = gelu_bwd(dout @ out_weight, pre, ctx.approximate, need_dout_weight)
    dout_weight = dout.T @ y if need_dout_weight else None
    dx = dpre @ weight if need_dx else None
    dweight = dpre.T @ x if need_dweight else None
    return dx, dweight, dbias, dout_weight, None, None


feed_forward_fwd = _library.define(
    "feed_forward_fwd(Tensor x, Tensor weight, Tensor bias, Tensor out_weight, str approximate, bool keep_pre)"
    " -> (Tensor out, Tensor pre)",
    cuda=_launch_feed_forward_fwd,
    cpu=reference.feed_forward,
    fake=_fake_feed_forward_fwd,
    setup_context=_save_feed_forward,
    backward=_feed_forward_backward,
    flops=lambda x, weight, _bias, out_weight, *_: 2 * x.shape[0] * (weight.numel() + out_weight.numel()),
)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
