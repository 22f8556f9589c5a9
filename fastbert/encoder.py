"""BERT's encoder on packed tokens: embeddings, self-attention, feed-forward, each from a model's own leaf modules.

Reads like the paper (Devlin et al. 2018, https://arxiv.org/abs/1810.04805) and knows neither backend nor family: the
families say which of their modules play which part. A leaf's parameters are read where it is PyTorch's own module,
untouched; one that is not, and may take packed tokens all the same (LoRA, quantisation), is called: `fastbert.touched`.

Dimension key:  T packed tokens   N features   H heads   D head size
"""

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import functional, touched
from fastbert.packing import Packing
from fastbert.touched import CALLED, Role, gelu_form


class Run(NamedTuple):
    """What every layer of one forward pass needs.

    Attributes:
        packing: where sequences start and end.
        seed: () int64, of this pass's dropout masks; None where nothing is dropped.
        causal: a token sees itself and what is to its left, as in a decoder.
        called: the leaves that are called; the others are read.
        mask: what transformers' attention takes as its mask, where padding is computed too; else None.
    """

    packing: Packing
    seed: Tensor | None
    causal: bool = False
    called: Set[nn.Module] = frozenset()
    mask: Tensor | None = None


def why_called(module: nn.Module, role: Role) -> str | None:
    """Why a leaf is called instead of fused, or None: for people."""
    why, kind = role(module), type(module)
    name = kind.__name__ if kind.__module__.startswith("torch.") else f"{kind.__module__}.{kind.__name__}"
    return f"{name} is called" if why == CALLED else why


def why_not_gelu(dense: nn.Module, activation: nn.Module) -> str | None:
    """Why `linear_activation` cannot be one operator, or None: for people."""
    if gelu_form(activation) is None:
        return f"{type(activation).__name__} is no GELU"
    if touched.linear(dense) is None and dense.bias is None:
        return "a Linear without a bias"
    return why_called(dense, touched.linear) or why_called(activation, touched.activation)


def why_not_feed_forward(inner: nn.Module, activation: nn.Module, outer: nn.Module, norm: nn.Module) -> str | None:
    """Why `feed_forward` cannot be one operator, or None: for people."""
    return why_not_gelu(inner, activation) or why_called(outer, touched.linear) or why_called(norm, touched.norm)


def dropout_p(dropout: nn.Module | None) -> float:
    """The probability that a dropout module applies now; 0 where there is none."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def embed(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word: nn.Embedding | Tensor,
    position: nn.Embedding,
    token_type: nn.Embedding | Tensor,
    norm: nn.LayerNorm,
    dropout: nn.Module,
    run: Run,
    stream: int = 0,
    *,
    task_type_ids: Tensor | None = None,
    task_type: nn.Embedding | None = None,
) -> Tensor:
    """dropout(LayerNorm(word + token type + position (+ task type))).

    Args:
        input_ids, position_ids, token_type_ids, task_type_ids: (T,) int64.
        word: the word table's module, or a (V, N) table of vectors.
        token_type: a table's module, or a (_, N) table.

    Returns:
        (T, N)
    """
    return functional.embedding(
        input_ids,
        position_ids,
        token_type_ids,
        word if isinstance(word, Tensor) else word.weight,
        functional.without_gradient_of_row(position.weight, position.padding_idx),
        token_type if isinstance(token_type, Tensor) else token_type.weight,
        norm.weight,
        norm.bias,
        task_type_ids=task_type_ids,
        task_type_weight=None if task_type is None else task_type.weight,
        eps=norm.eps,
        padding_idx=None if isinstance(word, Tensor) else word.padding_idx,
        dropout_p=dropout_p(dropout),
        seed=run.seed,
        stream=stream,
    )


def self_attention(
    hidden_TN: Tensor,
    query: nn.Module,
    key: nn.Module,
    value: nn.Module,
    head_dim: int,
    run: Run,
    stream: int,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(q k^T) v within each sequence, causal as the run is; all heads side by side. (T, N) to (T, H D)."""
    q, k, v = _query_key_value(hidden_TN, query, key, value, head_dim, run)
    o_THD = functional.attention(
        q,
        k,
        v,
        run.packing.cu_seqlens,
        run.packing.max_seqlen,
        scale=scale,
        causal=run.causal,
        dropout_p=dropout_p,
        seed=run.seed,
        stream=stream,
    )
    return o_THD.flatten(1)


def _query_key_value(
    hidden_TN: Tensor, query: nn.Module, key: nn.Module, value: nn.Module, head_dim: int, run: Run
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q, k, v: (T, H, D); or q: (T, 3, H, D), one product with all three, where that is worth joining the weights.

    One product reads the hidden states once, and in the backward its gradient is one product too, instead of three
    and two sums. The weights are copied in every pass, for they are three parameters: with fewer tokens than twice
    the features that costs more than it saves.
    """
    T, N = hidden_TN.shape
    if 2 * N <= T and run.called.isdisjoint((query, key, value)):
        weights: list[Tensor] = [cast(Tensor, projection.weight) for projection in (query, key, value)]
        biases = [cast(Tensor, projection.bias) for projection in (query, key, value) if projection.bias is not None]
        if len(biases) in (0, 3) and len({weight.shape for weight in weights}) == 1:
            qkv = functional.linear(hidden_TN, torch.cat(weights), torch.cat(biases) if biases else None)
            return qkv.unflatten(-1, (3, -1, head_dim)), None, None
    q, k, v = (projection(hidden_TN).unflatten(-1, (-1, head_dim)) for projection in (query, key, value))
    return q, k, v


def chosen(rows: Tensor | None, *of_tokens: Tensor) -> tuple[Tensor, ...]:
    """Those rows of each; all for None."""
    return of_tokens if rows is None else tuple(t.index_select(0, rows) for t in of_tokens)


def project_and_add(
    x: Tensor,
    dense: nn.Module,
    dropout: nn.Module | None,
    norm: nn.Module,
    residual_TN: Tensor,
    run: Run,
    stream: int,
    rows: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(dense(x)) + residual), the end of both halves of a layer.

    rows: (M,) int64, which of the tokens these are, where they are not all.
    """
    if norm in run.called:
        return cast(Tensor, norm(F.dropout(dense(x), dropout_p(dropout)) + residual_TN))
    if dense in run.called:
        x, x_bias = dense(x), None
    else:
        plain = cast(nn.Linear, dense)
        x, x_bias = functional.linear(x, plain.weight), plain.bias
    return _add_and_normalise(x, x_bias, dropout, norm, residual_TN, run, stream, rows)


def normalise(x: Tensor, norm: nn.Module, called: Set[nn.Module]) -> Tensor:
    """LayerNorm(x), by itself: where a layer normalises first, and before the vocabulary."""
    if norm in called:
        return cast(Tensor, norm(x))
    norm = cast(nn.LayerNorm, norm)
    return functional.layer_norm(x, norm.weight, norm.bias, eps=norm.eps)


def _add_and_normalise(
    x: Tensor,
    x_bias: Tensor | None,
    dropout: nn.Module | None,
    norm: nn.Module,
    residual_TN: Tensor,
    run: Run,
    stream: int,
    rows: Tensor | None,
) -> Tensor:
    norm = cast(nn.LayerNorm, norm)
    return functional.layer_norm(
        x,
        norm.weight,
        norm.bias,
        residual=residual_TN,
        x_bias=x_bias,
        eps=norm.eps,
        dropout_p=dropout_p(dropout),
        seed=run.seed,
        stream=stream,
        rows=rows,
    )


def project_and_sum(x: Tensor, dense: nn.Module, dropout: nn.Module | None, residual_TN: Tensor) -> Tensor:
    """dropout(dense(x)) + residual, where a layer normalises what goes into its halves and not what comes out.

    Its dropout is PyTorch's own: the fused one is a part of LayerNorm.
    """
    return F.dropout(dense(x), dropout_p(dropout)) + residual_TN


def fuses_feed_forward(
    inner: nn.Module, activation: nn.Module, outer: nn.Module, norm: nn.Module, called: Set[nn.Module]
) -> bool:
    """Whether `feed_forward` can take these."""
    if inner in called or outer in called or norm in called:
        return False
    return gelu_form(activation) is not None and inner.bias is not None


def feed_forward(
    x: Tensor,
    inner: nn.Module,
    activation: nn.Module,
    outer: nn.Module,
    dropout: nn.Module | None,
    norm: nn.Module,
    run: Run,
    stream: int,
    rows: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(outer(activation(inner(x)))) + x), the second half of a layer.

    rows: (M,) int64, which of the tokens these are, where they are not all.
    """
    if not fuses_feed_forward(inner, activation, outer, norm, run.called):
        inside = linear_activation(x, inner, activation, run.called)
        return project_and_add(inside, outer, dropout, norm, x, run, stream, rows)
    inner, outer = cast(nn.Linear, inner), cast(nn.Linear, outer)
    form = cast(str, gelu_form(activation))
    y = functional.feed_forward(x, inner.weight, inner.bias, outer.weight, approximate=form)
    return _add_and_normalise(y, outer.bias, dropout, norm, x, run, stream, rows)


def linear_activation(x: Tensor, dense: nn.Module, activation: nn.Module, called: Set[nn.Module]) -> Tensor:
    """activation(dense(x)), in one operator where that is a GELU."""
    form = gelu_form(activation)
    if form is None or dense in called or dense.bias is None:
        return cast(Tensor, activation(dense(x)))
    plain = cast(nn.Linear, dense)
    return functional.linear_gelu(x, plain.weight, plain.bias, approximate=form)


def run_layers(
    hidden_TN: Tensor,
    layers: Sequence[nn.Module],
    run: Run,
    wanted: set[int],
    rows: Tensor | None,
    finish: Callable[[Tensor, Run], Tensor],
) -> tuple[Tensor, tuple[Tensor | None, ...], Tensor]:
    """All layers, one after the other.

    A hidden state that the user wants is padded again on its way from one layer to the next, so that the
    gradients of the loss with respect to it exist (`retain_grad`).

    Args:
        layers: each takes and returns packed hidden states. One that is there twice runs twice.
        wanted: which of the layers + 1 hidden states to return.
        rows: (M,) int64, the tokens whose last hidden state is needed; None for all.
        finish: what becomes of the last layer's output.

    Returns:
        The last hidden state, packed, or those rows of it; the wanted ones as (B, L, N), None between them; and the
        last layer's input, packed.
    """
    hidden_states: list[Tensor | None] = []
    before_TN = hidden_TN
    for i in range(len(layers) + 1):
        if i > 0:
            before_TN = hidden_TN
            hidden_TN = _run_layer(i - 1, layers, hidden_TN, run, rows if i == len(layers) else None)
        if i == len(layers):
            hidden_TN = finish(hidden_TN, run)
        padded = None
        if i in wanted:
            padded = run.packing.unpack(hidden_TN)
            hidden_TN = run.packing.pack(padded)
        hidden_states.append(padded)
    return hidden_TN, tuple(hidden_states), before_TN


def _run_layer(i: int, layers: Sequence[nn.Module], hidden_TN: Tensor, run: Run, rows: Tensor | None = None) -> Tensor:
    return cast(Tensor, layers[i](hidden_TN, run=run, stream=1 + 3 * i, rows=rows))


def last_layer(
    before_TN: Tensor, layers: Sequence[nn.Module], run: Run, finish: Callable[[Tensor, Run], Tensor]
) -> Callable[[], Tensor]:
    """The last layer for all tokens, (T, N), later: with the autocast of now, and this run's dropout."""
    device = before_TN.device.type
    autocast = torch.autocast(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def compute() -> Tensor:
        with autocast:
            return finish(_run_layer(len(layers) - 1, layers, before_TN, run), run)

    return compute
