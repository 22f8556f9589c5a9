r"""Vocabulary projection + softmax cross-entropy, for the rows that have a label.

    logits = x weight^T + bias,   loss = lse - logits[label],   lse = log sum_v exp(logits_v)
    dlogits = (exp(logits - lse) - onehot(label)) * dloss,   dx = dlogits weight,   dweight = dlogits^T x

The logits exist for a chunk of rows at a time; the backward computes them again.
Specification: `fastbert.reference.linear_cross_entropy`. Arithmetic, forward: 2 M V N flops; backward: 6 M V N.
Both sides are the reference until the kernel is in.
"""

from typing import Any

from torch import Tensor

from fastbert import _library, reference


def _fake_fwd(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulator(x)
    return x.new_empty(x.shape[0], dtype=dtype), x.new_empty(x.shape[0], dtype=dtype)


def _fake_bwd(dloss: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dbias = weight.new_empty(0 if bias is None else weight.shape[0])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias


linear_cross_entropy_bwd = _library.define(
    "linear_cross_entropy_bwd(Tensor dloss, Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor lse,"
    " int ignore_index) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    cuda=reference.linear_cross_entropy_backward,
    cpu=reference.linear_cross_entropy_backward,
    fake=_fake_bwd,
    flops=lambda dloss, x, weight, *_: 6 * x.shape[0] * weight.numel(),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, labels, ctx.ignore_index = inputs
    _loss, lse = output
    ctx.save_for_backward(x, weight, bias, labels, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, dloss: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = linear_cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.ignore_index)
    return dx, dweight, None if ctx.saved_tensors[2] is None else dbias, None, None


linear_cross_entropy_fwd = _library.define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignore_index)"
    " -> (Tensor loss, Tensor lse)",
    cuda=reference.linear_cross_entropy,
    cpu=reference.linear_cross_entropy,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
    flops=lambda x, weight, *_: 2 * x.shape[0] * weight.numel(),
)
