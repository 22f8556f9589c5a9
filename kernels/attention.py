r"""Softmax attention over packed sequences, every token seeing its whole sequence (no mask tensor).

    o   = dropout(p) v,   p = exp(s - lse),   s = scale * q k^T,   lse = log sum_n exp(s_n)
    dv  = dropout(p)^T do,   dp = dropout(do v^T),   ds = p * (dp - delta),   delta = sum(do * o)
    dq  = scale * ds k,   dk = scale * ds^T q

Dao 2023, https://arxiv.org/abs/2307.08691. Specification: `fastbert.reference.attention`.
Arithmetic, forward: 4 D sum_b(seqlen_b^2) flops per head; backward: 10 D.
The CUDA side is the reference until the Triton kernel is in.
"""

from typing import Any

from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu

attention_bwd = _library.define(
    "attention_bwd(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens,"
    " SymInt max_seqlen, float scale, bool causal, float dropout_p, Tensor? seed, int stream)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    cuda=reference.attention_backward,
    cpu=_cpu.attention_backward,
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
    cpu=_cpu.attention,
    fake=lambda q, k, v, *_: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=reference.accumulator(q)),
    ),
    setup_context=_save,
    backward=_backward,
)
