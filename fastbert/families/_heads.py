"""Heads for tokens, answers and sequences, of every family, on packed hidden states.

Dimension key:  B batch   C choices   L padded length   T packed tokens
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers.modeling_outputs import (
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import can_return_tuple

from fastbert import touched
from fastbert.families import _base, _inputs, _losses
from fastbert.families._family import BASE, HeadRole, Role
from fastbert.families._model import BaseModel, PackedHidden
from fastbert.touched import Parts, Whole, container

PADDING_LOGIT = -1000.0  # of question answering: no share of a softmax, and no loss overflows on it


class TokenHead(HeadRole):
    """What the heads with a logit for each token share."""

    parts: ClassVar[Parts] = {BASE: Whole(container(BaseModel))}

    def _encode(self, token_labels: _inputs.TokenLabels | None, **kwargs: Any) -> tuple[Any, PackedHidden | None]:
        """The base model's output, and its packed hidden states where it did not fall back."""
        kwargs["return_dict"] = True
        # FSDP has hooked it: it looks for tensors in what comes out, to gather the weights again for the backward.
        keep_packed = self.base_model_prefix not in _base.surveyed(cast(nn.Module, self)).hooked
        output = self.base_model(_keep_packed=keep_packed, _token_labels=token_labels, **kwargs)
        last = output.last_hidden_state
        return output, last if isinstance(last, PackedHidden) else None


class TokenClassification(TokenHead):
    """A class a token."""

    parts: ClassVar[Parts] = {**TokenHead.parts, "dropout": touched.dropout, "classifier": touched.linear}

    @can_return_tuple
    def packed(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`. Logits of padding are zeros."""
        num_items = kwargs.pop("num_items_in_batch", None)
        output, states = self._encode(None if labels is None else _inputs.TokenLabels(labels), **kwargs)
        if states is None:
            logits = self.classifier(self.dropout(output.last_hidden_state))
        else:
            logits = states.packing.unpack(self.classifier(self.dropout(states.all_TN())))
        loss = None if labels is None else _losses.cross_entropy(logits, labels, num_items)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class QuestionAnswering(TokenHead):
    """Where an answer starts and ends."""

    parts: ClassVar[Parts] = {**TokenHead.parts, "qa_outputs": touched.linear}

    def _answers(self, hidden_states: Tensor) -> Tensor:
        """Logits of starts and ends, (..., 2)."""
        return cast(Tensor, self.qa_outputs(hidden_states))

    @can_return_tuple
    def packed(self, start_positions: Tensor | None = None, end_positions: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' arguments and outputs.

        Logits of padding are -1000: padding takes no share of the softmax. For a packed batch, logits are (1, T) and
        positions count within each sequence.
        """
        kwargs.pop("num_items_in_batch", None)
        if _answers_on_padding(kwargs.get("attention_mask"), start_positions, end_positions):
            kwargs["_fall_back"] = "labels on padding"
        output, states = self._encode(None, **kwargs)
        if states is None:
            logits = rows = self._answers(output.last_hidden_state)
        else:
            logits_T2 = self._answers(states.all_TN())
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


class ClassificationHead(Role):
    """transformers' own; it takes hidden states, of which it reads each row's first."""


class SequenceHead(HeadRole):
    """transformers' own head, which reads what is pooled.

    In inference on a CPU only first tokens go through the whole last layer.
    """

    parts: ClassVar[Parts] = {BASE: Whole(container(BaseModel))}

    def _reads(self) -> str | None:
        """Which hidden states: "first", or of all the part that reads them; None for all."""
        return "first" if not self.training and self.device.type == "cpu" else None

    def _call(self, plain: Callable[..., Any], **kwargs: Any) -> Any:
        """transformers' forward."""
        return plain(self, **kwargs)

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        plain = _losses.honour_num_items(stock)

        def packed(self: Any, **kwargs: Any) -> Any:
            reads = self._reads()
            return self._call(plain, **({} if reads is None else {"_reads": reads}), **kwargs)

        return {"forward": _base.head_forward(stock, packed)}


class FirstTokenHead(SequenceHead):
    """One that reads each row's first hidden state: it gets no others, (B, 1, N)."""

    parts: ClassVar[Parts] = {**SequenceHead.parts, "classifier": container(ClassificationHead)}

    def _reads(self) -> str | None:
        return "first"


class OfChoices(SequenceHead):
    """Mixed into heads of multiple choice, whose padded batches are (B, C, L).

    A packed batch is (1, T) as everywhere, of B C sequences: the C choices of a question one after the other.
    """

    def _call(self, plain: Callable[..., Any], **kwargs: Any) -> Any:
        if kwargs.get("cu_seq_lens_q") is None:
            return super()._call(plain, **kwargs)
        return self._call_packed(plain, **kwargs)

    @can_return_tuple
    def _call_packed(
        self,
        plain: Callable[..., Any],
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits are (B, C) where there are labels, (B,); else C is not known, and they are (B C, 1)."""
        num_items, sequences = kwargs.pop("num_items_in_batch", None), kwargs["cu_seq_lens_q"].shape[0] - 1
        if labels is not None and (labels.numel() == 0 or sequences % labels.numel()):
            raise ValueError(f"{sequences} packed sequences are no multiple of {labels.numel()} labels, one a question")
        if input_ids is not None and input_ids.ndim == 2:
            input_ids = input_ids[:, None]
        if inputs_embeds is not None and inputs_embeds.ndim == 3:
            inputs_embeds = inputs_embeds[:, None]
        output = plain(self, input_ids=input_ids, inputs_embeds=inputs_embeds, return_dict=True, **kwargs)
        if labels is None:
            return output
        logits = output.logits.view(labels.numel(), -1)
        return MultipleChoiceModelOutput(
            loss=_losses.cross_entropy(logits, labels, num_items),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class FirstTokenChoices(OfChoices, FirstTokenHead):
    """One that reads each choice's first hidden state."""


HEADS: dict[str, type[Role]] = {
    "ForNextSentencePrediction": SequenceHead,
    "ForSequenceClassification": SequenceHead,
    "ForMultipleChoice": OfChoices,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
}


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
