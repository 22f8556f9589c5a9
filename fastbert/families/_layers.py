"""The layers of BERT and those like it, on packed tokens: embeddings, self-attention, feed-forward, encoder.

Dimension key:  T packed tokens   N features
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastbert import encoder, functional, prepared, touched
from fastbert.encoder import Run
from fastbert.families import _base, _inputs
from fastbert.families._family import Packed, Role, stock_of
from fastbert.survey import Survey
from fastbert.touched import Each, Parts, container

Fusions = list[tuple[str, str | None]]  # what a module fuses, and why it does not, for `report`


class Product(NamedTuple):
    """A matrix product of a module, for `report`.

    Attributes:
        K, N: features in and out; None where what is called does not say.
        form: of a GELU behind it.  called: why its module computes it, or None.
    """

    K: int | None
    N: int | None
    form: str | None
    called: str | None


def product(dense: nn.Module, activation: nn.Module | None = None) -> Product:
    called = encoder.why_called(dense, touched.linear)
    form = touched.gelu_form(activation) if called is None else None
    return Product(getattr(dense, "in_features", None), getattr(dense, "out_features", None), form, called)


def joined(*projections: nn.Module) -> list[Product]:
    """Of query, key and value: all at once, as where there are tokens enough; each by itself where one is called."""
    q, k, v = map(product, projections)
    if q.N is not None and q == k == v and q.called is None:
        return [q._replace(N=3 * q.N)]
    apart = "Linear is called, for q, k and v cannot be one product"
    return [of._replace(called=of.called or apart) for of in (q, k, v)]


def rows_of(table: nn.Module) -> int | None:
    """How many ids a table knows; None for another module in its place."""
    return table.weight.shape[0] if type(table) is nn.Embedding else None


class Embeddings(Packed):
    parts: ClassVar[Parts] = {
        "word_embeddings": touched.table,
        "position_embeddings": touched.unpadded_table,
        "token_type_embeddings": touched.unpadded_table,
        "LayerNorm": touched.read(touched.norm),
        "dropout": touched.dropout,
    }
    buffers_read: ClassVar[tuple[str, ...]] = ("position_ids", "token_type_ids")

    def _packed(self, run: Run, inputs: _inputs.Inputs) -> Tensor:
        hidden_TN = encoder.embed(
            inputs.input_ids,
            inputs.position_ids,
            inputs.token_type_ids,
            self.word_embeddings if inputs.inputs_embeds is None else inputs.inputs_embeds,
            self.position_embeddings,
            self._token_types(),
            self.LayerNorm,
            self.dropout,
            run,
            **self._more(inputs),
        )
        return self.as_residual(hidden_TN)

    def _tables(self, inputs: _inputs.Inputs) -> prepared.Embeddings:
        """What `_packed` sums, for inference on a CPU."""
        words = self.word_embeddings.weight if inputs.inputs_embeds is None else inputs.inputs_embeds
        parts = [(words, inputs.input_ids)]
        if "token_type_embeddings" in self.parts:
            parts.append((self.token_type_embeddings.weight, inputs.token_type_ids))
        parts.append((self.position_embeddings.weight, inputs.position_ids))
        if inputs.task_type_ids is not None:
            parts.append((self.task_type_embeddings.weight, inputs.task_type_ids))
        return prepared.Embeddings(parts, self.LayerNorm if "LayerNorm" in self.parts else None)

    def _token_types(self) -> nn.Embedding | Tensor:
        """Their table."""
        return cast(nn.Embedding, self.token_type_embeddings)

    def _more(self, inputs: _inputs.Inputs) -> dict[str, Any]:
        """More of what `encoder.embed` takes."""
        return {}

    def _limits(self, size: int, device: torch.device) -> _inputs.Limits:
        """What a batch may have; of inputs_embeds, vectors of this size."""
        return self._limits_of(rows_of(self.token_type_embeddings), size, device)

    def _limits_of(self, token_types: int | None, size: int, device: torch.device) -> _inputs.Limits:
        return _inputs.Limits(
            vocab_size=rows_of(self.word_embeddings),
            type_vocab_size=token_types,
            max_position_embeddings=rows_of(self.position_embeddings),
            hidden_size=size,
            device=device,
            dtype=getattr(getattr(getattr(self, "LayerNorm", None), "weight", None), "dtype", None),
        )

    def as_residual(self, hidden_TN: Tensor) -> Tensor:
        """In the dtype of the hidden states between layers."""
        dtype = _base.state(cast(nn.Module, self)).options.residual_dtype
        if dtype is None or not torch.is_autocast_enabled(hidden_TN.device.type):
            return hidden_TN
        return hidden_TN.to(dtype)

    def why_changed(self) -> str | None:
        """Buffers that transformers reads and fastbert does not."""
        positions, token_types = self._buffers.get("position_ids"), self._buffers.get("token_type_ids")
        if positions is None or not touched.can_look_at(positions):
            return None
        if not torch.equal(positions[0], torch.arange(positions.shape[-1], device=positions.device)):
            return "position_ids are not 0, 1, 2, ..."
        if token_types is not None and bool(token_types.any()):
            return "token_type_ids are not zeros"
        return None

    def fusions(self) -> Fusions:
        touches = Survey(cast(nn.Module, self)).touches
        return [("embedding sum + LayerNorm + dropout", str(touches[0]) if touches else None)]


class Attends(Packed):
    """What all self-attentions share, whatever their parts are called."""

    facts = ("is_causal", "attention_head_size", "scaling")

    def _attend(
        self,
        projections: tuple[nn.Module, nn.Module, nn.Module],
        dropout: nn.Module,
        hidden_TN: Tensor,
        run: Run,
        stream: int,
    ) -> Tensor:
        """The context of all heads, side by side, from the projections to query, key and value.

        Where padding is computed, the attention is the one of transformers' that the model goes by.
        """
        head_dim, dropout_p = self.attention_head_size, cast(float, dropout.p) if self.training else 0.0
        if run.mask is None:
            return encoder.self_attention(
                hidden_TN, *projections, head_dim, run, stream, scale=self.scaling, dropout_p=dropout_p
            )
        shape = (*run.packing.shape, -1, head_dim)
        q, k, v = (projection(hidden_TN).view(shape).transpose(1, 2) for projection in projections)
        eager = sys.modules[stock_of(self).__module__].eager_attention_forward
        of_transformers = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        context, _ = of_transformers(self, q, k, v, run.mask, dropout=dropout_p, scaling=self.scaling)
        return cast(Tensor, context.reshape(hidden_TN.shape[0], -1))

    def _layer_parts(
        self,
        projections: tuple[nn.Module, ...],
        first_half: tuple[nn.Module, nn.Module],
        second_half: tuple[nn.Module, ...],
    ) -> prepared.Parts:
        """Of a layer, from query, key and value, the attention's output and LayerNorm, and the feed-forward's parts."""
        of: Any = (*projections, *first_half, *second_half, self.attention_head_size, self.scaling)
        return prepared.Parts(*of)

    def why_changed(self) -> str | None:
        """What transformers reads of this module and the kernels cannot have otherwise."""
        if bool(self.is_causal) != bool(getattr(self.config, "is_decoder", False)):
            return "it was not built with config.is_decoder as it is now"
        if self.attention_head_size > functional.MAX_HEAD_DIM:
            return f"a head of {self.attention_head_size} features, more than {functional.MAX_HEAD_DIM}"
        return None

    def fusions(self) -> Fusions:
        return [("packed attention", self.why_changed())]


class SelfAttention(Attends):
    parts: ClassVar[Parts] = {
        "query": touched.linear,
        "key": touched.linear,
        "value": touched.linear,
        "dropout": touched.dropout_rate,
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int) -> Tensor:
        return self._attend((self.query, self.key, self.value), self.dropout, hidden_TN, run, stream)

    def products(self) -> list[Product]:
        return joined(self.query, self.key, self.value)


class ProjectAndAdd(Packed):
    """The end of both halves of a layer: SelfOutput, and Output."""

    parts: ClassVar[Parts] = {"dense": touched.linear, "LayerNorm": touched.norm, "dropout": touched.dropout}

    def _packed(self, x: Tensor, residual_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        return encoder.project_and_add(x, self.dense, self.dropout, self.LayerNorm, residual_TN, run, stream, rows)

    def fusions(self) -> Fusions:
        return [("bias + dropout + residual + LayerNorm", encoder.why_called(self.LayerNorm, touched.norm))]

    def products(self) -> list[Product]:
        return [product(self.dense)]


class Attention(Packed):
    parts: ClassVar[Parts] = {"self": container(SelfAttention), "output": container(ProjectAndAdd)}
    facts = ("is_cross_attention",)

    def why_changed(self) -> str | None:
        """What transformers reads of this module and the packed encoder cannot have otherwise."""
        return "is_cross_attention" if self.is_cross_attention else None

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        context = self.self(hidden_TN, run=run, stream=stream)
        context, hidden_TN = encoder.chosen(rows, context, hidden_TN)
        return cast(Tensor, self.output(context, hidden_TN, run=run, stream=stream + 1, rows=rows))


class Intermediate(Packed):
    parts: ClassVar[Parts] = {"dense": touched.linear, "intermediate_act_fn": touched.activation}

    def _packed(self, hidden_TN: Tensor, run: Run) -> Tensor:
        return encoder.linear_activation(hidden_TN, self.dense, self.intermediate_act_fn, run.called)

    def fusions(self) -> Fusions:
        return [("linear + bias + GELU", encoder.why_not_gelu(self.dense, self.intermediate_act_fn))]

    def products(self) -> list[Product]:
        return [product(self.dense, self.intermediate_act_fn)]


class Layer(Packed):
    parts: ClassVar[Parts] = {
        "attention": container(Attention),
        "intermediate": container(Intermediate),
        "output": container(ProjectAndAdd),
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        """The hidden states after the layer; with rows, (M,), only of these tokens."""
        attended = self.attention(hidden_TN, run=run, stream=stream, rows=rows)
        inner, output = self.intermediate, self.output
        if not run.called.isdisjoint((inner, output)):
            inside = inner(attended, run=run)
            return cast(Tensor, output(inside, attended, run=run, stream=stream + 2, rows=rows))
        return encoder.feed_forward(
            attended,
            inner.dense,
            inner.intermediate_act_fn,
            output.dense,
            output.dropout,
            output.LayerNorm,
            run,
            stream + 2,
            rows,
        )

    def _prepared_parts(self) -> prepared.Parts:
        """For inference on a CPU: `fastbert.prepared`."""
        attention, inner, output = self.attention, self.intermediate, self.output
        of: prepared.Parts = attention.self._layer_parts(
            (attention.self.query, attention.self.key, attention.self.value),
            (attention.output.dense, attention.output.LayerNorm),
            (inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm),
        )
        return of

    def fusions(self) -> Fusions:
        inner, output = self.intermediate, self.output
        why = container(Intermediate)(inner) or container(ProjectAndAdd)(output)
        if why is None:
            why = encoder.why_not_feed_forward(inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm)
        return [("feed-forward in one operator, its GELU not kept", why)]


@dataclass
class Encoded(BaseModelOutputWithPastAndCrossAttentions):
    last_layer_input: Tensor | None = None


class Encoder(Packed):
    """All layers. A family's own says in `_layers` which they are, and in `_begin` what is in front of them."""

    parts: ClassVar[Parts] = {"layer": Each(container(Layer))}
    _replays: ClassVar[bool] = True  # a layer that runs again, for other rows, drops the same elements

    def _layers(self) -> Sequence[nn.Module]:
        """In the order in which they run; one that runs twice is there twice."""
        return cast(Sequence[nn.Module], self.layer)

    def _last_path(self) -> str:
        """Where the last layer is, in this module."""
        return f"layer.{len(self.layer) - 1}"

    def _begin(self, hidden_TN: Tensor) -> Tensor:
        """What becomes of the embeddings before the first layer."""
        return hidden_TN

    def _packed(
        self,
        embedded_TN: Tensor,
        run: Run,
        wanted: set[int],
        rows: Tensor | None,
        finish: Callable[[Tensor, Run], Tensor],
    ) -> Encoded:
        last, hidden, before = encoder.run_layers(self._begin(embedded_TN), self._layers(), run, wanted, rows, finish)
        return Encoded(
            last_hidden_state=last, hidden_states=cast(Any, hidden), last_layer_input=None if rows is None else before
        )


class Pooler(Role):
    """Of a first token's hidden state: transformers' own."""


LAYERS: dict[str, type[Role]] = {
    "Embeddings": Embeddings,
    "SelfAttention": SelfAttention,
    "SelfOutput": ProjectAndAdd,
    "Attention": Attention,
    "Intermediate": Intermediate,
    "Output": ProjectAndAdd,
    "Layer": Layer,
    "Encoder": Encoder,
    "Pooler": Pooler,
}
