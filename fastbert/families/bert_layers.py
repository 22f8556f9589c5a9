"""The layers of transformers' BERT on packed tokens: embeddings, encoder, the masked-LM head's own.

Every class is transformers' class of the same name with another forward. Given a `run`, a module takes packed hidden
states, (T, N); without one it is transformers' own, which is how calls fall back.

Dimension key:  T packed tokens   N features   V vocabulary   M labelled rows
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as stock

from fastbert import encoder, functional, touched
from fastbert.encoder import Run
from fastbert.families import _base, _inputs, _losses
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


def _product(dense: nn.Module, activation: nn.Module | None = None) -> Product:
    called = encoder.why_called(dense, touched.linear)
    form = touched.gelu_form(activation) if called is None else None
    return Product(getattr(dense, "in_features", None), getattr(dense, "out_features", None), form, called)


class BertEmbeddings(stock.BertEmbeddings):
    parts: ClassVar[Parts] = {
        "word_embeddings": touched.table,
        "position_embeddings": touched.unpadded_table,
        "token_type_embeddings": touched.unpadded_table,
        "LayerNorm": touched.read_norm,
        "dropout": touched.dropout,
    }
    buffers_read = ("position_ids", "token_type_ids")

    def forward(
        self, *args: Any, run: Run | None = None, inputs: _inputs.Inputs | None = None, **kwargs: Any
    ) -> Tensor:
        if run is None or inputs is None:
            return stock.BertEmbeddings.forward(self, *args, **kwargs)
        hidden_TN = encoder.embed(
            inputs.input_ids,
            inputs.position_ids,
            inputs.token_type_ids,
            self.word_embeddings if inputs.inputs_embeds is None else inputs.inputs_embeds,
            self.position_embeddings,
            self.token_type_embeddings,
            self.LayerNorm,
            self.dropout,
            run,
        )
        return self.as_residual(hidden_TN)

    def as_residual(self, hidden_TN: Tensor) -> Tensor:
        """In the dtype of the hidden states between layers."""
        dtype = _base.state(self).options.residual_dtype
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
        touches = Survey(self).touches
        return [("embedding sum + LayerNorm + dropout", str(touches[0]) if touches else None)]


class BertSelfAttention(stock.BertSelfAttention):
    parts: ClassVar[Parts] = {
        "query": touched.linear,
        "key": touched.linear,
        "value": touched.linear,
        "dropout": touched.dropout_rate,
    }
    facts = ("is_causal", "attention_head_size")

    def forward(self, hidden_states: Tensor, *args: Any, run: Run | None = None, stream: int = 0, **kwargs: Any) -> Any:
        if run is None:
            return stock.BertSelfAttention.forward(self, hidden_states, *args, **kwargs)
        if run.mask is not None:
            padded_BLN = hidden_states.view(*run.packing.shape, -1)
            return stock.BertSelfAttention.forward(self, padded_BLN, run.mask)[0].flatten(0, 1)
        return encoder.self_attention(
            hidden_states,
            self.query,
            self.key,
            self.value,
            self.attention_head_size,
            run,
            stream,
            scale=self.scaling,
            dropout_p=self.dropout.p if self.training else 0.0,
        )

    def why_changed(self) -> str | None:
        """What transformers reads of this module and the kernels cannot have otherwise."""
        if bool(self.is_causal) != bool(self.config.is_decoder):
            return "it was not built with config.is_decoder as it is now"
        if self.attention_head_size > functional.MAX_HEAD_DIM:
            return f"a head of {self.attention_head_size} features, more than {functional.MAX_HEAD_DIM}"
        return None

    def fusions(self) -> Fusions:
        return [("packed attention", self.why_changed())]

    def products(self) -> list[Product]:
        """All three at once, as where there are tokens enough; each by itself where one of them is called."""
        q, k, v = (_product(projection) for projection in (self.query, self.key, self.value))
        if q.N is not None and q == k == v and q.called is None:
            return [q._replace(N=3 * q.N)]
        apart = "Linear is called, for q, k and v cannot be one product"
        return [product._replace(called=product.called or apart) for product in (q, k, v)]


class BertSelfOutput(stock.BertSelfOutput):
    parts: ClassVar[Parts] = {"dense": touched.linear, "LayerNorm": touched.norm, "dropout": touched.dropout}

    def forward(
        self,
        hidden_states: Tensor,
        input_tensor: Tensor,
        *,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        if run is None:
            return stock.BertSelfOutput.forward(self, hidden_states, input_tensor)
        return encoder.project_and_add(
            hidden_states, self.dense, self.dropout, self.LayerNorm, input_tensor, run, stream, rows
        )

    def fusions(self) -> Fusions:
        return [("bias + dropout + residual + LayerNorm", encoder.why_called(self.LayerNorm, touched.norm))]

    def products(self) -> list[Product]:
        return [_product(self.dense)]


class BertAttention(stock.BertAttention):
    parts: ClassVar[Parts] = {"self": container(BertSelfAttention), "output": container(BertSelfOutput)}
    facts = ("is_cross_attention",)

    def why_changed(self) -> str | None:
        """What transformers reads of this module and the packed encoder cannot have otherwise."""
        return "is_cross_attention" if self.is_cross_attention else None

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if run is None:
            return stock.BertAttention.forward(self, hidden_states, *args, **kwargs)
        context = self.self(hidden_states, run=run, stream=stream)
        if rows is not None:
            context, hidden_states = context.index_select(0, rows), hidden_states.index_select(0, rows)
        return self.output(context, hidden_states, run=run, stream=stream + 1, rows=rows)


class BertIntermediate(stock.BertIntermediate):
    parts: ClassVar[Parts] = {"dense": touched.linear, "intermediate_act_fn": touched.activation}

    def forward(self, hidden_states: Tensor, *, run: Run | None = None) -> Tensor:
        if run is None:
            return stock.BertIntermediate.forward(self, hidden_states)
        return encoder.linear_activation(hidden_states, self.dense, self.intermediate_act_fn, run.called)

    def fusions(self) -> Fusions:
        return [("linear + bias + GELU", encoder.why_not_gelu(self.dense, self.intermediate_act_fn))]

    def products(self) -> list[Product]:
        return [_product(self.dense, self.intermediate_act_fn)]


class BertOutput(stock.BertOutput):
    parts: ClassVar[Parts] = {"dense": touched.linear, "LayerNorm": touched.norm, "dropout": touched.dropout}

    def forward(
        self,
        hidden_states: Tensor,
        input_tensor: Tensor,
        *,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
    ) -> Tensor:
        if run is None:
            return stock.BertOutput.forward(self, hidden_states, input_tensor)
        return encoder.project_and_add(
            hidden_states, self.dense, self.dropout, self.LayerNorm, input_tensor, run, stream, rows
        )

    def fusions(self) -> Fusions:
        return [("bias + dropout + residual + LayerNorm", encoder.why_called(self.LayerNorm, touched.norm))]

    def products(self) -> list[Product]:
        return [_product(self.dense)]


class BertLayer(stock.BertLayer):
    parts: ClassVar[Parts] = {
        "attention": container(BertAttention),
        "intermediate": container(BertIntermediate),
        "output": container(BertOutput),
    }

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The packed hidden states, (T, N), after the layer; with rows, (M,), only of these tokens."""
        if run is None:
            return stock.BertLayer.forward(self, hidden_states, *args, **kwargs)
        attended = self.attention(hidden_states, run=run, stream=stream, rows=rows)
        inner, output = self.intermediate, self.output
        modules = inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm
        if not run.called.isdisjoint((inner, output)) or not encoder.fuses_feed_forward(*modules, run.called):
            return output(inner(attended, run=run), attended, run=run, stream=stream + 2, rows=rows)
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

    def fusions(self) -> Fusions:
        inner, output = self.intermediate, self.output
        why = container(BertIntermediate)(inner) or container(BertOutput)(output)
        if why is None:
            why = encoder.why_not_feed_forward(inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm)
        return [("feed-forward in one operator, its GELU not kept", why)]


@dataclass
class Encoded(BaseModelOutputWithPastAndCrossAttentions):
    last_layer_input: Tensor | None = None


class BertEncoder(stock.BertEncoder):
    parts: ClassVar[Parts] = {"layer": Each(container(BertLayer))}

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        run: Run | None = None,
        wanted: set[int] | None = None,
        rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if run is None:
            return stock.BertEncoder.forward(self, hidden_states, *args, **kwargs)
        last, hidden, before = encoder.run_layers(hidden_states, self.layer, run, wanted or set(), rows)
        return Encoded(
            last_hidden_state=last, hidden_states=cast(Any, hidden), last_layer_input=None if rows is None else before
        )


class BertPredictionHeadTransform(stock.BertPredictionHeadTransform):
    parts: ClassVar[Parts] = {
        "dense": touched.linear,
        "transform_act_fn": touched.activation,
        "LayerNorm": touched.norm,
    }

    def forward(self, hidden_states: Tensor, *, called: Set[nn.Module] | None = None) -> Tensor:
        """called: leaves that are not read; transformers' own way where it is None."""
        if called is None:
            return stock.BertPredictionHeadTransform.forward(self, hidden_states)
        hidden_states = encoder.linear_activation(hidden_states, self.dense, self.transform_act_fn, called)
        norm = self.LayerNorm
        if norm in called:
            return cast(Tensor, norm(hidden_states))
        return functional.layer_norm(hidden_states, norm.weight, norm.bias, eps=norm.eps)

    def fusions(self) -> Fusions:
        return [("MLM head: linear + bias + GELU", encoder.why_not_gelu(self.dense, self.transform_act_fn))]

    def products(self) -> list[Product]:
        return [_product(self.dense, self.transform_act_fn)]


class BertLMPredictionHead(stock.BertLMPredictionHead):
    parts: ClassVar[Parts] = {"transform": container(BertPredictionHeadTransform), "decoder": touched.linear}

    def forward(
        self,
        hidden_states: Tensor,
        *,
        called: Set[nn.Module] | None = None,
        labels: Tensor | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """Logits, (..., V); with labels, (M,), of hidden states (M, N), their cross-entropy.

        called: leaves that are not read; transformers' own way where it is None.
        """
        if called is None:
            return cast(Tensor, stock.BertLMPredictionHead.forward(self, hidden_states))
        hidden_states = self.transform(hidden_states, called=called)
        if labels is None:
            return cast(Tensor, self.decoder(hidden_states))
        if self.decoder in called:
            return _losses.cross_entropy(self.decoder(hidden_states), labels, num_items=num_items)
        return functional.linear_cross_entropy(
            hidden_states, self.decoder.weight, self.decoder.bias, labels, num_items=num_items
        )

    def fusions(self) -> Fusions:
        return [("MLM head: labelled rows only", encoder.why_called(self.decoder, touched.linear))]


class BertOnlyMLMHead(stock.BertOnlyMLMHead):
    parts: ClassVar[Parts] = {"predictions": container(BertLMPredictionHead)}


class BertPreTrainingHeads(stock.BertPreTrainingHeads):
    parts: ClassVar[Parts] = {"predictions": container(BertLMPredictionHead)}


_base.register(
    BertEmbeddings,
    BertSelfAttention,
    BertSelfOutput,
    BertAttention,
    BertIntermediate,
    BertOutput,
    BertLayer,
    BertEncoder,
    BertPredictionHeadTransform,
    BertLMPredictionHead,
    BertOnlyMLMHead,
    BertPreTrainingHeads,
)
