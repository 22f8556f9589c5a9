"""Device functions that several kernels share: dropout's random bits, and products that the interpreter gets right."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10: four words of random bits for each counter. Specification: `fastbert.reference.philox`."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
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
def keep_words(seed, block, row, head, stream, THRESHOLD: tl.constexpr):
    """For 16 neighbouring columns, 16 bits: bit i is set where column 16 * block + i is kept.

    A byte is kept if it is at least THRESHOLD. Four bytes are compared at once, in bit 7 of each, and a multiplication
    gathers the four bits: 9 instructions for 4 elements, where shift, mask, compare and select take 4 for each.
    """
    w0, w1, w2, w3 = philox(seed, block, row, head, stream)
    bits = _kept_of_four(w0, THRESHOLD)
    bits |= _kept_of_four(w1, THRESHOLD) << 4
    bits |= _kept_of_four(w2, THRESHOLD) << 8
    return bits | _kept_of_four(w3, THRESHOLD) << 12


@triton.jit
def _kept_of_four(word, THRESHOLD: tl.constexpr):
    low = word & 0x7F7F7F7F  # without bit 7 a sum of bytes cannot reach the next byte
    if THRESHOLD <= 128:
        kept = (low + (128 - THRESHOLD) * 0x01010101) | word
    else:
        kept = (low + (256 - THRESHOLD) * 0x01010101) & word
    return (((kept >> 7) & 0x01010101) * 0x10204080) >> 28


@triton.jit
def keep_rows(seed_ptr, offs_m, first_col, head, stream, THRESHOLD: tl.constexpr, COLS: tl.constexpr):
    """The dropout mask of a tile, as `fastbert.reference.keep_mask` has it.

    Args:
        offs_m: [ROWS] of the mask's rows.  first_col: a multiple of 16.

    Returns:
        [ROWS, COLS] of int1.
    """
    ROWS: tl.constexpr = offs_m.shape[0]
    block = first_col // 16 + tl.arange(0, COLS // 16)
    counter = tl.zeros([ROWS, COLS // 16], tl.uint32)
    bits = keep_words(
        tl.load(seed_ptr), counter + block[None, :].to(tl.uint32), counter + offs_m[:, None].to(tl.uint32),
        counter + head, counter + stream, THRESHOLD,
    )  # fmt: skip
    kept = (bits[:, :, None] >> tl.arange(0, 16)[None, None, :].to(tl.uint32)) & 1
    return tl.reshape(kept, [ROWS, COLS]) != 0


@triton.jit
def keep_cols(seed_ptr, offs_m, first_col, head, stream, THRESHOLD: tl.constexpr, COLS: tl.constexpr):
    """`keep_rows`, transposed: [COLS, ROWS]."""
    ROWS: tl.constexpr = offs_m.shape[0]
    block = first_col // 16 + tl.arange(0, COLS // 16)
    counter = tl.zeros([COLS // 16, ROWS], tl.uint32)
    bits = keep_words(
        tl.load(seed_ptr), counter + block[:, None].to(tl.uint32), counter + offs_m[None, :].to(tl.uint32),
        counter + head, counter + stream, THRESHOLD,
    )  # fmt: skip
    kept = (bits[:, None, :] >> tl.arange(0, 16)[None, :, None].to(tl.uint32)) & 1
    return tl.reshape(kept, [COLS, ROWS]) != 0


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
