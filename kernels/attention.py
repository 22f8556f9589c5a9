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
from fastbert.kernels import _attention_bwd, _attention_cpu, _attention_tiles, _launch
from fastbert.kernels._device import LN_2, LOG2_E, dot, dot_add, keep_scores
from fastbert.kernels._packed import grid_of, head_rows, poison, tile_of
from fastbert.kernels._triton import tl, triton


@triton.jit(do_not_specialize=["T", "B", "H", "blocks_per_seq", "max_seqlen", "stream"])
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
    T,
    B,
    H,
    blocks_per_seq,
    max_seqlen,
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
    seq, start, seqlen, start_m = tile_of(tl.program_id(0) // H, cu_seqlens_ptr, T, B, blocks_per_seq, SLOTS, BLOCK_M)
    o_ptr += head * stride_oh
    lse_ptr += head * T
    poison(
        o_ptr, None, None, stride_om, seq, start, seqlen, start_m, T, B, blocks_per_seq, max_seqlen, SLOTS, BLOCK_M,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    poison(lse_ptr, None, None, 1, seq, start, seqlen, start_m, T, B, blocks_per_seq, max_seqlen, SLOTS, BLOCK_M, 1, 1)
    if (start_m >= seqlen) | (seqlen > max_seqlen):
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

    q = head_rows(q_ptr + first * stride_qm + head * stride_qh, stride_qm, stride_qd, offs_m, offs_d, left_m, HEAD_DIM)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the scores, base 2
    l_i = tl.zeros([BLOCK_M], tl.float32)  # running sum of exp2(score - m_i)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # running o, not yet divided by l_i
    tl.assume(seqlen > 0)  # a sum that is also defined on a way around the loop keeps products from overlapping
    for start_n in range(0, tl.minimum(seqlen, start_m + BLOCK_M) if CAUSAL else seqlen, BLOCK_N):
        left_n = seqlen - start_n
        k = head_rows(k_ptr, stride_kn, stride_kd, offs_n, offs_d, left_n, HEAD_DIM)
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
        v = head_rows(v_ptr, stride_vn, stride_vd, offs_n, offs_d, left_n, HEAD_DIM)
        acc = dot_add(p.to(v.dtype), v, acc * alpha[:, None], PRECISION)
        k_ptr += BLOCK_N * stride_kn
        v_ptr += BLOCK_N * stride_vn

    if THRESHOLD > 0:
        acc *= keep_scale
    mask = (offs_m < left_m)[:, None] & (offs_d < HEAD_DIM)[None, :]
    o_ptrs = o_ptr + first * stride_om + offs_m[:, None] * stride_om + offs_d[None, :]
    tl.store(o_ptrs, (acc / l_i[:, None]).to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + first + offs_m, (m_i + tl.log2(l_i)) * LN_2, mask=offs_m < left_m)


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
    if cu_seqlens.shape[0] == 1:  # no sequence, no program
        return o.fill_(float("nan")), lse.fill_(float("nan"))
    BLOCK_D = max(16, triton.next_power_of_2(D))
    blocks = _attention_tiles.blocks("fwd", D, q.dtype, max_seqlen, _launch.chip(q.device), causal)
    grid, B, blocks_per_seq, SLOTS = grid_of(cu_seqlens, T, H, max_seqlen, blocks.M)
    _launch.launch(
        _attention_fwd_kernel, grid,
        q, k, v, cu_seqlens, seed, o, lse,
        *q.stride(), *k.stride(), *v.stride(), *o.stride()[:2],
        T, B, H, blocks_per_seq, max_seqlen, scale * LOG2_E.value, reference.keep_scale(dropout_p), stream,
        CAUSAL=causal, THRESHOLD=reference.drop_threshold(dropout_p), PRECISION=_launch.precision(q.dtype),
        SLOTS=SLOTS, HEAD_DIM=D, BLOCK_D=BLOCK_D, **blocks.meta(),
    )  # fmt: skip
    return o, lse


def _launch_bwd(do: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (reference.attention_backward if q.dtype == torch.float64 else _attention_bwd.launch)(do, q, *rest)


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
    cpu=_attention_cpu.attention_backward,
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
    cpu=_attention_cpu.attention,
    fake=_outputs,
    setup_context=_save,
    backward=_backward,
    flops=_flops_fwd,
)
