r"""Linear + bias (+ GELU) as one Triton product: y = act(pre), pre = x weight^T + bias. x: (M, K), weight: (N, K).

cuBLAS computes a product where TILES has no entry for it, and it has one only where this was measured to be faster:
`make tune` on a GPU prints them. Sums are float32. Arithmetic: 2 M N K flops.

Where a group of warps drives the tensor cores (sm_90, sm_100), at 16 bits and where addresses are multiples of 16
bytes, tiles come and go through TMA, and as many programs as the chip holds walk over them: one tile's results are on
their way while the next is loaded. Else a program has a tile and pointers. Tiles are taken in groups of GROUP_M rows of
them, so that what is read stays in the L2 cache. The epilogue takes the columns of a tile in PARTS, which is the shared
memory that its way out needs, divided. With 128 x 256 a multiprocessor holds one program, whose products wait for its
GELU; with 128 x 128 it holds two, of which one can multiply meanwhile. Which wins is for a GPU to say.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastbert import _library
from fastbert.kernels import _launch
from fastbert.kernels._device import dot_add
from fastbert.kernels._gelu import gelu
from fastbert.kernels._triton import TensorDescriptor, tl, triton


class Tiles(NamedTuple):
    """Rows, columns and depth of a tile, warps, how many steps ahead it loads, programs on a multiprocessor.

    Attributes:
        PARTS: of a tile's columns in the epilogue, 1, 2 or 4.  GROUP_M: rows of tiles in a group.
    """

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int
    programs: int = 1
    PARTS: int = 1
    GROUP_M: int = 8

    def meta(self) -> dict[str, int]:
        """As a launch takes them."""
        blocks = {f"BLOCK_{name}": getattr(self, name) for name in ("M", "N", "K")}
        return {**blocks, **{name: getattr(self, name) for name in ("PARTS", "GROUP_M", "num_warps", "num_stages")}}

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.K} w{self.num_warps} s{self.num_stages} p{self.programs} e{self.PARTS}"


class Product(NamedTuple):
    """What an entry of TILES is for.

    Attributes:
        activation: the GELU's form behind it, "none" or "tanh", or None.
        N, K: of the weight.
        rows: of x, as `size_class` has them.
    """

    capability: tuple[int, int]
    dtype: torch.dtype
    activation: str | None
    N: int
    K: int
    rows: int


# Only what was measured to be faster than cuBLAS; each line with the GPU, the date, and by how much.
TILES: dict[Product, Tiles] = {}


def size_class(rows: int) -> int:
    """1, 4, 16, ... 65536: the largest that is not above."""
    return min(65536, 1 << max(0, rows.bit_length() - 1) // 2 * 2)


def tiles_for(x: Tensor, weight: Tensor, activation: str | None) -> Tiles | None:
    """What TILES has for this product, or None: cuBLAS."""
    if not TILES or not _library.HAS_TRITON:
        return None
    (M, K), N = x.shape, weight.shape[0]
    return TILES.get(Product(_launch.chip(x.device).capability, x.dtype, activation, N, K, size_class(M)))


def why(device: torch.device, dtype: torch.dtype, activation: str | None, N: int, K: int) -> str:
    """Which way a product takes, and why: for people."""
    if device.type != "cuda":
        return f"PyTorch's own, as always on {'a CPU' if device.type == 'cpu' else device.type}"
    if dtype == torch.float64:
        return "PyTorch, in float64"
    if not _library.HAS_TRITON:
        return "cuBLAS: Triton is not installed"
    cublas = "cuBLAS" if activation is None else "cuBLAS, then a kernel for the GELU"
    capability = _launch.chip(device).capability
    entries = {it.rows: tiles for it, tiles in TILES.items() if it[:5] == (capability, dtype, activation, N, K)}
    if not entries:
        name = f"sm_{capability[0]}{capability[1]}, {str(dtype).removeprefix('torch.')}"
        return f"{cublas}: no tiles were measured to be faster ({name})"
    measured = [f"{_rows(rows)} tiles {tiles}" for rows, tiles in sorted(entries.items())]
    return f"Triton, measured to be faster: {', '.join(measured)}; else {cublas}"


def _rows(size: int) -> str:
    return f"from {size} tokens on" if size == size_class(2**30) else f"{size} to {4 * size - 1} tokens"


def default_tiles(dtype: torch.dtype, chip: _launch.Chip) -> Tiles:
    """For a call of the kernel itself."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2) if _launch.precision(dtype) == "tf32" else Tiles(64, 64, 16, 4, 2)
    return Tiles(128, 256, 64, 8, 3, PARTS=2) if chip.tensor_cores != "mma" else POINTER_TILES


POINTER_TILES = Tiles(128, 128, 32, 8, 4)


@triton.jit
def _place(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: down a group of GROUP_M, then to the right."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    place = tile % (GROUP_M * tiles_n)
    return (group * GROUP_M + place % rows) * BLOCK_M, place // rows * BLOCK_N


@triton.jit
def _with_bias(acc, bias_ptr, cols, N):
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _halves(acc):
    """The left and the right half of its columns."""
    return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, acc.shape[1] // 2]), [0, 2, 1]))


@triton.jit
def _store_tma(acc, bias_ptr, y_desc, pre_desc, row, col, N, ACTIVATION: tl.constexpr, PARTS: tl.constexpr):
    if PARTS > 1:
        left, right = _halves(acc)
        _store_tma(left, bias_ptr, y_desc, pre_desc, row, col, N, ACTIVATION, PARTS // 2)
        _store_tma(right, bias_ptr, y_desc, pre_desc, row, col + acc.shape[1] // 2, N, ACTIVATION, PARTS // 2)
    else:
        pre = _with_bias(acc, bias_ptr, col + tl.arange(0, acc.shape[1]), N)
        if pre_desc is not None:
            pre_desc.store([row, col], pre.to(y_desc.dtype))
        if ACTIVATION is not None:
            pre = gelu(pre, ACTIVATION, False)
        y_desc.store([row, col], pre.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def _product_tma_kernel(
    x_desc,  # (M, K)
    weight_desc,  # (N, K)
    bias_ptr,  # (N,), or None
    y_desc,  # (M, N)    out
    pre_desc,  # (M, N)  out, or None
    M,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, col = _place(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):  # zeros come from beyond K
            acc = dot_add(x_desc.load([row, k]), weight_desc.load([col, k]).T, acc, PRECISION)
        _store_tma(acc, bias_ptr, y_desc, pre_desc, row, col, N, ACTIVATION, PARTS)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x_ptr,  # (M, K)
    weight_ptr,  # (N, K)
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N)    out
    pre_ptr,  # (M, N)  out, or None
    M,
    N,
    K,
    stride_xm,
    stride_wn,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row, col = _place(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tl.cast(row, tl.int64) + tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + ks[None, :]
    weight_ptrs = weight_ptr + tl.cast(cols, tl.int64)[None, :] * stride_wn + ks[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        in_x, in_weight = (rows < M)[:, None], (cols < N)[None, :]
        if not EVEN_K:
            in_x, in_weight = in_x & (ks < K - k)[None, :], in_weight & (ks < K - k)[:, None]
        x = tl.load(x_ptrs + k, mask=in_x, other=0.0)
        acc = dot_add(x, tl.load(weight_ptrs + k, mask=in_weight, other=0.0), acc, PRECISION)
    WIDE: tl.constexpr = y_ptr.dtype.element_ty == tl.float32
    pre = _with_bias(acc, bias_ptr, cols, N)
    offs = rows[:, None] * N + cols[None, :]
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + offs, pre.to(pre_ptr.dtype.element_ty), mask=mask)
    if ACTIVATION is not None:
        pre = gelu(pre, ACTIVATION, WIDE)
    tl.store(y_ptr + offs, pre.to(y_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_pre: bool, tiles: Tiles
) -> tuple[Tensor, Tensor]:
    """y: (M, N), and pre: (M, N), or empty."""
    (M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(M, N)
    pre = torch.empty_like(y) if keep_pre else x.new_empty(0)
    if M == 0:
        return y, pre
    out = y, pre if keep_pre else None
    chip, flags = _launch.chip(x.device), {"ACTIVATION": activation, "PRECISION": _launch.precision(x.dtype)}
    if takes_tma(chip, x, weight, y):
        count = triton.cdiv(M, tiles.M) * triton.cdiv(N, tiles.N)
        programs = min(count, tiles.programs * chip.processors)
        part = [tiles.M, tiles.N // tiles.PARTS]
        _launch.launch(
            _product_tma_kernel, (programs,),
            _descriptor(x, [tiles.M, tiles.K]), _descriptor(weight, [tiles.N, tiles.K]), bias,
            *(None if t is None else _descriptor(t, part) for t in out),
            M, N, K, **flags, **tiles.meta(),
        )  # fmt: skip
    else:
        if chip.tensor_cores != "mma" and x.dtype != torch.float32:
            tiles = POINTER_TILES  # the others are for TMA
        count = triton.cdiv(M, tiles.M) * triton.cdiv(N, tiles.N)
        _launch.launch(
            _product_kernel, (count,),
            x, weight, bias, *out, M, N, K, x.stride(0), weight.stride(0),
            **flags, EVEN_K=K % tiles.K == 0, **tiles.meta(),
        )  # fmt: skip
    return y, pre


def takes_tma(chip: _launch.Chip, *tensors: Tensor) -> bool:
    """Whether a chip's TMA, where its tiles are those of TMA, can reach all of these matrices."""
    return chip.tensor_cores != "mma" and all(
        t.element_size() == 2 and t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _descriptor(t: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(t, list(t.shape), list(t.stride()), block)
