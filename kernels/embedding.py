r"""Word + position + token-type gather and sum, LayerNorm, dropout: from ids to the encoder's input in one operator.

    h = word_weight[input_ids] + token_type_weight[token_type_ids] + position_weight[position_ids]
    y = dropout(LayerNorm(h))

Backward: dropout and LayerNorm undone as in `layer_norm`, then dh summed by id into the three tables, which are dense,
as PyTorch's are; the word table's row `padding_idx` gets none. h is gathered again rather than kept.
Devlin et al. 2018, https://arxiv.org/abs/1810.04805. Specification: `fastbert.reference.embedding`.
Traffic, forward: 2 T N elements of word_weight and y; the two small tables stay in cache.
"""

from typing import Any

from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu


def _fake_fwd(input_ids: Tensor, position_ids: Any, token_type_ids: Any, word_weight: Tensor, *_: Any) -> Any:
    T, N = input_ids.shape[0], word_weight.shape[1]
    statistics = reference.accumulator(word_weight)
    y = word_weight.new_empty(T, N)
    return y, y.new_empty(T, dtype=statistics), y.new_empty(T, dtype=statistics)


embedding_bwd = _library.define(
    "embedding_bwd(Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word_weight,"
    " Tensor position_weight, Tensor token_type_weight, Tensor weight, Tensor mean, Tensor rstd, int padding_idx,"
    " float dropout_p, Tensor? seed, int stream) -> (Tensor dword_weight, Tensor dposition_weight,"
    " Tensor dtoken_type_weight, Tensor dweight, Tensor dbias)",
    cuda=reference.embedding_backward,
    cpu=_cpu.embedding_backward,
    fake=lambda dy, ids, positions, types, *weights_and_rest: tuple(
        t.new_empty(t.shape) for t in (*weights_and_rest[:4], weights_and_rest[3])
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _bias, ctx.padding_idx, _eps, ctx.dropout_p, seed, ctx.stream = inputs
    _y, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = embedding_bwd(dy, *tensors, ctx.padding_idx, ctx.dropout_p, seed, ctx.stream)
    return None, None, None, *gradients, None, None, None, None, None


embedding_fwd = _library.define(
    "embedding_fwd(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word_weight,"
    " Tensor position_weight, Tensor token_type_weight, Tensor weight, Tensor bias, int padding_idx, float eps,"
    " float dropout_p, Tensor? seed, int stream) -> (Tensor y, Tensor mean, Tensor rstd)",
    cuda=reference.embedding,
    cpu=_cpu.embedding,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
)
