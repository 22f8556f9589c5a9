"""DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108): BERT by other names, no token types, no pooler."""

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


class SelfAttention(Role):
    parts: ClassVar[Parts] = {
        "q_lin": touched.linear,
        "k_lin": touched.linear,
        "v_lin": touched.linear,
        "out_lin": touched.linear,
        "dropout": touched.dropout_rate,
    }
    facts = ("is_causal", "attention_head_size")

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
        norm: nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """With a run: the first half of a layer, which ends in this norm."""
        if run is None or norm is None:
            return stock_of(self).forward(self, hidden_states, *args, **kwargs)
        projections = self.q_lin, self.k_lin, self.v_lin
        context = _layers.attend(self, projections, hidden_states, run, stream, self.dropout)
        if rows is not None:
            context, hidden_states = context.index_select(0, rows), hidden_states.index_select(0, rows)
        return encoder.project_and_add(context, self.out_lin, None, norm, hidden_states, run, stream + 1, rows)

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

    def forward(
        self,
        input: Tensor,
        *,
        run: Run | None = None,
        stream: int = 0,
        rows: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> Any:
        """With a run: the second half of a layer, which ends in this norm."""
        if run is None or norm is None:
            return stock_of(self).forward(self, input)
        return encoder.feed_forward(input, self.lin1, self.activation, self.lin2, self.dropout, norm, run, stream, rows)

    def products(self) -> list[Product]:
        return [product(self.lin1, self.activation), product(self.lin2)]


class Layer(Role):
    parts: ClassVar[Parts] = {
        "attention": container(SelfAttention),
        "sa_layer_norm": touched.norm,
        "ffn": container(FFN),
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
        attended = self.attention(hidden_states, run=run, stream=stream, rows=rows, norm=self.sa_layer_norm)
        return self.ffn(attended, run=run, stream=stream + 2, rows=rows, norm=self.output_layer_norm)

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


class MaskedLM(_lm_heads.OwnTransform, _lm_heads.OwnWords, _lm_heads.MaskedLM):
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
