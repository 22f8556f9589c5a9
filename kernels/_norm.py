"""LayerNorm's arithmetic, forward and backward, for the kernels that end in one.

A row of N features is cut into two parts of a power of two each, 768 = 512 + 256, so that no lane idles; with N a
power of two there is no second part. A part is [ROWS, COLS] of float32, zero beyond N.
"""

from torch import Tensor

from fastbert.kernels import _launch
from fastbert.kernels._triton import tl, triton


def parts(N: int) -> tuple[int, int]:
    """Columns of the two parts, the second 0 where there is none."""
    first = max(16, 1 << (N.bit_length() - 1))
    return first, 0 if first >= N else max(16, triton.next_power_of_2(N - first))


def rows_and_warps(N: int) -> tuple[int, int]:
    """Rows of a program of the forward, and its warps: up to 2048 features a warp, and a row within it if it fits."""
    whole_rows = (2048 if sum(parts(N)) == N else 1024) // N  # masks take registers
    rows = min(8, 1 << (whole_rows.bit_length() - 1)) if whole_rows > 0 else 1
    return rows, max(1, triton.next_power_of_2(N) // 2048)


def programs_and_warps(M: int, N: int, chip: _launch.Chip) -> tuple[int, int]:
    """Of the backward: eight warps on a multiprocessor, which is what their registers allow.

    A thread keeps three sums for each of its columns: 24 columns at 768 features, from 1024 on 16, at last 8; and no
    more than 8 on Blackwell, where 16 spill.
    """
    if chip.capability >= (10, 0):
        num_warps = max(1, triton.next_power_of_2(N) // 256)
    else:
        num_warps = 1 if N < 1024 else triton.next_power_of_2(N) // (512 if N <= 4096 else 256)
    return max(1, min(M, chip.processors * max(1, 8 // num_warps))), num_warps


def sum_partials(partials: Tensor, *outputs: Tensor | None) -> None:
    """Each of the outputs, (N,), or the rows of one, (sums, N), from its (programs, N) of partials."""
    sums, programs, N = partials.shape
    BLOCK_N = 16
    grid = (triton.cdiv(N, BLOCK_N), sums)
    _launch.launch(
        _sum_partials_kernel, grid, partials, *outputs, programs, N, BLOCK_M=128, BLOCK_N=BLOCK_N, num_warps=4
    )


@triton.jit
def load_rows(ptr, rows, in_rows, stride_m, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """Columns FIRST ... FIRST + COLS - 1 of some rows.

    Strides are constants of the kernels: of a variable, Triton would know only whether 16 divides it, and 312 would be
    loaded two bytes at a time.
    """
    cols = FIRST + tl.arange(0, COLS)
    mask = in_rows[:, None]
    if FIRST + COLS > N:
        mask = mask & (cols < N)[None, :]
    return tl.load(ptr + rows[:, None] * stride_m + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, part, rows, in_rows, stride_m, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    cols = FIRST + tl.arange(0, COLS)
    mask = in_rows[:, None]
    if FIRST + COLS > N:
        mask = mask & (cols < N)[None, :]
    tl.store(ptr + rows[:, None] * stride_m + cols[None, :], part.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(ptr, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """Of a weight or a bias: [1, COLS]."""
    cols = FIRST + tl.arange(0, COLS)
    if FIRST + COLS > N:
        return tl.load(ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    return tl.load(ptr + cols).to(tl.float32)[None, :]


@triton.jit
def _centre(part, mean, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    centred = part - mean[:, None]
    if FIRST + COLS > N:  # what fills the part up would add mean^2 to the variance
        centred = tl.where((FIRST + tl.arange(0, COLS) < N)[None, :], centred, 0.0)
    return centred


@triton.jit
def normalise(h0, h1, eps, N: tl.constexpr, COLS0: tl.constexpr, COLS1: tl.constexpr):
    """x_hat of both parts, mean and rstd of each row, with the variance from centred values."""
    total = tl.sum(h0, axis=1)
    if COLS1 > 0:
        total += tl.sum(h1, axis=1)
    mean = total / N
    c0 = _centre(h0, mean, N, 0, COLS0)
    c1 = c0
    squares = tl.sum(c0 * c0, axis=1)
    if COLS1 > 0:
        c1 = _centre(h1, mean, N, COLS0, COLS1)
        squares += tl.sum(c1 * c1, axis=1)
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    return c0 * rstd[:, None], c1 * rstd[:, None], mean, rstd


@triton.jit
def x_hat_of(part, mean, rstd, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """Of one part, from statistics that the forward kept."""
    return _centre(part, mean, N, FIRST, COLS) * rstd[:, None]


@triton.jit
def input_gradient(g0, x0, g1, x1, rstd, N: tl.constexpr, COLS1: tl.constexpr):
    """dh = rstd * (g - mean(g) - x_hat * mean(g * x_hat)) of both parts, with g = dy * weight."""
    sum_g = tl.sum(g0, axis=1)
    sum_gx = tl.sum(g0 * x0, axis=1)
    if COLS1 > 0:
        sum_g += tl.sum(g1, axis=1)
        sum_gx += tl.sum(g1 * x1, axis=1)
    mean_g = (sum_g / N)[:, None]
    mean_gx = (sum_gx / N)[:, None]
    d0 = (g0 - mean_g - x0 * mean_gx) * rstd[:, None]
    d1 = d0
    if COLS1 > 0:
        d1 = (g1 - mean_g - x1 * mean_gx) * rstd[:, None]
    return d0, d1


@triton.jit
def store_partial(partials_ptr, index, part, programs, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """This program's row of the sums `index`, in partials (sums, programs, N)."""
    cols = FIRST + tl.arange(0, COLS)
    ptrs = partials_ptr + (index * programs + tl.program_id(0)) * N + cols
    if FIRST + COLS > N:
        tl.store(ptrs, tl.sum(part, axis=0), mask=cols < N)
    else:
        tl.store(ptrs, tl.sum(part, axis=0))


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partials_ptr,  # (sums, programs, N) fp32
    out0_ptr,  # (N,)  out, of the first sum; or (sums, N), of all, where it is the only one
    out1_ptr,  # (N,)  out, or None
    out2_ptr,  # (N,)  out, or None where there are two sums
    programs,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """In one order always, so that gradients are the same bits in every run."""
    index = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, programs, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        mask = (rows < programs)[:, None] & (cols < N)[None, :]
        acc += tl.load(partials_ptr + (index * programs + rows)[:, None] * N + cols[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    if (out1_ptr is None) | (index == 0):
        tl.store(out0_ptr + index * N + cols, total.to(out0_ptr.dtype.element_ty), mask=cols < N)
    if out1_ptr is not None:
        if index == 1:
            tl.store(out1_ptr + cols, total.to(out1_ptr.dtype.element_ty), mask=cols < N)
    if out2_ptr is not None:
        if index == 2:
            tl.store(out2_ptr + cols, total.to(out2_ptr.dtype.element_ty), mask=cols < N)
