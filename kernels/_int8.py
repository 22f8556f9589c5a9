"""Rows of float32 as int8 with a scale each: x is about q * scale, q = round(x / scale), scale = max |x| / 127."""

import torch
from torch import Tensor

from fastbert.kernels._triton import tl, triton

TINY = tl.constexpr(1e-30)  # of a row's largest magnitude, so that neither its scale nor one over that is 0 or infinite
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: what is added to it is rounded, to even, into its low bits


@triton.jit
def scales(h0, h1, COLS1: tl.constexpr):
    """[ROWS] scale and its inverse, of both parts of the rows. NaN where a row is not finite."""
    absmax = tl.max(tl.abs(h0), axis=1) + tl.sum(h0 * 0.0, axis=1)  # a maximum leaves NaN out
    if COLS1 > 0:
        absmax = tl.maximum(absmax, tl.max(tl.abs(h1), axis=1)) + tl.sum(h1 * 0.0, axis=1) + absmax * 0.0
    absmax = tl.where(absmax < TINY, TINY, absmax)
    return absmax / 127.0, 127.0 / absmax


@triton.jit
def to_int8(part, inverse):
    return (part * inverse[:, None] + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def store_int8(ptr, part, inverse, rows, in_rows, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr):
    """Columns FIRST ... FIRST + COLS - 1 of some rows of (M, N)."""
    cols = FIRST + tl.arange(0, COLS)
    mask = in_rows[:, None] & (cols < N)[None, :] if FIRST + COLS > N else in_rows[:, None]
    tl.store(ptr + rows[:, None] * N + cols[None, :], to_int8(part, inverse), mask=mask)


def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unfilled: q like x, contiguous, and a scale a row."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=wide)
