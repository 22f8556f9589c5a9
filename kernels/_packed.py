"""Packed sequences in a kernel: which part of them is a program's, a head's rows, and NaN where no result belongs.

A caller may be wrong about a batch: max_seqlen smaller than its longest sequence, or cu_seqlens that do not begin at 0
or end at T. To look at the values would wait for the GPU, so a program does, at the cost of a few comparisons: rows of
a sequence that is longer than max_seqlen, and rows of none, become NaN in every output. Nobody reads memory that was
never written, and the mistake shows in the first loss.
"""

import triton
import triton.language as tl
from torch import Tensor


def grid_of(cu_seqlens: Tensor, T: int, H: int, max_seqlen: int, BLOCK: int) -> tuple[tuple[int], int, int, bool]:
    """The grid, the number of sequences, the programs for each, and whether `tile_of` hands out slots instead."""
    B = cu_seqlens.shape[0] - 1
    blocks_per_seq = triton.cdiv(max(1, max_seqlen), BLOCK)
    slots = T // BLOCK + B
    even = B * blocks_per_seq <= slots
    return (H * (B * blocks_per_seq if even else slots),), B, blocks_per_seq, not even


@triton.jit
def tile_of(pid, cu_seqlens_ptr, T, B, blocks_per_seq, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sequence: its number, first token and length; and where in it the program's block starts.

    Without SLOTS every sequence has `blocks_per_seq` programs, which is best for equal lengths; None is one, known
    while compiling. With SLOTS sequence b owns the slots from cu_seqlens[b] // BLOCK + b on: they are as many as it has
    blocks, or one more, so that T // BLOCK + B programs serve any mix of lengths.
    """
    if SLOTS:
        seq = -1
        for first in range(0, B, 256):
            offs_b = first + tl.arange(0, 256)
            starts = tl.load(cu_seqlens_ptr + offs_b, mask=offs_b < B, other=0)
            seq += tl.sum(((starts // BLOCK + offs_b <= pid) & (offs_b < B)).to(tl.int32), axis=0)
        start = tl.load(cu_seqlens_ptr + seq)
        block = pid - (start // BLOCK + seq)
    else:
        seq = pid
        block = pid * 0
        if blocks_per_seq is not None:
            seq = pid // blocks_per_seq
            block = pid % blocks_per_seq
        start = tl.load(cu_seqlens_ptr + seq)
    end = tl.minimum(tl.load(cu_seqlens_ptr + seq + 1), T)
    return seq, start.to(tl.int64), end - start, block * BLOCK


@triton.jit
def head_rows(ptr, stride_m, stride_d, offs_m, offs_d, seqlen, HEAD_DIM: tl.constexpr):
    """Rows of one head; zeros beyond the sequence's end and in the columns that fill HEAD_DIM up to a power of two.

    ptr is a scalar and its offsets are int32: a block of 64-bit pointers would take twice the registers.
    """
    mask = (offs_m < seqlen)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + offs_m[:, None] * stride_m + offs_d[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def poison(
    ptr, other_ptr, third_ptr, stride_m, seq, start, seqlen, first, T, B, blocks_per_seq, max_seqlen,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """NaN in the rows, of D elements, that fall to this program but have no result.

    Args:
        ptr, other_ptr, third_ptr: row 0 of outputs, (T, D) with stride_m between rows; the last two may be None.
        seq, start, seqlen, first: as `tile_of` gives them.
    """
    if first == 0:
        if seq == 0:
            _fill(ptr, other_ptr, third_ptr, stride_m, 0, start, D, BLOCK_D)
        if seq == B - 1:
            _fill(ptr, other_ptr, third_ptr, stride_m, start + tl.maximum(seqlen, 0), T, D, BLOCK_D)
    if seqlen > max_seqlen:
        last = tl.minimum(first + BLOCK, seqlen)
        if not SLOTS:
            if blocks_per_seq is None:
                last = seqlen  # those behind have no program
            else:
                if first == (blocks_per_seq - 1) * BLOCK:
                    last = seqlen
        _fill(ptr, other_ptr, third_ptr, stride_m, start + first, start + last, D, BLOCK_D)


@triton.jit
def _fill(ptr, other_ptr, third_ptr, stride_m, first, last, D: tl.constexpr, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    for begin in range(first, last, 16):
        rows = tl.cast(begin, tl.int64) + tl.arange(0, 16)
        mask = (rows < last)[:, None] & (cols < D)[None, :]
        offs = rows[:, None] * stride_m + cols[None, :]
        nan = tl.full([16, BLOCK_D], float("nan"), ptr.dtype.element_ty)
        tl.store(ptr + offs, nan, mask=mask)
        if other_ptr is not None:
            tl.store(other_ptr + offs, nan, mask=mask)
        if third_ptr is not None:
            tl.store(third_ptr + offs, nan, mask=mask)
