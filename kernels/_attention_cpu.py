"""Attention's CPU side.

In C++ (csrc/attention_of_training.h) where the extension is built and the CPU has AVX2: a task a head of a sequence,
for any mix of lengths, with dropout or without. Elsewhere by PyTorch: its flash kernel once for each run of sequences
of one length, so a batch without padding is a single call on views; with dropout one sequence after the other.
"""

from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert import reference
from fastbert.kernels import _cpu

try:
    from fastbert import _C
except ImportError:  # a bare checkout: right, but slower
    _C = None  # type: ignore[assignment]


class _How(NamedTuple):
    """What the operators take besides tensors of a row a token, but for max_seqlen, which a CPU does not need."""

    cu_seqlens: Tensor
    scale: float
    causal: bool
    dropout_p: float
    seed: Tensor | None
    stream: int


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


def _separate(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's flash kernel takes the last stride for 1, without looking."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in reference.separate(q, k, v))
    return q, k, v


def _as_batch(t: Tensor, start: int, count: int, length: int) -> Tensor:
    """(count, H, length, D): a view of some of the packed tokens."""
    return t[start : start + count * length].view(count, length, *t.shape[1:]).transpose(1, 2)


def _as_packed(parts: list[Tensor], like: Tensor) -> Tensor:
    """(T, H, D) again, from the (count, H, length, D) of every run."""
    packed = [part.transpose(1, 2).flatten(0, 1) for part in parts]
    if len(packed) == 1:
        return packed[0].contiguous()
    return torch.cat(packed) if packed else like.new_empty(like.shape)


def _by_torch(q: Tensor, k: Tensor, v: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    cu_seqlens, scale, causal, dropout_p, seed, stream = how
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


def _backward_by_torch(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, how: _How
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens, scale, causal, dropout_p, seed, stream = how
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


def _call(q: Tensor, k: Tensor, v: Tensor, how: _How) -> Any:
    """What C++ is called with, for float32."""
    return _C.AttentionCall(
        q=q.detach().numpy(),
        k=k.detach().numpy(),
        v=v.detach().numpy(),
        cu_seqlens=how.cu_seqlens.numpy(),
        scale=how.scale,
        causal=how.causal,
        threshold=reference.drop_threshold(how.dropout_p),
        keep_scale=reference.keep_scale(how.dropout_p),
        seed=0 if how.seed is None else int(how.seed),
        stream=how.stream,
        threads=torch.get_num_threads(),
    )


def _in_cpp(q: Tensor) -> bool:
    """Whether C++ takes them: float32, and 16 bits, which it computes in float32."""
    return _C is not None and reference.accumulator(q) == torch.float32 and _C.can_attend()


def _wide(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return q.to(torch.float32), k if k is None else k.to(torch.float32), v if v is None else v.to(torch.float32)


def attention(
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
    how = _How(cu_seqlens, scale, causal, dropout_p, seed, stream)
    if not _in_cpp(q):
        return _by_torch(*_separate(q, k, v), how)
    q_THD, k_THD, v_THD = _separate(*_wide(q, k, v))
    T, H, D = q_THD.shape
    o, lse = q_THD.new_empty(T, H, D), q_THD.new_empty(H, T)
    _call(q_THD, k_THD, v_THD, how).forward(o.numpy(), lse.numpy())
    return o.to(q.dtype), lse


def attention_backward(
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
    how = _How(cu_seqlens, scale, causal, dropout_p, seed, stream)
    if not _in_cpp(q):
        dq, dk, dv = _backward_by_torch(do, *_separate(q, k, v), o, lse, how)
        return (dq, dk, dv) if k is not None else (torch.stack((dq, dk, dv), dim=1), q.new_empty(0), q.new_empty(0))
    q, k, v = _wide(q, k, v)
    gradients = reference.attention_gradients(q, k, v)
    written = gradients if k is not None else gradients[0].unbind(1)
    call = _call(*_separate(q, k, v), how)
    call.backward(*(t.to(q.dtype).numpy() for t in (do, o)), lse.numpy(), *(t.numpy() for t in written))
    dq, dk, dv = (t.to(do.dtype) for t in gradients)
    return dq, dk, dv
