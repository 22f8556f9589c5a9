r"""A product of int8, for inference: rows and output channels with a scale each, sums of int32, bias and GELU behind.

    y = act((x weight^T) * x_scale weight_scale^T + bias)

x and its scales come from `quantize_rows` or `layer_norm_int8`, the weight's from the same rule, a row a channel.
With twice the operations of 16 bits in a tensor core and half the bytes of both operands. Sums are exact for up to
133,144 features. A program has a tile, and takes both operands along K, where they are contiguous; tiles come in groups
of rows, so that what is read stays in the L2 cache. For inference: no gradients. Specification:
`fastbert.reference.linear_int8`. Arithmetic: 2 M N K operations.
"""

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _launch, _product
from fastbert.kernels._gelu import gelu as gelu_of
from fastbert.kernels._product import Tiles, _place
from fastbert.kernels._triton import tl, triton


@triton.jit(do_not_specialize=["M"])
def _linear_int8_fwd_kernel(
    x_ptr,  # (M, K) int8
    x_scale_ptr,  # (M,) fp32
    weight_ptr,  # (N, K) int8
    weight_scale_ptr,  # (N,) fp32
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N)  out
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    ACTIVATION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row, col = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :]
    weight_ptrs = weight_ptr + tl.cast(cols, tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in range(0, K, BLOCK_K):
        in_x, in_weight = (rows < M)[:, None], (cols < N)[None, :]
        if not EVEN_K:
            in_x, in_weight = in_x & (ks < K - k)[None, :], in_weight & (ks < K - k)[:, None]
        x = tl.load(x_ptrs + k, mask=in_x, other=0)
        acc = tl.dot(x, tl.load(weight_ptrs + k, mask=in_weight, other=0), acc, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < M, other=0.0)
    weight_scale = tl.load(weight_scale_ptr + cols, mask=cols < N, other=0.0)
    y = acc.to(tl.float32) * x_scale[:, None] * weight_scale[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        y = gelu_of(y, ACTIVATION, y_ptr.dtype.element_ty == tl.float32)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y_ptr + rows[:, None] * N + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


def default_tiles(chip: _launch.Chip) -> Tiles:
    """Where `_product.TILES` has none that were measured."""
    return Tiles(128, 128, 128 if chip.tensor_cores == "wgmma" else 64, 8, 3)


BYTEWISE = Tiles(64, 64, 64, 4, 2)  # rows that do not begin at multiples of 16 are loaded byte by byte, into registers


def _launch_fwd(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if out_dtype == torch.float64:
        return reference.linear_int8(x, x_scale, weight, weight_scale, bias, gelu, out_dtype)
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N, dtype=out_dtype)
    tiles = _product.tiles_for(x, weight, gelu) or default_tiles(_launch.chip(x.device))
    if any(t.stride(0) % 16 or t.data_ptr() % 16 for t in (x, weight)):
        tiles = BYTEWISE
    if M > 0:
        _launch.launch(
            _linear_int8_fwd_kernel, (triton.cdiv(M, tiles.M) * triton.cdiv(N, tiles.N),),
            x, x_scale, weight, weight_scale, bias, y, M, N, K, x.stride(0), weight.stride(0),
            ACTIVATION=gelu, EVEN_K=K % tiles.K == 0,
            BLOCK_M=tiles.M, BLOCK_N=tiles.N, BLOCK_K=tiles.K, GROUP_M=tiles.GROUP_M,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return y


linear_int8_fwd = _library.define(
    "linear_int8_fwd(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias, str? gelu,"
    " ScalarType out_dtype) -> Tensor",
    cuda=_launch_fwd,
    cpu=_cpu.linear_int8,
    fake=lambda x, x_scale, weight, weight_scale, bias, gelu, out_dtype: x.new_empty(
        x.shape[0], weight.shape[0], dtype=out_dtype
    ),
    flops=lambda x, x_scale, weight, *_: 2 * x.shape[0] * weight.numel(),
)
