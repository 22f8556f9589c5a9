r"""Softmax attention over packed sequences, every token seeing its whole sequence (no mask tensor).

    o   = dropout(p) v,   p = exp(s - lse),   s = scale * q k^T,   lse = log sum_n exp(s_n)
    dv  = dropout(p)^T do,   dp = dropout(do v^T),   ds = p * (dp - delta),   delta = sum(do * o)
    dq  = scale * ds k,   dk = scale * ds^T q

Dao 2023, https://arxiv.org/abs/2307.08691. Specification: `fastbert.reference.attention`.
Arithmetic, forward: 4 D sum_b(seqlen_b^2) flops per head; backward: 10 D.
The CPU side runs PyTorch's flash kernel once for each run of sequences of one length, so a batch without padding is
a single call on views. With dropout it computes one sequence after the other, as PyTorch does.
The CUDA side is the reference until the Triton kernel is in.
"""

from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu


def _runs(cu_seqlens: Tensor) -> list[tuple[int, int, int]]:
    """Neighbouring sequences of one length, as (first token, sequences, their length); empty ones are left out."""
    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    runs, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        if length > 0:
            runs.append((start, count, length))
        start += count * length
    return runs


def _as_batch(t: Tensor, start: int, count: int, length: int) -> Tensor:
    """(count, H, length, D): a view of some of the packed tokens."""
    return t[start : start + count * length].view(count, length, *t.shape[1:]).transpose(1, 2)


def _as_packed(parts: list[Tensor], like: Tensor) -> Tensor:
    """(T, H, D) again, from the (count, H, length, D) of every run."""
    packed = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    if len(packed) == 1:
        return packed[0].contiguous()
    return torch.cat(packed) if packed else like.new_empty(like.shape)


def _cpu_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    lses = [q.new_empty((q.shape[1], 0), dtype=reference.accumulator(q))]
    for start, count, length in _runs(cu_seqlens):
        if dropout_p == 0:
            run = (_as_batch(t, start, count, length) for t in (q, k, v))
            o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*run, 0.0, causal, scale=scale)
            outputs.append(o)
            lses.append(lse.transpose(0, 1).flatten(1))
            continue
        for first in range(start, start + count * length, length):
            qs, ks, vs = (_as_batch(t, first, 1, length)[0].to(lses[0].dtype) for t in (q, k, v))
            s = _scores(qs, ks, scale, causal)
            lses.append(s.logsumexp(-1))
            p = _cpu.dropout_(s.softmax(-1), first, dropout_p, seed, stream)
            outputs.append((p @ vs).to(q.dtype)[None])
    return _as_packed(outputs, q), torch.cat(lses, dim=1)


def _cpu_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    gradients: list[tuple[Tensor, ...]] = []
    for start, count, length in _runs(cu_seqlens):
        if dropout_p == 0:
            run = (_as_batch(t, start, count, length) for t in (do, q, k, v, o))
            lse_run = lse[:, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
            gradients.append(
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *run, lse_run.contiguous(), 0.0, causal, scale=scale
                )
            )
            continue
        for first in range(start, start + count * length, length):
            dos, qs, ks, vs, os_ = (_as_batch(t, first, 1, length)[0].to(lse.dtype) for t in (do, q, k, v, o))
            p = _scores(qs, ks, scale, causal).sub_(lse[:, first : first + length, None]).exp_()
            ds = _cpu.dropout_(dos @ vs.mT, first, dropout_p, seed, stream)
            ds.sub_((dos * os_).sum(-1, keepdim=True)).mul_(p).mul_(scale)
            dq, dk = ds @ ks, ds.mT @ qs
            dv = _cpu.dropout_(p, first, dropout_p, seed, stream).mT @ dos
            gradients.append(tuple(t.to(q.dtype)[None] for t in (dq, dk, dv)))
    dq, dk, dv = (_as_packed([g[i] for g in gradients], t) for i, t in enumerate((q, k, v)))
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    s = (q @ k.mT).mul_(scale)
    if causal:
        s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu_(1), float("-inf"))
    return s


attention_bwd = _library.define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens,"
    " SymInt max_seqlen, float scale, bool causal, float dropout_p, Tensor? seed, int stream)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    cuda=reference.attention_backward,
    cpu=_cpu_bwd,
    fake=lambda do, q, k, v, *_: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, *ctx.numbers, seed, ctx.stream = inputs
    o, lse = output
    ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, seed)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, do: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = attention_bwd(do.contiguous(), *tensors, *ctx.numbers, seed, ctx.stream)
    return *gradients, None, None, None, None, None, None, None


attention_fwd = _library.define(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale, bool causal,"
    " float dropout_p, Tensor? seed, int stream) -> (Tensor o, Tensor lse)",
    cuda=reference.attention,
    cpu=_cpu_fwd,
    fake=lambda q, k, v, *_: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=reference.accumulator(q)),
    ),
    setup_context=_save,
    backward=_backward,
)
