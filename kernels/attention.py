r"""Softmax attention over packed sequences, every token seeing its whole sequence, or what is left of it (causal).

    o   = dropout(p) v,   p = exp(s - lse),   s = scale * q k^T,   lse = log sum_n exp(s_n)
    dv  = dropout(p)^T do,   dp = dropout(do v^T),   ds = p * (dp - delta),   delta = sum(do * o)
    dq  = scale * ds k,   dk = scale * ds^T q

Online softmax over blocks of keys: for each block m' = max(m, max s), alpha = exp(m - m'), p = exp(s - m'),
    l' = l * alpha + sum p,    acc' = acc * alpha + p v.
Dao 2023, https://arxiv.org/abs/2307.08691. Specification: `fastbert.reference.attention`.
Arithmetic, forward: 4 D sum_b(seqlen_b^2) flops per head; backward: 10 D, in two passes 14 D. Causal: half of it, for
no pass visits a block that lies wholly above the diagonal.

The backward adds up in one order always. Where the longest sequence fits into one block, one program owns a whole
(sequence, head) and makes all three gradients of it. Longer ones take two passes: dq (and delta) by queries, then dk
and dv by keys; that computes s and dp twice, but needs neither atomics nor float32 sums in memory.

Chosen by what it compiles to (`make codegen`, bench/results/codegen.md), for nothing here has been timed yet. On sm_90,
head_dim 64, tiles of 128 x 64, a thread spends 10.8 instructions on a score in the forward, one of them on the MUFU:
issuing them (128 a clock) takes longer than the exponentials (16 a clock). exp2 as a polynomial takes 18.8, so it stays
on the MUFU. The row sum is taken of p before dropout, one addition a score. Dropout adds 6.0 instructions a score; with
16 neighbouring columns to a Philox counter it added 20, for each thread of a quad computed all of the quad's counters.
Both passes of the backward hold queries by rows, as the forward does, so that the masks fit there too; p and ds
go through shared memory to become operands of dv and dk.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _launch
from fastbert.kernels._device import LN_2, LOG2_E, dot, dot_add, keep_scores
from fastbert.kernels._triton import tl, triton


@triton.jit
def _tile(pid, cu_seqlens_ptr, B, blocks_per_seq, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """A program's sequence (its first token and its length), and where in it the program's block starts.

    Without SLOTS every sequence has `blocks_per_seq` programs, which is best for equal lengths. With SLOTS sequence b
    owns the slots from cu_seqlens[b] // BLOCK + b on: they are as many as it has blocks, or one more, so that
    T // BLOCK + B programs serve any mix of lengths.
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
        seq = pid // blocks_per_seq
        block = pid % blocks_per_seq
        start = tl.load(cu_seqlens_ptr + seq)
    return start.to(tl.int64), tl.load(cu_seqlens_ptr + seq + 1) - start, block * BLOCK


@triton.jit
def _rows(ptr, stride_m, stride_d, offs_m, offs_d, seqlen, HEAD_DIM: tl.constexpr):
    """Rows of one head; zeros beyond the sequence's end and in the columns that fill HEAD_DIM up to a power of two.

    ptr is a scalar and its offsets are int32: a block of 64-bit pointers would take twice the registers.
    """
    mask = (offs_m < seqlen)[:, None] & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + offs_m[:, None] * stride_m + offs_d[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # (T, H, D): T tokens of all sequences, end to end
    k_ptr,  # (T, H, D)
    v_ptr,  # (T, H, D)
    cu_seqlens_ptr,  # (B + 1,) int32: sequence b is tokens cu_seqlens[b] : cu_seqlens[b + 1]
    seed_ptr,  # () int64, or None
    o_ptr,  # (T, H, D)  out
    lse_ptr,  # (H, T)   out, fp32
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_om,
    stride_oh,
    stride_lh,
    B,
    H,
    blocks_per_seq,
    scale_log2,  # scale * log2(e), because exp2 is the exponential that the hardware has
    keep_scale,
    stream,
    CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # power of two >= HEAD_DIM
    BLOCK_M: tl.constexpr,  # queries per program
    BLOCK_N: tl.constexpr,  # keys per step
):
    head = (tl.program_id(0) % H).to(tl.int64)  # neighbouring programs read neighbouring memory
    start, seqlen, start_m = _tile(tl.program_id(0) // H, cu_seqlens_ptr, B, blocks_per_seq, SLOTS, BLOCK_M)
    if start_m >= seqlen:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    left_m = seqlen - start_m
    first = start + start_m  # this program's first token
    k_ptr += start * stride_kn + head * stride_kh
    v_ptr += start * stride_vn + head * stride_vh
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    q = _rows(q_ptr + first * stride_qm + head * stride_qh, stride_qm, stride_qd, offs_m, offs_d, left_m, HEAD_DIM)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the scores, base 2
    l_i = tl.zeros([BLOCK_M], tl.float32)  # running sum of exp2(score - m_i)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running o, not yet divided by l_i
    for start_n in range(0, tl.minimum(seqlen, start_m + BLOCK_M) if CAUSAL else seqlen, BLOCK_N):
        left_n = seqlen - start_n
        k = _rows(k_ptr, stride_kn, stride_kd, offs_n, offs_d, left_n, HEAD_DIM)
        s = dot(q, tl.trans(k), PRECISION)  # [BLOCK_M, BLOCK_N]
        if CAUSAL:
            if start_n + BLOCK_N > start_m:  # a row's first key is seen by it and came first: m_i gets finite
                s = tl.where(start_n + offs_n[None, :] <= start_m + offs_m[:, None], s, float("-inf"))
        if left_n < BLOCK_N:
            s = tl.where((offs_n < left_n)[None, :], s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)  # 0 at the first step: m_i is still -inf
        l_i = l_i * alpha + tl.sum(p, axis=1)
        m_i = m_new
        if THRESHOLD > 0:
            keep = keep_scores(seed, first + offs_m, start_n, head, stream, THRESHOLD, BLOCK_N)
            p = tl.where(keep, p, 0.0)
        v = _rows(v_ptr, stride_vn, stride_vd, offs_n, offs_d, left_n, HEAD_DIM)
        acc = dot_add(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn

    if THRESHOLD > 0:
        acc *= keep_scale
    mask = (offs_m < left_m)[:, None] & (offs_d < HEAD_DIM)[None, :]
    o_ptrs = o_ptr + first * stride_om + head * stride_oh + offs_m[:, None] * stride_om + offs_d[None, :]
    tl.store(o_ptrs, (acc / l_i[:, None]).to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + head * stride_lh + first + offs_m, (m_i + tl.log2(l_i)) * LN_2, mask=offs_m < left_m)


@triton.jit
def _probabilities_and_ds(
    q, k, v, do, lse2, delta, seed, start, start_m, start_n, seqlen, head, scale_log2, keep_scale, stream,
    CAUSAL: tl.constexpr, THRESHOLD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dropout(p), without its scale, and ds, without that of the scores: what both passes of the backward begin with.

    A key beyond the end has p = exp(-lse), which may be infinite: it is masked. A query beyond the end has q = do = 0,
    and lse = delta = 0: it adds nothing.
    """
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    p = tl.exp2(dot(q, tl.trans(k), PRECISION) * scale_log2 - lse2[:, None])  # [BLOCK_M, BLOCK_N]
    if CAUSAL:
        p = tl.where(offs_n[None, :] <= offs_m[:, None], p, 0.0)
    if start_n + BLOCK_N > seqlen:
        p = tl.where((offs_n < seqlen)[None, :], p, 0.0)
    dp = dot(do, tl.trans(v), PRECISION)
    if THRESHOLD > 0:
        keep = keep_scores(seed, start + offs_m, start_n, head, stream, THRESHOLD, BLOCK_N)
        ds = p * (tl.where(keep, dp * keep_scale, 0.0) - delta[:, None])
        p = tl.where(keep, p, 0.0)
    else:
        ds = p * (dp - delta[:, None])
    return p.to(q.dtype), ds.to(q.dtype)


@triton.jit
def _attention_bwd_dq_kernel(
    do_ptr,  # (T, H, D)
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H, D)
    v_ptr,  # (T, H, D)
    o_ptr,  # (T, H, D)
    lse_ptr,  # (H, T) fp32
    cu_seqlens_ptr,  # (B + 1,) int32
    seed_ptr,  # () int64, or None
    dq_ptr,  # (T, H, D)  out
    delta_ptr,  # (H, T)  out, fp32
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_om,  # of o and do
    stride_oh,
    stride_gm,  # of the gradients
    stride_gh,
    stride_lh,
    B,
    H,
    blocks_per_seq,
    scale,
    keep_scale,
    stream,
    CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries per program
    BLOCK_N: tl.constexpr,  # keys per step
):
    head = (tl.program_id(0) % H).to(tl.int64)
    start, seqlen, start_m = _tile(tl.program_id(0) // H, cu_seqlens_ptr, B, blocks_per_seq, SLOTS, BLOCK_M)
    if start_m >= seqlen:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    left_m = seqlen - start_m
    first = start + start_m
    offs_o = first * stride_om + head * stride_oh
    offs_l = head * stride_lh + first + offs_m
    k_ptr += start * stride_kn + head * stride_kh
    v_ptr += start * stride_vn + head * stride_vh
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    q = _rows(q_ptr + first * stride_qm + head * stride_qh, stride_qm, stride_qd, offs_m, offs_d, left_m, HEAD_DIM)
    do = _rows(do_ptr + offs_o, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
    o = _rows(o_ptr + offs_o, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    tl.store(delta_ptr + offs_l, delta, mask=offs_m < left_m)
    lse2 = tl.load(lse_ptr + offs_l, mask=offs_m < left_m, other=0.0) * LOG2_E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, tl.minimum(seqlen, start_m + BLOCK_M) if CAUSAL else seqlen, BLOCK_N):
        k = _rows(k_ptr, stride_kn, stride_kd, offs_n, offs_d, seqlen - start_n, HEAD_DIM)
        v = _rows(v_ptr, stride_vn, stride_vd, offs_n, offs_d, seqlen - start_n, HEAD_DIM)
        _p, ds = _probabilities_and_ds(
            q, k, v, do, lse2, delta, seed, start, start_m, start_n, seqlen, head, scale * LOG2_E, keep_scale, stream,
            CAUSAL, THRESHOLD, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dq = dot_add(ds, k, dq, PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    mask = (offs_m < left_m)[:, None] & (offs_d < HEAD_DIM)[None, :]
    dq_ptrs = dq_ptr + first * stride_gm + head * stride_gh + offs_m[:, None] * stride_gm + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attention_bwd_dkdv_kernel(
    do_ptr,  # (T, H, D)
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H, D)
    v_ptr,  # (T, H, D)
    o_ptr,  # (T, H, D), read only with ONE_BLOCK
    lse_ptr,  # (H, T) fp32
    delta_ptr,  # (H, T) fp32, read only without ONE_BLOCK
    cu_seqlens_ptr,  # (B + 1,) int32
    seed_ptr,  # () int64, or None
    dq_ptr,  # (T, H, D)  out, only with ONE_BLOCK
    dk_ptr,  # (T, H, D)  out
    dv_ptr,  # (T, H, D)  out
    stride_qm,
    stride_qh,
    stride_qd,
    stride_kn,
    stride_kh,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vd,
    stride_om,  # of o and do
    stride_oh,
    stride_gm,  # of the gradients
    stride_gh,
    stride_lh,
    B,
    H,
    blocks_per_seq,
    scale,
    keep_scale,
    stream,
    ONE_BLOCK: tl.constexpr,  # no sequence is longer than BLOCK_M and BLOCK_N: dq, too, is made here
    CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries per step
    BLOCK_N: tl.constexpr,  # keys per program
):
    head = (tl.program_id(0) % H).to(tl.int64)
    start, seqlen, start_n = _tile(tl.program_id(0) // H, cu_seqlens_ptr, B, blocks_per_seq, SLOTS, BLOCK_N)
    if start_n >= seqlen:
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    left_n = seqlen - start_n
    first = start + start_n
    first_m = start_n // BLOCK_M * BLOCK_M if CAUSAL else 0  # the first query that sees a key of this block
    q_ptr += (start + first_m) * stride_qm + head * stride_qh
    do_ptr += (start + first_m) * stride_om + head * stride_oh
    lse_ptr += head * stride_lh + start
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    k = _rows(k_ptr + first * stride_kn + head * stride_kh, stride_kn, stride_kd, offs_n, offs_d, left_n, HEAD_DIM)
    v = _rows(v_ptr + first * stride_vn + head * stride_vh, stride_vn, stride_vd, offs_n, offs_d, left_n, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_m in range(first_m, BLOCK_M if ONE_BLOCK else seqlen, BLOCK_M):
        left_m = seqlen - start_m
        q = _rows(q_ptr, stride_qm, stride_qd, offs_m, offs_d, left_m, HEAD_DIM)
        do = _rows(do_ptr, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
        lse2 = tl.load(lse_ptr + start_m + offs_m, mask=offs_m < left_m, other=0.0) * LOG2_E
        if ONE_BLOCK:
            o = _rows(o_ptr + start * stride_om + head * stride_oh, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
            delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        else:
            delta_ptrs = delta_ptr + head * stride_lh + start + start_m + offs_m
            delta = tl.load(delta_ptrs, mask=offs_m < left_m, other=0.0)
        p, ds = _probabilities_and_ds(
            q, k, v, do, lse2, delta, seed, start, start_m, start_n, seqlen, head, scale * LOG2_E, keep_scale, stream,
            CAUSAL, THRESHOLD, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dv = dot_add(tl.trans(p), do, dv, PRECISION)
        dk = dot_add(tl.trans(ds), q, dk, PRECISION)
        if ONE_BLOCK:
            dq = dot(ds, k, PRECISION) * scale
            dq_ptrs = dq_ptr + start * stride_gm + head * stride_gh + offs_m[:, None] * stride_gm + offs_d[None, :]
            mask = (offs_m < left_m)[:, None] & (offs_d < HEAD_DIM)[None, :]
            tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=mask)
        q_ptr += BLOCK_M * stride_qm
        do_ptr += BLOCK_M * stride_om

    if THRESHOLD > 0:
        dv *= keep_scale
    mask = (offs_n < left_n)[:, None] & (offs_d < HEAD_DIM)[None, :]
    offs_g = first * stride_gm + head * stride_gh + offs_n[:, None] * stride_gm + offs_d[None, :]
    tl.store(dk_ptr + offs_g, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs_g, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def _blocks(pass_: str, HEAD_DIM: int, dtype: torch.dtype, max_seqlen: int, chip: _launch.Chip) -> _launch.Blocks:
    """The tile of one pass: "fwd", "dq", "dkdv", or "one_block" of the latter. Shorter sequences get smaller ones.

    What each compiles to stands in bench/results/codegen.md. On Hopper 128 x 64 in 128 registers keeps two programs
    on a multiprocessor, so that one's exponentials run beside the other's products.
    """
    if dtype == torch.float32:
        tiles = _TF32 if _launch.precision(dtype) == "tf32" else _FLOAT32
    else:
        tiles = {8: _AMPERE, 9: _HOPPER}.get(chip.capability[0], _BLACKWELL)
    wide = HEAD_DIM > 64 or HEAD_DIM % 8 != 0  # rows of odd sizes are loaded in pieces, each with its own address
    tile = tiles[256 if HEAD_DIM > 128 else 128 if wide else 64][pass_]
    longest = max(16, triton.next_power_of_2(max_seqlen))
    if longest >= tile.M and longest >= tile.N:
        return tile
    M, N = min(tile.M, longest), min(tile.N, longest)
    if dtype == torch.float32:
        num_warps = M * N // 128
    else:
        num_warps = M // 16  # a warp has 16 rows of an accumulator
    num_warps = max(1, num_warps, HEAD_DIM // 16 if wide else 1)
    return _launch.Blocks(M, N, min(tile.num_warps, num_warps), tile.num_stages)


_Tiles = dict[int, dict[str, _launch.Blocks]]  # by the largest head_dim, and by pass
_HOPPER: _Tiles = {
    64: {
        "fwd": _launch.Blocks(128, 64, 8, 3, maxnreg=128),
        "dq": _launch.Blocks(128, 64, 8, 2, maxnreg=128),
        "dkdv": _launch.Blocks(128, 64, 8, 2),
        "one_block": _launch.Blocks(128, 128, 8, 1),
    },
    128: {
        "fwd": _launch.Blocks(128, 64, 8, 2),
        "dq": _launch.Blocks(128, 32, 8, 2),
        "dkdv": _launch.Blocks(32, 64, 4, 1),
    },
    256: {
        "fwd": _launch.Blocks(64, 32, 8, 1),
        "dq": _launch.Blocks(64, 32, 8, 1),
        "dkdv": _launch.Blocks(32, 64, 8, 1),
    },
}
_BLACKWELL: _Tiles = {
    **_HOPPER,
    64: {
        "fwd": _launch.Blocks(128, 64, 4, 3),
        "dq": _launch.Blocks(128, 64, 8, 2),
        "dkdv": _launch.Blocks(128, 64, 8, 2),
        "one_block": _launch.Blocks(128, 128, 8, 1),
    },
    128: {**_HOPPER[128], "dkdv": _launch.Blocks(64, 64, 8, 1)},
}
_AMPERE: _Tiles = {
    64: {
        "fwd": _launch.Blocks(64, 64, 4, 3),
        "dq": _launch.Blocks(64, 32, 4, 2),
        "dkdv": _launch.Blocks(64, 32, 4, 2),
        "one_block": _launch.Blocks(64, 64, 4, 1),
    },
    128: {
        "fwd": _launch.Blocks(64, 32, 4, 2),
        "dq": _launch.Blocks(64, 32, 4, 1),
        "dkdv": _launch.Blocks(32, 32, 4, 1),
    },
    256: {
        "fwd": _launch.Blocks(32, 32, 4, 1),
        "dq": _launch.Blocks(32, 32, 4, 1),
        "dkdv": _launch.Blocks(16, 32, 4, 1),
    },
}
_FLOAT32: _Tiles = {
    64: {
        "fwd": _launch.Blocks(64, 32, 4, 1),
        "dq": _launch.Blocks(32, 32, 8, 1),
        "dkdv": _launch.Blocks(32, 32, 8, 1),
        "one_block": _launch.Blocks(32, 32, 8, 1),
    },
    128: {
        "fwd": _launch.Blocks(64, 64, 8, 1),
        "dq": _launch.Blocks(16, 16, 8, 1),
        "dkdv": _launch.Blocks(16, 16, 4, 1),
    },
    256: {
        "fwd": _launch.Blocks(32, 32, 8, 1),
        "dq": _launch.Blocks(16, 16, 8, 1),
        "dkdv": _launch.Blocks(16, 16, 4, 1),
    },
}


_TF32: _Tiles = {
    64: {
        "fwd": _launch.Blocks(64, 64, 8, 2),
        "dq": _launch.Blocks(64, 32, 8, 1),
        "dkdv": _launch.Blocks(32, 32, 4, 1),
        "one_block": _launch.Blocks(32, 32, 4, 1),
    },
    128: {
        "fwd": _launch.Blocks(64, 32, 4, 1),
        "dq": _launch.Blocks(32, 32, 4, 1),
        "dkdv": _launch.Blocks(32, 32, 4, 1),
    },
    256: _FLOAT32[256],
}


def _one_block(HEAD_DIM: int, dtype: torch.dtype, max_seqlen: int, chip: _launch.Chip) -> bool:
    """Whether a program of the backward can own a whole (sequence, head)."""
    small = HEAD_DIM <= 64 and HEAD_DIM % 8 == 0
    return small and max_seqlen <= _blocks("one_block", HEAD_DIM, dtype, max_seqlen, chip).M


def _grid(cu_seqlens: Tensor, T: int, H: int, max_seqlen: int, BLOCK: int) -> tuple[tuple[int], int, int, bool]:
    """The grid, the number of sequences, the programs for each, and whether `_tile` hands out slots instead."""
    B = cu_seqlens.shape[0] - 1
    blocks_per_seq = triton.cdiv(max_seqlen, BLOCK)
    slots = T // BLOCK + B
    even = B * blocks_per_seq <= slots
    return (H * (B * blocks_per_seq if even else slots),), B, blocks_per_seq, not even


def _outputs(q: Tensor, k: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    T, H, D = q.shape[0], *q.shape[-2:]
    return q.new_empty(T, H, D), q.new_empty(H, T, dtype=reference.accumulator(q))


def _launch_fwd(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    if q.dtype == torch.float64:
        return reference.attention(q, k, v, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed, stream)
    o, lse = _outputs(q, k)
    q, k, v = reference.separate(q, k, v)
    T, H, D = q.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))
    blocks = _blocks("fwd", D, q.dtype, max_seqlen, _launch.chip(q.device))
    grid, B, blocks_per_seq, SLOTS = _grid(cu_seqlens, T, H, max_seqlen, blocks.M)
    _attention_fwd_kernel[grid](
        q, k, v, cu_seqlens, seed, o, lse,
        *q.stride(), *k.stride(), *v.stride(), *o.stride()[:2], lse.stride(0),
        B, H, blocks_per_seq, scale * LOG2_E.value, reference.keep_scale(dropout_p), stream,
        CAUSAL=causal, THRESHOLD=reference.drop_threshold(dropout_p), PRECISION=_launch.precision(q.dtype),
        SLOTS=SLOTS, HEAD_DIM=D, BLOCK_D=BLOCK_D, **blocks.meta(),
    )  # fmt: skip
    return o, lse


def _launch_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.dtype == torch.float64:
        return reference.attention_backward(
            do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed, stream
        )
    gradients = reference.attention_gradients(q, k, v)
    dq, dk, dv = reference.separate(gradients[0], *gradients[1:] if k is not None else (None, None))
    q, k, v = reference.separate(q, k, v)
    T, H, D = q.shape
    chip = _launch.chip(q.device)
    delta = torch.empty_like(lse)
    BLOCK_D = max(16, triton.next_power_of_2(D))
    strides = *q.stride(), *k.stride(), *v.stride(), *o.stride()[:2], *dq.stride()[:2], lse.stride(0)
    numbers = scale, reference.keep_scale(dropout_p), stream
    one_block = _one_block(D, q.dtype, max_seqlen, chip)
    flags = {
        "CAUSAL": causal,
        "THRESHOLD": reference.drop_threshold(dropout_p),
        "PRECISION": _launch.precision(q.dtype),
        "HEAD_DIM": D,
        "BLOCK_D": BLOCK_D,
    }
    if not one_block:
        blocks = _blocks("dq", D, q.dtype, max_seqlen, chip)
        grid, *tiling, SLOTS = _grid(cu_seqlens, T, H, max_seqlen, blocks.M)
        _attention_bwd_dq_kernel[grid](
            do, q, k, v, o, lse, cu_seqlens, seed, dq, delta, *strides, tiling[0], H, tiling[1], *numbers,
            SLOTS=SLOTS, **flags, **blocks.meta(),
        )  # fmt: skip
    blocks = _blocks("one_block" if one_block else "dkdv", D, q.dtype, max_seqlen, chip)
    grid, *tiling, SLOTS = _grid(cu_seqlens, T, H, max_seqlen, blocks.N)
    _attention_bwd_dkdv_kernel[grid](
        do, q, k, v, o, lse, delta, cu_seqlens, seed, dq, dk, dv, *strides, tiling[0], H, tiling[1], *numbers,
        ONE_BLOCK=one_block, SLOTS=SLOTS, **flags, **blocks.meta(),
    )  # fmt: skip
    return gradients


def _scores(cu_seqlens: Tensor, T: int, max_seqlen: int, causal: bool) -> int:
    """How many a head uses; while tracing, when lengths are unknown, at most."""
    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.is_meta:
        return T * (max_seqlen + 1) // 2 if causal else T * max_seqlen
    seqlens = cu_seqlens.diff().long()
    return int((seqlens * (seqlens + 1) // 2 if causal else seqlens.square()).sum())


def _flops_fwd(
    q: Tensor, k: Any, v: Any, cu_seqlens: Tensor, max_seqlen: int, scale: float, causal: bool, *_: Any
) -> int:
    T, H, D = q.shape[0], *q.shape[-2:]
    return 4 * H * D * _scores(cu_seqlens, T, max_seqlen, causal)


def _flops_bwd(do: Tensor, q: Any, k: Any, v: Any, o: Any, lse: Any, *rest: Any) -> int:
    (T, H, D), (cu_seqlens, max_seqlen, _scale, causal, *_) = do.shape, rest
    return 10 * H * D * _scores(cu_seqlens, T, max_seqlen, causal)


attention_bwd = _library.define(
    "attention_bwd(Tensor do, Tensor q, Tensor? k, Tensor? v, Tensor o, Tensor lse, Tensor cu_seqlens,"
    " SymInt max_seqlen, float scale, bool causal, float dropout_p, Tensor? seed, int stream)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    cuda=_launch_bwd,
    cpu=_cpu.attention_backward,
    fake=lambda do, q, k, v, *_: reference.attention_gradients(q, k, v),
    flops=_flops_bwd,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, *ctx.numbers, seed, ctx.stream = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, seed)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    dq, dk, dv = attention_bwd(do.contiguous(), *tensors, *ctx.numbers, seed, ctx.stream)
    if tensors[1] is None:
        dk = dv = None
    return dq, dk, dv, None, None, None, None, None, None, None


attention_fwd = _library.define(
    "attention_fwd(Tensor q, Tensor? k, Tensor? v, Tensor cu_seqlens, SymInt max_seqlen, float scale, bool causal,"
    " float dropout_p, Tensor? seed, int stream) -> (Tensor o, Tensor lse)",
    cuda=_launch_fwd,
    cpu=_cpu.attention,
    fake=_outputs,
    setup_context=_save,
    backward=_backward,
    flops=_flops_fwd,
)
