"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT by other names, no token types, no pooler."""

from collections.abc import Set
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as stock

from fastbert import encoder, touched
from fastbert.encoder import Run
from fastbert.families import _heads, _inputs, _layers, _lm_heads, _model
from fastbert.families._family import Role, family, stock_of
from fastbert.families._layers import Fusions, Product, joined, product
from fastbert.touched import Each, Parts, container


class Embeddings(_layers.Embeddings):
    parts: ClassVar[Parts] = {n: of for n, of in _layers.Embeddings.parts.items() if n != "token_type_embeddings"}
    buffers_read = ("position_ids",)

    def _token_types(self) -> Tensor:
        """One type, that adds nothing."""
        weight = self.word_embeddings.weight
        return cast(Tensor, weight.new_zeros(1, weight.shape[1]))

    def _limits(self, size: int, device: torch.device) -> _inputs.Limits:
        return self._limits_of(1, size, device)


class SelfAttention(Role):
    parts: ClassVar[Parts] = {
        "q_lin": touched.linear,
        "k_lin": touched.linear,
        "v_lin": touched.linear,
        "out_lin": touched.linear,
        "dropout": touched.dropout_rate,
    }
    facts = ("is_causal", "attention_head_size")

    def forward(self, hidden_states: Tensor, *args: Any, run: Run | None = None, stream: int = 0, **kwargs: Any) -> Any:
        """With a run: before out_lin."""
        if run is None:
            return stock_of(self).forward(self, hidden_states, *args, **kwargs)
        return _layers.attend(self, (self.q_lin, self.k_lin, self.v_lin), hidden_states, run, stream, self.dropout)

    def why_changed(self) -> str | None:
        return _layers.why_no_kernel(self)

    def fusions(self) -> Fusions:
        return [("packed attention", self.why_changed())]

    def products(self) -> list[Product]:
        return [*joined(self.q_lin, self.k_lin, self.v_lin), product(self.out_lin)]


class FFN(Role):
    parts: ClassVar[Parts] = {
        "dropout": touched.dropout,
        "lin1": touched.linear,
        "lin2": touched.linear,
        "activation": touched.activation,
    }

    def products(self) -> list[Product]:
        return [product(self.lin1, self.activation), product(self.lin2)]


class Layer(Role):
    parts: ClassVar[Parts] = {
        "attention": touched.read(container(SelfAttention)),
        "sa_layer_norm": touched.norm,
        "ffn": touched.read(container(FFN)),
        "output_layer_norm": touched.norm,
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
            return stock_of(self).forward(self, hidden_states, *args, **kwargs)
        context = self.attention(hidden_states, run=run, stream=stream)
        if rows is not None:
            context, hidden_states = context.index_select(0, rows), hidden_states.index_select(0, rows)
        attended = encoder.project_and_add(
            context, self.attention.out_lin, None, self.sa_layer_norm, hidden_states, run, stream + 1, rows
        )
        ffn = self.ffn
        return encoder.feed_forward(
            attended, ffn.lin1, ffn.activation, ffn.lin2, ffn.dropout, self.output_layer_norm, run, stream + 2, rows
        )

    def fusions(self) -> Fusions:
        ffn = self.ffn
        why = encoder.why_not_feed_forward(ffn.lin1, ffn.activation, ffn.lin2, self.output_layer_norm)
        return [
            ("bias + residual + LayerNorm", encoder.why_called(self.sa_layer_norm, touched.norm)),
            ("feed-forward in one operator, its GELU not kept", container(FFN)(ffn) or why),
        ]


class Encoder(_layers.Encoder):
    parts: ClassVar[Parts] = {"layer": Each(container(Layer))}


class BaseModel(_model.BaseModel):
    parts: ClassVar[Parts] = {"embeddings": container(Embeddings), "transformer": container(Encoder)}
    _output = BaseModelOutput
    _stack_path = "transformer"
    _embeddings_take = ("input_ids", "inputs_embeds", "position_ids")


class MaskedLM(_lm_heads.OwnWords, _lm_heads.MaskedLM):
    """Masked language model, whose head is its own parts."""

    parts: ClassVar[Parts] = {
        **_heads.TokenHead.parts,
        "vocab_transform": touched.linear,
        "activation": touched.activation,
        "vocab_layer_norm": touched.norm,
        "vocab_projector": touched.linear,
        "mlm_loss_fct": touched.mean_loss,
    }

    def _transformed(self, hidden_states: Tensor, called: Set[nn.Module]) -> Tensor:
        return _lm_heads.transform(hidden_states, self.vocab_transform, self.activation, self.vocab_layer_norm, called)

    def _decoder(self) -> nn.Module:
        return cast(nn.Module, self.vocab_projector)

    def _word_modules(self) -> tuple[nn.Module, ...]:
        of = self.vocab_transform, self.activation, self.vocab_layer_norm, self.vocab_projector
        return tuple(inner for module in of for inner in module.modules())


class FirstTokenHead(_heads.FirstTokenHead):
    """Reads each row's first hidden state itself."""

    parts = _heads.SequenceHead.parts


class QuestionAnswering(_heads.QuestionAnswering):
    """With a dropout before its product."""

    parts: ClassVar[Parts] = {**_heads.QuestionAnswering.parts, "dropout": touched.dropout}

    def _answers(self, hidden_states: Tensor) -> Tensor:
        return cast(Tensor, self.qa_outputs(self.dropout(hidden_states)))


globals().update(
    family(
        stock,
        {
            "Embeddings": Embeddings,
            "DistilBertSelfAttention": SelfAttention,
            "FFN": FFN,
            "TransformerBlock": Layer,
            "Transformer": Encoder,
            "DistilBertModel": BaseModel,
            "DistilBertForMaskedLM": MaskedLM,
            "DistilBertForSequenceClassification": FirstTokenHead,
            "DistilBertForMultipleChoice": FirstTokenHead,
            "DistilBertForTokenClassification": _heads.TokenClassification,
            "DistilBertForQuestionAnswering": QuestionAnswering,
        },
    )
)
