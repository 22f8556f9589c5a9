"""ALBERT (Lan et al. 2019, https://arxiv.org/abs/1909.11942): layers that run many times, narrow embeddings.

Each run of a layer has dropout masks of its own; the gradients of its weights add up.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.albert import modeling_albert as stock

from fastbert import encoder, prepared, touched
from fastbert.encoder import Run
from fastbert.families import _heads, _layers, _lm_heads, _model
from fastbert.families._family import Packed, Role, family, named
from fastbert.families._layers import Fusions, Product, joined, product
from fastbert.touched import Each, Parts, container


class Attention(_layers.Attends):
    parts: ClassVar[Parts] = {
        "query": touched.linear,
        "key": touched.linear,
        "value": touched.linear,
        "attention_dropout": touched.dropout_rate,
        "dense": touched.linear,
        "output_dropout": touched.dropout,
        "LayerNorm": touched.norm,
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        projections = self.query, self.key, self.value
        context = self._attend(projections, self.attention_dropout, hidden_TN, run, stream)
        context, hidden_TN = encoder.chosen(rows, context, hidden_TN)
        return encoder.project_and_add(
            context, self.dense, self.output_dropout, self.LayerNorm, hidden_TN, run, stream + 1, rows
        )

    def fusions(self) -> Fusions:
        norm = encoder.why_called(self.LayerNorm, touched.norm)
        return [*super().fusions(), ("bias + dropout + residual + LayerNorm", norm)]

    def products(self) -> list[Product]:
        return [*joined(self.query, self.key, self.value), product(self.dense)]


class Layer(Packed):
    parts: ClassVar[Parts] = {
        "attention": container(Attention),
        "ffn": touched.linear,
        "activation": touched.activation,
        "ffn_output": touched.linear,
        "full_layer_layer_norm": touched.norm,
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        attended = self.attention(hidden_TN, run=run, stream=stream, rows=rows)
        return encoder.feed_forward(  # without a dropout, though it has one: transformers never calls it
            attended,
            self.ffn,
            self.activation,
            self.ffn_output,
            None,
            self.full_layer_layer_norm,
            run,
            stream + 2,
            rows,
        )

    def _prepared_parts(self) -> prepared.Parts:
        attention = self.attention
        return cast(
            prepared.Parts,
            attention._layer_parts(
                (attention.query, attention.key, attention.value),
                (attention.dense, attention.LayerNorm),
                (self.ffn, self.activation, self.ffn_output, self.full_layer_layer_norm),
            ),
        )

    def fusions(self) -> Fusions:
        why = encoder.why_not_feed_forward(self.ffn, self.activation, self.ffn_output, self.full_layer_layer_norm)
        return [("feed-forward in one operator, its GELU not kept", why)]

    def products(self) -> list[Product]:
        return [product(self.ffn, self.activation), product(self.ffn_output)]


class LayerGroup(Role):
    parts: ClassVar[Parts] = {"albert_layers": Each(container(Layer))}


class Encoder(_layers.Encoder):
    parts: ClassVar[Parts] = {
        "embedding_hidden_mapping_in": touched.linear,
        "albert_layer_groups": Each(touched.read(container(LayerGroup))),
    }

    def _layers(self) -> Sequence[nn.Module]:
        return [layer for i in self._order() for layer in self.albert_layer_groups[i].albert_layers]

    def _order(self) -> list[int]:
        """Which group runs when."""
        layers, groups = self.config.num_hidden_layers, self.config.num_hidden_groups
        return [int(i / (layers / groups)) for i in range(layers)]

    def _last_path(self) -> str:
        last = self._order()[-1]
        return f"albert_layer_groups.{last}.albert_layers.{len(self.albert_layer_groups[last].albert_layers) - 1}"

    def _begin(self, hidden_TN: Tensor) -> Tensor:
        return cast(Tensor, self.embedding_hidden_mapping_in(hidden_TN))


class BaseModel(_model.BaseModel):
    parts: ClassVar[Parts] = {"embeddings": container(_layers.Embeddings), "encoder": container(Encoder)}
    _output = BaseModelOutputWithPooling

    def _projects(self) -> bool:
        return True

    def _pool(self, first_BN: Tensor) -> Tensor | None:
        return None if self.pooler is None else self.pooler_activation(self.pooler(first_BN))


class MLMHead(_lm_heads.Half, _lm_heads.PredictionHead):
    parts: ClassVar[Parts] = {
        "dense": touched.linear,
        "activation": touched.activation,
        "LayerNorm": touched.norm,
        "decoder": touched.linear,
    }

    def _leaves(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.dense, self.activation, self.LayerNorm


class _Words(_lm_heads.LMHead):
    parts: ClassVar[Parts] = {**_heads.TokenHead.parts, "predictions": container(MLMHead)}

    def _head(self) -> Any:
        return self.predictions


class MaskedLM(_Words, _lm_heads.MaskedLM):
    """Masked language model."""


class PreTraining(_Words, _lm_heads.PreTraining):
    """Masked LM, and the order of two sentences."""

    _pair_label, _pair_logits = "sentence_order_label", "sop_logits"

    def _of_pair(self, pooled: Tensor) -> Tensor:
        return cast(Tensor, self.sop_classifier(pooled))


ROLES: dict[str, type[Role]] = {
    "Embeddings": _layers.Embeddings,
    "Attention": Attention,
    "Layer": Layer,
    "LayerGroup": LayerGroup,
    "Transformer": Encoder,
    "Model": BaseModel,
    "MLMHead": MLMHead,
    "ForMaskedLM": MaskedLM,
    "ForPreTraining": PreTraining,
    **{name: role for name, role in _heads.HEADS.items() if name != "ForNextSentencePrediction"},
}

globals().update(family(stock, named("Albert", ROLES)))
