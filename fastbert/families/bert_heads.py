"""transformers' BERT heads for tokens, answers and sequences, on packed hidden states.

Dimension key:  B batch   L padded length   T packed tokens
"""

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers.modeling_outputs import (
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as stock
from transformers.utils.generic import can_return_tuple

from fastbert import touched
from fastbert.families import _base, _inputs, _losses
from fastbert.families.bert import BertModel, Built, PackedHidden
from fastbert.touched import Parts, Whole, container

PADDING_LOGIT = -1000.0  # of question answering: no share of a softmax, and no loss overflows on it


class TokenHead(Built):
    """What the heads with a logit for each token share."""

    bert: Any

    def _encode(self, token_labels: _inputs.TokenLabels | None, **kwargs: Any) -> tuple[Any, PackedHidden | None]:
        """The base model's output, and its packed hidden states where it did not fall back."""
        kwargs["return_dict"] = True
        # FSDP has hooked it: it looks for tensors in what comes out, to gather the weights again for the backward.
        keep_packed = "bert" not in _base.surveyed(cast(nn.Module, self)).hooked
        output = self.bert(_keep_packed=keep_packed, _token_labels=token_labels, **kwargs)
        last = output.last_hidden_state
        return output, last if isinstance(last, PackedHidden) else None


class BertForTokenClassification(TokenHead, stock.BertForTokenClassification):
    parts: ClassVar[Parts] = {
        "bert": Whole(container(BertModel)),
        "dropout": touched.dropout,
        "classifier": touched.linear,
    }

    @_base.head_forward(stock.BertForTokenClassification)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`. Logits of padding are zeros."""
        num_items = kwargs.pop("num_items_in_batch", None)
        output, states = self._encode(
            None if labels is None else _inputs.TokenLabels(labels),
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if states is None:
            logits = self.classifier(self.dropout(output.last_hidden_state))
        else:
            logits = states.packing.unpack(self.classifier(self.dropout(states.all_TN())))
        loss = None if labels is None else _losses.cross_entropy(logits, labels, num_items)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class BertForQuestionAnswering(TokenHead, stock.BertForQuestionAnswering):
    parts: ClassVar[Parts] = {"bert": Whole(container(BertModel)), "qa_outputs": touched.linear}

    @_base.head_forward(stock.BertForQuestionAnswering)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs.

        Logits of padding are -1000: padding takes no share of the softmax. For a packed batch, logits are (1, T) and
        positions count within each sequence.
        """
        kwargs.pop("num_items_in_batch", None)
        if _answers_on_padding(attention_mask, start_positions, end_positions):
            kwargs["_fall_back"] = "labels on padding"
        output, states = self._encode(
            None,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if states is None:
            logits = rows = self.qa_outputs(output.last_hidden_state)
        else:
            logits_T2 = self.qa_outputs(states.all_TN())
            logits = rows = states.packing.unpack(logits_T2, PADDING_LOGIT)
            if states.packing.shape[0] != states.packing.sequences:
                rows = states.packing.per_sequence().unpack(logits_T2, PADDING_LOGIT)
        loss = None
        if start_positions is not None and end_positions is not None:
            start, end = (_losses.span_loss(rows[..., i], p) for i, p in enumerate((start_positions, end_positions)))
            loss = (start + end) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=logits[..., 0].contiguous(),
            end_logits=logits[..., 1].contiguous(),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class BertForNextSentencePrediction(Built, stock.BertForNextSentencePrediction):
    parts: ClassVar[Parts] = {"bert": Whole(container(BertModel))}
    forward = _base.head_forward(stock.BertForNextSentencePrediction)(
        _losses.honour_num_items(stock.BertForNextSentencePrediction)
    )


class BertForSequenceClassification(Built, stock.BertForSequenceClassification):
    parts: ClassVar[Parts] = {"bert": Whole(container(BertModel))}
    forward = _base.head_forward(stock.BertForSequenceClassification)(
        _losses.honour_num_items(stock.BertForSequenceClassification)
    )


class BertForMultipleChoice(Built, stock.BertForMultipleChoice):
    parts: ClassVar[Parts] = {"bert": Whole(container(BertModel))}
    forward = _base.head_forward(stock.BertForMultipleChoice)(_losses.honour_num_items(stock.BertForMultipleChoice))


def _answers_on_padding(attention_mask: Tensor | None, *positions: Tensor | None) -> bool:
    if attention_mask is None or attention_mask.ndim != 2:
        return False
    B, L = attention_mask.shape
    for position in positions:
        if position is None or position.numel() != B:
            continue
        inside = position.view(B, 1)
        on_padding = attention_mask.gather(1, inside.clamp(0, L - 1)) == 0
        if bool((on_padding & (inside >= 0) & (inside < L)).any()):
            return True
    return False


_base.register(
    BertForTokenClassification,
    BertForQuestionAnswering,
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForMultipleChoice,
)
