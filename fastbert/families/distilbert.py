"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT by other names, no token types, no pooler."""

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert as stock

from fastbert import encoder, prepared, touched
from fastbert.encoder import Run
from fastbert.families import _heads, _inputs, _layers, _lm_heads, _model
from fastbert.families._family import Packed, family
from fastbert.families._layers import Fusions, Product, joined, product
from fastbert.touched import CALLED, Each, Parts, container


class Embeddings(_layers.Embeddings):
    parts: ClassVar[Parts] = {n: of for n, of in _layers.Embeddings.parts.items() if n != "token_type_embeddings"}
    buffers_read = ("position_ids",)

    def _token_types(self) -> Tensor:
        """One type, that adds nothing."""
        weight = self.word_embeddings.weight
        return cast(Tensor, weight.new_zeros(1, weight.shape[1]))

    def _limits(self, size: int, device: torch.device) -> _inputs.Limits:
        return self._limits_of(0, size, device)


class SelfAttention(_layers.Attends):
    parts: ClassVar[Parts] = {
        "q_lin": touched.linear,
        "k_lin": touched.linear,
        "v_lin": touched.linear,
        "out_lin": touched.linear,
        "dropout": touched.dropout_rate,
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None, norm: nn.Module) -> Tensor:
        """The first half of a layer, which ends in this norm."""
        projections = self.q_lin, self.k_lin, self.v_lin
        context = self._attend(projections, self.dropout, hidden_TN, run, stream)
        context, hidden_TN = encoder.chosen(rows, context, hidden_TN)
        return encoder.project_and_add(context, self.out_lin, None, norm, hidden_TN, run, stream + 1, rows)

    def products(self) -> list[Product]:
        return [*joined(self.q_lin, self.k_lin, self.v_lin), product(self.out_lin)]


class FFN(Packed):
    parts: ClassVar[Parts] = {
        "dropout": touched.dropout,
        "lin1": touched.linear,
        "lin2": touched.linear,
        "activation": touched.activation,
    }

    def _packed(self, x: Tensor, run: Run, stream: int, rows: Tensor | None, norm: nn.Module) -> Tensor:
        """The second half of a layer, which ends in this norm."""
        return encoder.feed_forward(x, self.lin1, self.activation, self.lin2, self.dropout, norm, run, stream, rows)

    def products(self) -> list[Product]:
        return [product(self.lin1, self.activation), product(self.lin2)]


class Layer(Packed):
    parts: ClassVar[Parts] = {
        "attention": container(SelfAttention),
        "sa_layer_norm": touched.norm,
        "ffn": container(FFN),
        "output_layer_norm": touched.norm,
    }

    def _packed(self, hidden_TN: Tensor, run: Run, stream: int, rows: Tensor | None) -> Tensor:
        attended = self.attention(hidden_TN, run=run, stream=stream, rows=rows, norm=self.sa_layer_norm)
        return cast(Tensor, self.ffn(attended, run=run, stream=stream + 2, rows=rows, norm=self.output_layer_norm))

    def _prepared_parts(self) -> prepared.Parts:
        attention, ffn = self.attention, self.ffn
        return cast(
            prepared.Parts,
            attention._layer_parts(
                (attention.q_lin, attention.k_lin, attention.v_lin),
                (attention.out_lin, self.sa_layer_norm),
                (ffn.lin1, ffn.activation, ffn.lin2, self.output_layer_norm),
            ),
        )

    def fusions(self) -> Fusions:
        ffn = self.ffn
        why = container(FFN)(ffn)
        if why is None or why == CALLED:
            why = encoder.why_not_feed_forward(ffn.lin1, ffn.activation, ffn.lin2, self.output_layer_norm)
        return [
            ("bias + residual + LayerNorm", encoder.why_called(self.sa_layer_norm, touched.norm)),
            ("feed-forward in one operator, its GELU not kept", why),
        ]


class Encoder(_layers.Encoder):
    parts: ClassVar[Parts] = {"layer": Each(container(Layer))}


class BaseModel(_model.BaseModel):
    parts: ClassVar[Parts] = {"embeddings": container(Embeddings), "transformer": container(Encoder)}
    _output = BaseModelOutput
    _stack_path = "transformer"
    _embeddings_take = ("input_ids", "inputs_embeds", "position_ids")


class MaskedLM(_lm_heads.Half, _lm_heads.OwnWords, _lm_heads.MaskedLM):
    """Masked language model, whose head is its own parts."""

    parts: ClassVar[Parts] = {
        **_heads.TokenHead.parts,
        "vocab_transform": touched.linear,
        "activation": touched.activation,
        "vocab_layer_norm": touched.norm,
        "vocab_projector": touched.linear,
        "mlm_loss_fct": touched.mean_loss,
    }

    def _leaves(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.vocab_transform, self.activation, self.vocab_layer_norm

    def _decoder(self) -> nn.Module:
        return cast(nn.Module, self.vocab_projector)

    def _word_modules(self) -> tuple[nn.Module, ...]:
        of = (*self._leaves(), self.vocab_projector)
        return tuple(inner for module in of for inner in module.modules())


class FirstTokenHead(_heads.FirstTokenHead):
    """Reads each row's first hidden state itself."""

    parts = _heads.SequenceHead.parts


class FirstTokenChoices(_heads.FirstTokenChoices):
    """The same, of each choice."""

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
            "DistilBertForMultipleChoice": FirstTokenChoices,
            "DistilBertForTokenClassification": _heads.TokenClassification,
            "DistilBertForQuestionAnswering": QuestionAnswering,
        },
    )
)
