r"""The backward of attention: its kernels, and the launcher that chooses among them.

    dv  = dropout(p)^T do,   dp = dropout(do v^T),   ds = p * (dp - delta),   delta = sum(do * o)
    dq  = scale * ds k,   dk = scale * ds^T q

It adds up in one order always. Where the longest sequence fits into one block, one program owns a whole (sequence,
head) and makes all three gradients of it. Longer ones take two passes: dq (and delta) by queries, then dk and dv by
keys; that computes s and dp twice, but needs neither atomics nor float32 sums in memory.

Whoever makes dk and dv holds scores transposed, keys by rows: p^T and ds^T then are what tensor cores take from
registers, and go through no shared memory. The dropout mask is computed by queries. The pass by queries leaves its bits
in memory for the other, one for each score and head, T * max_seqlen / 8 bytes a head; where one program does all, they
go through shared memory. On sm_90, head_dim 64, tiles of 64 queries x 128 keys, a thread spends 10.1 instructions on
a score in the pass by keys, 12.6 with dropout (20.7 with queries by rows, where it computed the bits again).

With the scale 1 / P(keep) of dropout taken out of dp, and put into delta and the results instead:
    ds = P(keep) * (keep * p * dp' - p * delta'),   dp' = do v^T,   delta' = P(keep) * delta,   dq = scale / P(keep) ...
"""

import torch
from torch import Tensor

from fastbert import reference
from fastbert.kernels import _attention_tiles, _launch
from fastbert.kernels._device import (
    LOG2_E,
    dot,
    dot_add,
    keep_scores,
    keep_scores_transposed,
)
from fastbert.kernels._packed import grid_of, head_rows, poison, tile_of
from fastbert.kernels._triton import tl, triton


@triton.jit
def _kept_and_ds(p, dp, delta, keep, THRESHOLD: tl.constexpr):
    """dropout(p), without its scale, and ds, without its own."""
    if THRESHOLD > 0:
        kept = tl.where(keep, p, 0.0)
        return kept, kept * dp - p * delta
    return p, p * (dp - delta)


_VARYING = ["T", "B", "H", "blocks_per_seq", "max_seqlen", "stream"]


@triton.jit(do_not_specialize=_VARYING)
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
    delta_ptr,  # (H, T)  out, fp32, times P(keep)
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
    T,
    B,
    H,
    blocks_per_seq,
    max_seqlen,
    scale,
    keep_p,
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
    seq, start, seqlen, start_m = tile_of(tl.program_id(0) // H, cu_seqlens_ptr, T, B, blocks_per_seq, SLOTS, BLOCK_M)
    dq_ptr += head * stride_gh
    poison(
        dq_ptr, None, None, stride_gm, seq, start, seqlen, start_m, T, B, blocks_per_seq, max_seqlen, SLOTS, BLOCK_M,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if (start_m >= seqlen) | (seqlen > max_seqlen):
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    left_m = seqlen - start_m
    first = start + start_m
    offs_o = first * stride_om + head * stride_oh
    offs_l = head * T + first + offs_m
    k_ptr += start * stride_kn + head * stride_kh
    v_ptr += start * stride_vn + head * stride_vh
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    q = head_rows(q_ptr + first * stride_qm + head * stride_qh, stride_qm, stride_qd, offs_m, offs_d, left_m, HEAD_DIM)
    do = head_rows(do_ptr + offs_o, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
    o = head_rows(o_ptr + offs_o, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1) * keep_p
    tl.store(delta_ptr + offs_l, delta, mask=offs_m < left_m)
    lse2 = tl.load(lse_ptr + offs_l, mask=offs_m < left_m, other=0.0) * LOG2_E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tl.assume(seqlen > 0)
    for start_n in range(0, tl.minimum(seqlen, start_m + BLOCK_M) if CAUSAL else seqlen, BLOCK_N):
        left_n = seqlen - start_n
        k = head_rows(k_ptr, stride_kn, stride_kd, offs_n, offs_d, left_n, HEAD_DIM)
        v = head_rows(v_ptr, stride_vn, stride_vd, offs_n, offs_d, left_n, HEAD_DIM)
        p = tl.exp2(dot(q, tl.trans(k), PRECISION) * (scale * LOG2_E) - lse2[:, None])  # [BLOCK_M, BLOCK_N]
        if CAUSAL:
            p = tl.where(start_n + offs_n[None, :] <= start_m + offs_m[:, None], p, 0.0)
        if left_n < BLOCK_N:  # a key beyond the end has p = exp(-lse), which may be infinite
            p = tl.where((offs_n < left_n)[None, :], p, 0.0)
        dp = dot(do, tl.trans(v), PRECISION)
        if THRESHOLD > 0:
            keep = keep_scores(seed, first + offs_m, start_n, head, stream, THRESHOLD, BLOCK_N)
            dp = tl.where(keep, dp, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot_add(ds.to(k.dtype), k, dq, PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn
    mask = (offs_m < left_m)[:, None] & (offs_d < HEAD_DIM)[None, :]
    dq_ptrs = dq_ptr + first * stride_gm + offs_m[:, None] * stride_gm + offs_d[None, :]
    tl.store(dq_ptrs, (dq * (scale * keep_scale)).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_dkdv_kernel(
    do_ptr,  # (T, H, D)
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H, D)
    v_ptr,  # (T, H, D)
    lse_ptr,  # (H, T) fp32
    delta_ptr,  # (H, T) fp32, times P(keep)
    cu_seqlens_ptr,  # (B + 1,) int32
    seed_ptr,  # () int64, or None
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
    stride_om,  # of do
    stride_oh,
    stride_gm,  # of the gradients
    stride_gh,
    T,
    B,
    H,
    blocks_per_seq,
    max_seqlen,
    scale,
    keep_scale,
    stream,
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
    seq, start, seqlen, start_n = tile_of(tl.program_id(0) // H, cu_seqlens_ptr, T, B, blocks_per_seq, SLOTS, BLOCK_N)
    dk_ptr += head * stride_gh
    dv_ptr += head * stride_gh
    poison(
        dk_ptr, dv_ptr, None, stride_gm, seq, start, seqlen, start_n, T, B, blocks_per_seq, max_seqlen, SLOTS, BLOCK_N,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if (start_n >= seqlen) | (seqlen > max_seqlen):
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    left_n = seqlen - start_n
    first = start + start_n
    first_m = start_n // BLOCK_M * BLOCK_M if CAUSAL else 0  # the first query that sees a key of this block
    q_ptr += (start + first_m) * stride_qm + head * stride_qh
    do_ptr += (start + first_m) * stride_om + head * stride_oh
    offs_l = head * T + start + offs_m
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)

    k = head_rows(k_ptr + first * stride_kn + head * stride_kh, stride_kn, stride_kd, offs_n, offs_d, left_n, HEAD_DIM)
    v = head_rows(v_ptr + first * stride_vn + head * stride_vh, stride_vn, stride_vd, offs_n, offs_d, left_n, HEAD_DIM)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # Without this ptxas sees sums that a way around the loop defines, and waits behind every tensor-core instruction.
    tl.assume(first_m < seqlen)
    for start_m in range(first_m, seqlen, BLOCK_M):
        # A query beyond the end has q = do = 0 and lse = delta = 0, so that it adds nothing.
        left_m = seqlen - start_m
        q = head_rows(q_ptr, stride_qm, stride_qd, offs_m, offs_d, left_m, HEAD_DIM)
        do = head_rows(do_ptr, stride_om, 1, offs_m, offs_d, left_m, HEAD_DIM)
        lse2 = tl.load(lse_ptr + start_m + offs_l, mask=offs_m < left_m, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + start_m + offs_l, mask=offs_m < left_m, other=0.0)
        keep = lse2
        if THRESHOLD > 0:
            keep = keep_scores_transposed(seed, start + start_m, start_n, head, stream, THRESHOLD, BLOCK_M, BLOCK_N)
        p = tl.exp2(dot(k, tl.trans(q), PRECISION) * (scale * LOG2_E) - lse2[None, :])  # [BLOCK_N, BLOCK_M]
        if CAUSAL:
            p = tl.where((start_n + offs_n)[:, None] <= (start_m + offs_m)[None, :], p, 0.0)
        dp = dot(v, tl.trans(do), PRECISION)
        kept, ds = _kept_and_ds(p, dp, delta[None, :], keep, THRESHOLD)
        dv = dot_add(kept.to(do.dtype), do, dv, PRECISION)
        dk = dot_add(ds.to(q.dtype), q, dk, PRECISION)
        q_ptr += BLOCK_M * stride_qm
        do_ptr += BLOCK_M * stride_om

    mask = (offs_n < left_n)[:, None] & (offs_d < HEAD_DIM)[None, :]
    offs_g = first * stride_gm + offs_n[:, None] * stride_gm + offs_d[None, :]
    tl.store(dk_ptr + offs_g, (dk * (scale * keep_scale)).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offs_g, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def _attention_bwd_one_block_kernel(
    do_ptr,  # (T, H, D)
    q_ptr,  # (T, H, D)
    k_ptr,  # (T, H, D)
    v_ptr,  # (T, H, D)
    o_ptr,  # (T, H, D)
    lse_ptr,  # (H, T) fp32
    cu_seqlens_ptr,  # (B + 1,) int32
    seed_ptr,  # () int64, or None
    dq_ptr,  # (T, H, D)  out
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
    T,
    B,
    H,
    blocks_per_seq,
    max_seqlen,
    scale,
    keep_p,
    keep_scale,
    stream,
    CAUSAL: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    SLOTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # no sequence has more queries,
    BLOCK_N: tl.constexpr,  # or more keys
):
    head = (tl.program_id(0) % H).to(tl.int64)
    seq, start, seqlen, first = tile_of(tl.program_id(0) // H, cu_seqlens_ptr, T, B, blocks_per_seq, SLOTS, BLOCK_N)
    dq_ptr += head * stride_gh
    dk_ptr += head * stride_gh
    dv_ptr += head * stride_gh
    poison(
        dq_ptr, dk_ptr, dv_ptr, stride_gm, seq, start, seqlen, first, T, B, blocks_per_seq, max_seqlen, SLOTS, BLOCK_N,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if (first >= seqlen) | (seqlen > max_seqlen):
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_o = start * stride_om + head * stride_oh
    q = head_rows(q_ptr + start * stride_qm + head * stride_qh, stride_qm, stride_qd, offs_m, offs_d, seqlen, HEAD_DIM)
    k = head_rows(k_ptr + start * stride_kn + head * stride_kh, stride_kn, stride_kd, offs_n, offs_d, seqlen, HEAD_DIM)
    v = head_rows(v_ptr + start * stride_vn + head * stride_vh, stride_vn, stride_vd, offs_n, offs_d, seqlen, HEAD_DIM)
    do = head_rows(do_ptr + offs_o, stride_om, 1, offs_m, offs_d, seqlen, HEAD_DIM)
    o = head_rows(o_ptr + offs_o, stride_om, 1, offs_m, offs_d, seqlen, HEAD_DIM)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1) * keep_p
    lse2 = tl.load(lse_ptr + head * T + start + offs_m, mask=offs_m < seqlen, other=0.0) * LOG2_E
    keep = lse2
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
        keep = keep_scores_transposed(seed, start, 0, head, stream, THRESHOLD, BLOCK_M, BLOCK_N)
    p = tl.exp2(dot(k, tl.trans(q), PRECISION) * (scale * LOG2_E) - lse2[None, :])  # [BLOCK_N, BLOCK_M]
    seen = (offs_n < seqlen)[:, None]  # a key beyond the end has p = exp(-lse), which may be infinite
    if CAUSAL:
        seen = seen & (offs_n[:, None] <= offs_m[None, :])
    p = tl.where(seen, p, 0.0)
    dp = dot(v, tl.trans(do), PRECISION)
    kept, ds = _kept_and_ds(p, dp, delta[None, :], keep, THRESHOLD)
    ds = ds.to(q.dtype)
    dv = dot(kept.to(do.dtype), do, PRECISION)
    dk = dot(ds, q, PRECISION)
    dq = dot(tl.trans(ds), k, PRECISION)
    in_rows, in_cols = (offs_n < seqlen)[:, None], (offs_d < HEAD_DIM)[None, :]
    offs_g = start * stride_gm + offs_n[:, None] * stride_gm + offs_d[None, :]
    tl.store(dv_ptr + offs_g, (dv * keep_scale).to(dv_ptr.dtype.element_ty), mask=in_rows & in_cols)
    tl.store(dk_ptr + offs_g, (dk * (scale * keep_scale)).to(dk_ptr.dtype.element_ty), mask=in_rows & in_cols)
    in_rows = (offs_m < seqlen)[:, None]
    offs_g = start * stride_gm + offs_m[:, None] * stride_gm + offs_d[None, :]
    tl.store(dq_ptr + offs_g, (dq * (scale * keep_scale)).to(dq_ptr.dtype.element_ty), mask=in_rows & in_cols)


def launch(
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
    """As `fastbert.reference.attention_backward`, but not in float64."""
    gradients = reference.attention_gradients(q, k, v)
    dq, dk, dv = reference.separate(gradients[0], *gradients[1:] if k is not None else (None, None))
    q, k, v = reference.separate(q, k, v)
    T, H, D = q.shape
    B = cu_seqlens.shape[0] - 1
    if B == 0:
        for gradient in gradients:
            gradient.fill_(float("nan"))
        return gradients
    chip, threshold = _launch.chip(q.device), reference.drop_threshold(dropout_p)
    strides = *q.stride(), *k.stride(), *v.stride(), *o.stride()[:2], *dq.stride()[:2]
    keep_p, keep_scale = 1.0 - threshold / 256, reference.keep_scale(dropout_p)
    flags = {
        "CAUSAL": causal,
        "THRESHOLD": threshold,
        "PRECISION": _launch.precision(q.dtype),
        "HEAD_DIM": D,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),
    }
    if _attention_tiles.takes_one_block(D, q.dtype, max_seqlen, chip):
        blocks = _attention_tiles.blocks("one_block", D, q.dtype, max_seqlen, chip)
        grid, B, blocks_per_seq, SLOTS = grid_of(cu_seqlens, T, H, max_seqlen, blocks.N)
        _launch.launch(
            _attention_bwd_one_block_kernel, grid,
            do, q, k, v, o, lse, cu_seqlens, seed, dq, dk, dv, *strides,
            T, B, H, blocks_per_seq, max_seqlen, scale, keep_p, keep_scale, stream,
            SLOTS=SLOTS, **flags, **blocks.meta(),
        )  # fmt: skip
        return gradients
    delta = torch.empty_like(lse)
    blocks = _attention_tiles.blocks("dq", D, q.dtype, max_seqlen, chip, causal)
    grid, B, blocks_per_seq, SLOTS = grid_of(cu_seqlens, T, H, max_seqlen, blocks.M)
    _launch.launch(
        _attention_bwd_dq_kernel, grid,
        do, q, k, v, o, lse, cu_seqlens, seed, dq, delta, *strides,
        T, B, H, blocks_per_seq, max_seqlen, scale, keep_p, keep_scale, stream,
        SLOTS=SLOTS, **flags, **blocks.meta(),
    )  # fmt: skip
    blocks = _attention_tiles.blocks("dkdv", D, q.dtype, max_seqlen, chip)
    grid, B, blocks_per_seq, SLOTS = grid_of(cu_seqlens, T, H, max_seqlen, blocks.N)
    _launch.launch(
        _attention_bwd_dkdv_kernel, grid,
        do, q, k, v, lse, delta, cu_seqlens, seed, dk, dv, *strides,
        T, B, H, blocks_per_seq, max_seqlen, scale, keep_scale, stream,
        SLOTS=SLOTS, **flags, **blocks.meta(),
    )  # fmt: skip
    return gradients
