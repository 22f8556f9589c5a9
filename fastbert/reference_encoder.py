"""What a whole encoder must compute: BERT's, and what other families do otherwise, in plain PyTorch.

It reads a model's weights by BERT's names (`bert_names`), and does what they say: a table of task types is summed
where there is one, narrow embeddings are projected, and a LayerNorm behind the last layer means that the others stand
in front of the products, not behind the sums.

Dimension key:  T packed tokens   M rows   N features   V vocabulary   B batch   H heads   D head size
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference

_RENAMED = (  # of a base model's parameters, what the families call otherwise
    (r"^transformer\.", "encoder."),  # DistilBERT
    (r"attention\.(q|k|v)_lin", lambda m: f"attention.self.{dict(q='query', k='key', v='value')[m[1]]}"),
    (r"attention\.out_lin", "attention.output.dense"),
    (r"sa_layer_norm", "attention.output.LayerNorm"),
    (r"ffn\.lin1", "intermediate.dense"),
    (r"ffn\.lin2", "output.dense"),
    (r"(layer\.\d+)\.output_layer_norm", r"\1.output.LayerNorm"),
    (r"^encoder\.embedding_hidden_mapping_in", "embeddings_project"),  # ALBERT
    (r"albert_layer_groups\.(\d+)\.albert_layers\.(\d+)", r"layer.\1.\2"),
    (r"attention\.(query|key|value)", r"attention.self.\1"),
    (r"attention\.dense", "attention.output.dense"),
    (r"\.ffn\.", ".intermediate.dense."),
    (r"ffn_output", "output.dense"),
    (r"full_layer_layer_norm", "output.LayerNorm"),
    (r"attention\.(LayerNorm|self_attn_layer_norm)", "attention.output.LayerNorm"),  # also those that normalise first
    (r"intermediate\.LayerNorm", "output.LayerNorm"),
    (r"(layer\.\d+)\.LayerNorm", r"\1.output.LayerNorm"),
    (r"^LayerNorm", "encoder.LayerNorm"),
)


def bert_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A base model's weights by BERT's names; of ALBERT, layer 1 of group 0 is "encoder.layer.0.1"."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    return renamed


def counted_positions(input_ids: Tensor, cu_seqlens: Tensor, padding_idx: int) -> Tensor:
    """RoBERTa's: of each sequence's ids that are not padding_idx, one after the other behind it; the others have it.

    input_ids: (T,) int64. Returns (T,).
    """
    positions = torch.full_like(input_ids, padding_idx)
    for start, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        for i in range(start, end):
            if input_ids[i] != padding_idx:
                positions[i] = padding_idx + int((input_ids[start : i + 1] != padding_idx).sum())
    return positions


def encoder(
    weights: Mapping[str, Tensor],
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    num_heads: int,
    eps: float,
    approximate: str = "none",
    causal: bool = False,
    layers: Sequence[object] | None = None,
    task_type_ids: Tensor | None = None,
    hidden_dropout_p: float | tuple[float, float, float] = 0.0,
    attention_dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """A whole encoder on packed tokens.  Devlin et al. 2018, https://arxiv.org/abs/1810.04805.

    Args:
        weights: by the names of BERT's checkpoints, from "embeddings.word_embeddings.weight" on.
        input_ids, token_type_ids, position_ids, task_type_ids: (T,) int64.  cu_seqlens: (B + 1,) int32.
        layers: whose weights each layer has, as the names say it; 0, 1, 2, ... where it is None.
        hidden_dropout_p: behind the embeddings, at the end of attention, and of the feed-forward.

    Returns:
        The embeddings' output, projected where that is done, and each layer's, (T, N).
    """
    embedding_p, attended_p, output_p = (
        hidden_dropout_p if isinstance(hidden_dropout_p, tuple) else (hidden_dropout_p,) * 3
    )
    norm_first = "encoder.LayerNorm.weight" in weights
    assert not (norm_first and seed is not None), "there, dropout is PyTorch's own"
    max_seqlen = int(cu_seqlens.diff().max())
    hidden_TN = _embed(weights, input_ids, token_type_ids, position_ids, task_type_ids, eps, embedding_p, seed)
    hidden_states = [hidden_TN]
    if layers is None:
        layers = range(1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")))

    def add(x_TN: Tensor, residual_TN: Tensor, norm: str, dropout_p: float, stream: int) -> Tensor:
        if norm_first:
            return x_TN + residual_TN
        affine = _affine(weights, norm)
        return reference.layer_norm(x_TN, None, residual_TN, *affine, eps, dropout_p, seed, stream)[0]

    def before(x_TN: Tensor, norm: str) -> Tensor:
        return _normalise(weights, x_TN, norm, eps) if norm_first else x_TN

    for i, shared in enumerate(layers):
        layer, stream = f"encoder.layer.{shared}", 1 + 3 * i
        x_TN = before(hidden_TN, f"{layer}.attention.output.LayerNorm")
        q, k, v = (
            F.linear(x_TN, *_affine(weights, f"{layer}.attention.self.{name}")).unflatten(-1, (num_heads, -1))
            for name in ("query", "key", "value")
        )
        scale = q.shape[-1] ** -0.5
        o_THD, _ = reference.attention(
            q, k, v, cu_seqlens, max_seqlen, scale, causal, attention_dropout_p, seed, stream
        )  # fmt: skip
        x_TN = F.linear(o_THD.flatten(1), *_affine(weights, f"{layer}.attention.output.dense"))
        hidden_TN = add(x_TN, hidden_TN, f"{layer}.attention.output.LayerNorm", attended_p, stream + 1)

        x_TN = before(hidden_TN, f"{layer}.output.LayerNorm")
        x_TN, _ = reference.linear_gelu(x_TN, *_affine(weights, f"{layer}.intermediate.dense"), approximate, False)
        x_TN = F.linear(x_TN, *_affine(weights, f"{layer}.output.dense"))
        hidden_TN = add(x_TN, hidden_TN, f"{layer}.output.LayerNorm", output_p, stream + 2)
        hidden_states.append(hidden_TN)
    if norm_first:
        hidden_states[-1] = _normalise(weights, hidden_states[-1], "encoder.LayerNorm", eps)
    return hidden_states


def _embed(
    weights: Mapping[str, Tensor],
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    task_type_ids: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Tensor:
    ids = {"word": input_ids, "token_type": token_type_ids, "position": position_ids, "task_type": task_type_ids}
    tables = {name: weights.get(f"embeddings.{name}_embeddings.weight") for name in ids}
    hidden_TN = reference.embedding_sum(*((tables[name], ids[name]) for name in ids))
    if "embeddings.LayerNorm.weight" in weights:
        hidden_TN = _normalise(weights, hidden_TN, "embeddings.LayerNorm", eps)
    hidden_TN = reference.dropout(hidden_TN, dropout_p, seed, 0).to(weights["embeddings.word_embeddings.weight"].dtype)
    if "embeddings_project.weight" in weights:
        hidden_TN = F.linear(hidden_TN, *_affine(weights, "embeddings_project"))
    return hidden_TN


def pretraining_loss(
    weights: Mapping[str, Tensor],
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    labels: Tensor,
    next_sentence_label: Tensor,
    **options: Any,
) -> Tensor:
    """BERT's pretraining loss on packed tokens, masked LM + next sentence. Devlin et al. 2018, section 3.1.

    Args:
        weights: by the names of BERT's pretraining checkpoints, "bert.embeddings.word_embeddings.weight" and so on; the
            decoder is the word table.
        labels: (T,) int64, -100 where a token has none.  next_sentence_label: (B,) int64, 0 if the second sentence
            follows.
        options: keyword arguments of `encoder`.
    """
    body = {name.removeprefix("bert."): t for name, t in weights.items() if name.startswith("bert.")}
    *_, hidden_TN = encoder(body, input_ids, token_type_ids, position_ids, cu_seqlens, **options)
    pooled_BN = torch.tanh(F.linear(hidden_TN[cu_seqlens[:-1].long()], *_affine(body, "pooler.dense")))
    next_sentence = F.cross_entropy(F.linear(pooled_BN, *_affine(weights, "cls.seq_relationship")), next_sentence_label)
    labelled = labels != -100
    head = "cls.predictions"
    dense = _affine(weights, f"{head}.transform.dense")
    x_MN, _ = reference.linear_gelu(hidden_TN[labelled], *dense, options.get("approximate", "none"), False)
    norm = _affine(weights, f"{head}.transform.LayerNorm")
    x_MN, _, _ = reference.layer_norm(x_MN, None, None, *norm, options["eps"], 0.0, None, 0)
    logits_MV = F.linear(x_MN, body["embeddings.word_embeddings.weight"], weights[f"{head}.bias"])
    return F.cross_entropy(logits_MV, labels[labelled]) + next_sentence


def _normalise(weights: Mapping[str, Tensor], x_TN: Tensor, norm: str, eps: float) -> Tensor:
    return reference.layer_norm(x_TN, None, None, *_affine(weights, norm), eps, 0.0, None, 0)[0]


def _affine(weights: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    return weights[f"{name}.weight"], weights[f"{name}.bias"]
