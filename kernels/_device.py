"""Device functions that several kernels share: dropout's random bits, and products that the interpreter gets right."""

import os

from fastbert.kernels._triton import tl, triton

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-7: four words of random bits for each counter. Specification: `fastbert.reference.philox`."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(7):
        product0 = c0.to(tl.uint64) * 0xD2511F53  # one wide multiplication gives both halves
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_bits(seed, block, row, head, stream, THRESHOLD: tl.constexpr):
    """The mask of 16 elements, for each counter. Element i is kept if bit `8 * (i % 4) + i // 4` is set.

    A byte is kept if it is at least THRESHOLD. The four bytes of a word are compared at once, in bit 7 of each.
    """
    w0, w1, w2, w3 = philox(seed, block, row, head, stream)
    bits = _keep_of_word(w0, THRESHOLD) >> 7
    bits |= _keep_of_word(w1, THRESHOLD) >> 6
    bits |= _keep_of_word(w2, THRESHOLD) >> 5
    return bits | _keep_of_word(w3, THRESHOLD) >> 4


@triton.jit
def _keep_of_word(word, THRESHOLD: tl.constexpr):
    low = word & 0x7F7F7F7F  # without bit 7 a sum of bytes cannot reach the next byte
    if THRESHOLD <= 128:
        kept = (low + (128 - THRESHOLD) * 0x01010101) | word
    else:
        kept = (low + (256 - THRESHOLD) * 0x01010101) & word
    return kept & 0x80808080


@triton.jit
def keep_features(seed, rows, first_col, stream, THRESHOLD: tl.constexpr, COLS: tl.constexpr):
    """The dropout mask of rows of features, [ROWS, COLS] of int1: `fastbert.reference.keep_mask`.

    Args:
        rows: [ROWS].  first_col: a multiple of 16.
    """
    ROWS: tl.constexpr = rows.shape[0]
    zero = tl.zeros([ROWS, COLS // 16], tl.uint32)
    block = (first_col // 16 + tl.arange(0, COLS // 16)).to(tl.uint32)
    bits = keep_bits(seed, zero + block[None, :], zero + rows[:, None].to(tl.uint32), zero, zero + stream, THRESHOLD)
    element = tl.arange(0, 16)[None, None, :].to(tl.uint32)
    kept = (bits[:, :, None] >> (8 * (element % 4) + element // 4)) & 1
    return tl.reshape(kept, [ROWS, COLS]) != 0


@triton.jit
def keep_scores(seed, rows, first_col, head, stream, THRESHOLD: tl.constexpr, COLS: tl.constexpr):
    """The dropout mask of a tile of scores, [ROWS, COLS] of int1: `fastbert.reference.keep_mask`, of scores.

    A thread of a tensor-core accumulator holds columns 8 j + 2 t and 8 j + 2 t + 1 of a row, with its own t in 0..3.
    The 16 elements of one counter are those of j = 0..7: no thread computes what it does not need itself.

    Args:
        rows: [ROWS].  first_col: a multiple of COLS, which is a power of two from 16 on.
    """
    ROWS: tl.constexpr = rows.shape[0]
    GROUPS: tl.constexpr = (COLS + 63) // 64
    zero = tl.zeros([ROWS, GROUPS, 4], tl.uint32)
    row = rows[:, None, None].to(tl.uint32)
    bits = keep_bits(
        seed, zero + _blocks(first_col, GROUPS)[None, :, :], zero + row, zero + head, zero + stream, THRESHOLD
    )
    shift = _bit_of_score(first_col, COLS).to(tl.uint32)
    kept = (bits[:, :, None, :, None] >> shift[None, None, :, None, :]) & 1
    return tl.reshape(kept, [ROWS, COLS]) != 0


@triton.jit
def keep_scores_transposed(
    seed, first_row, first_col, head, stream, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """The mask of `keep_scores` for ROWS neighbouring rows, transposed: [COLS, ROWS] of int1.

    Here a thread holds two columns and many rows: if each computed its own counters, all would be computed eight times.
    So they are computed once, in an order of their own. The bits of rows i and i + 8, which are one thread's, share a
    word, of whose bytes they take a half each; the sum that joins them keeps Triton from computing counters again on
    the other side, and what crosses over through shared memory is one word for 32 elements.
    """
    GROUPS: tl.constexpr = (COLS + 63) // 64
    zero = tl.zeros([GROUPS, 4, ROWS // 16, 8, 2], tl.uint32)
    row = tl.arange(0, ROWS // 16)[:, None, None] * 16 + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)
    row = (first_row + row).to(tl.uint32)[None, None, :, :, :]
    block = _blocks(first_col, GROUPS)[:, :, None, None, None]
    bits = keep_bits(seed, zero + block, zero + row, zero + head, zero + stream, THRESHOLD)
    words = tl.sum(bits << (4 * tl.arange(0, 2)).to(tl.uint32), axis=4).to(tl.int32, bitcast=True)
    bit = _bit_of_score(first_col, COLS)[None, :, None, :, None, None, None] + 4 * tl.arange(0, 2)[:, None]
    return tl.reshape(words[:, None, :, None, :, None, :] & (1 << bit), [COLS, ROWS]) != 0


@triton.jit
def _blocks(first_col, GROUPS: tl.constexpr):
    """[GROUPS, 4] counters' numbers: of each 64 columns, and each t."""
    return (first_col // 64 * 4 + tl.arange(0, GROUPS)[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.uint32)


@triton.jit
def _bit_of_score(first_col, COLS: tl.constexpr):
    """Which bit of `keep_bits` is that of column 8 j + 2 t + c: [J, 2], by j and c."""
    J: tl.constexpr = COLS // 8 if COLS < 64 else 8
    element = 2 * tl.arange(0, J)[:, None] + tl.arange(0, 2)[None, :]
    if COLS < 64:
        element += first_col % 64 // 4
    return 8 * (element % 4) + element // 4


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, accumulated in float32. The interpreter multiplies the bits of bfloat16 as integers, so not there."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
