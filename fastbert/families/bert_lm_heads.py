"""transformers' BERT heads whose labels are words: masked and left-to-right language models, and pretraining.

Dimension key:  B batch   L padded length   T packed tokens   N features   V vocabulary   K kept tokens
"""

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
)
from transformers.models.bert import modeling_bert as stock
from transformers.utils.generic import can_return_tuple

from fastbert import functional
from fastbert.families import _base, _deferred, _inputs, _losses
from fastbert.families.bert import BertModel, PackedHidden
from fastbert.families.bert_heads import TokenHead
from fastbert.families.bert_layers import BertOnlyMLMHead, BertPreTrainingHeads, Fusions
from fastbert.touched import Parts, Whole, container


@dataclass
class BertMaskedLMOutput(_deferred.DeferredFields, MaskedLMOutput):
    """transformers' output; `logits` of a training step are computed when they are read."""


@dataclass
class BertForPreTrainingOutput(_deferred.DeferredFields, stock.BertForPreTrainingOutput):
    """transformers' output; `prediction_logits` of a training step are computed when they are read."""


@dataclass
class BertLMOutput(_deferred.DeferredFields, CausalLMOutputWithCrossAttentions):
    """transformers' output; `logits` of a training step are computed when they are read."""


class _LMHead(TokenHead):
    """What the heads share whose labels are words of the vocabulary."""

    parts: ClassVar[Parts] = {
        "bert": Whole(container(BertModel)),
        "cls": container(BertOnlyMLMHead, BertPreTrainingHeads),
    }
    cls: Any
    training: bool

    def _token_labels(
        self, labels: Tensor | None, max_labels: int | None, label_rows: Tensor | None
    ) -> _inputs.TokenLabels | None:
        return None if labels is None else _inputs.TokenLabels(labels, self.training, max_labels, label_rows)

    def _lm(
        self,
        states: PackedHidden | None,
        padded: Any,
        labels: Tensor | None,
        num_items: Tensor | int | None,
        keep: Tensor | int = 0,
    ) -> tuple[Tensor | None, Any]:
        """The loss and the logits, which in training are Deferred.

        keep: of which tokens the user wants logits, transformers' `logits_to_keep`.
        """
        if states is None:
            if labels is None:
                return None, self.cls.predictions(_kept(padded, keep))
            logits = self.cls.predictions(padded)
            return self._loss(logits, labels, num_items), _kept(logits, keep)
        all_TN, packing, labelled = states.all_TN, states.packing, states.labelled
        this = cast(nn.Module, self)
        head, survey = self.cls.predictions, _base.surveyed(this)
        called = survey.called

        def logits_BLV() -> Tensor:
            return packing.unpack(head(all_TN(), called=called))

        def kept_logits() -> Tensor:
            if isinstance(keep, int) and keep == 0:
                return logits_BLV()
            return cast(Tensor, head(_kept(packing.unpack(all_TN()), keep), called=called))

        if labels is None:
            return None, kept_logits()
        labels = _inputs.as_token_labels(labels, packing.shape)
        if labelled is None or survey.called_leaves:  # LoRA's dropout: one mask for the loss and the logits
            logits = logits_BLV()
            return self._loss(logits, labels, num_items), _kept(logits, keep)
        loss = head(states.labelled_MN, called=called, labels=labelled.labels, num_items=num_items)
        if labelled.too_many is not None:
            loss = torch.where(labelled.too_many, float("nan"), loss)
        if not _base.state(this).options.lazy_logits:
            return loss, kept_logits()
        modules = (*survey.inside(head), *states.computed_later)
        return loss, _deferred.later(kept_logits, modules, [(m, _base.surveyed(m)) for m in (this, self.bert)])

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        return _losses.cross_entropy(logits, labels, num_items)

    def fusions(self) -> Fusions:
        why = _base.survey(cast(nn.Module, self)).first()
        if why is None:
            why = self.bert.why_touched() or self.bert.why_all_rows(self.bert.config.output_hidden_states)
        return [("last layer, in training: only the rows that are read", why)]


class BertForMaskedLM(_LMHead, stock.BertForMaskedLM):
    @_base.head_forward(stock.BertForMaskedLM)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        max_labels: int | None = None,
        label_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`.

        max_labels: at least as many as there are labels, best exactly: in training without an attention_mask nothing
        waits for a GPU then. If there are more, the loss is NaN; a ValueError on a CPU.
        label_rows: (M,) int64, of a packed batch: which of its tokens have a label, rising. Likewise, without a search.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        output, states = self._encode(
            self._token_labels(labels, max_labels, label_rows),
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
        loss, logits = self._lm(states, output.last_hidden_state, labels, num_items)
        kind = BertMaskedLMOutput if isinstance(logits, _deferred.Deferred) else MaskedLMOutput
        return kind(loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions)


class BertLMHeadModel(_LMHead, stock.BertLMHeadModel, GenerationMixin):
    facts = ("_loss_function", "loss_type")

    def why_changed(self) -> str | None:
        """A loss of one's own."""
        own = self.__dict__.get("_loss_function") is not None or self.loss_type not in (None, "ForCausalLM")
        return "its loss_function is replaced" if own else None

    @_base.head_forward(stock.BertLMHeadModel)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        max_labels: int | None = None,
        label_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`.

        In training, and in evaluation with labels, there is no cache, whatever use_cache says.

        labels: (B, L), the tokens themselves: each is the label of the one before it. Of a packed batch, (1, T), the
        last token of each sequence has none.
        shift_labels: (B, L) or (1, T), each token's own label, the next token, and -100 for none: instead of labels.
        max_labels, label_rows: as in BertForMaskedLM, of shift_labels, or of labels once they are shifted.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        if shift_labels is None and labels is not None:
            shift_labels = _shifted(labels, kwargs.get("cu_seq_lens_q"))
        if shift_labels is not None:
            use_cache = False
        output, states = self._encode(
            self._token_labels(shift_labels, max_labels, label_rows),
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        loss, logits = self._lm(states, output.last_hidden_state, shift_labels, num_items, logits_to_keep)
        kind = BertLMOutput if isinstance(logits, _deferred.Deferred) else CausalLMOutputWithCrossAttentions
        return kind(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            cross_attentions=output.cross_attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """In at least float32, as transformers' for this class."""
        return _losses.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, num_items)


class BertForPreTraining(_LMHead, stock.BertForPreTraining):
    @_base.head_forward(stock.BertForPreTraining)
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        max_labels: int | None = None,
        label_rows: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; `max_labels` and `label_rows` as in BertForMaskedLM.

        With `num_items_in_batch`, the number of masked-LM labels of all accumulated batches, both losses are
        weighted with this batch's share of them; with `num_sequences_in_batch` too, the next-sentence loss with its
        share of the sequences.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        num_sequences = kwargs.pop("num_sequences_in_batch", None)
        both = labels is not None and next_sentence_label is not None
        output, states = self._encode(
            self._token_labels(labels if both else None, max_labels, label_rows),
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        loss, logits = self._lm(states, output.last_hidden_state, labels if both else None, num_items)
        next_sentence_logits = self.cls.seq_relationship(output.pooler_output)
        if labels is not None and next_sentence_label is not None:
            next_sentence_loss = F.cross_entropy(next_sentence_logits.view(-1, 2), next_sentence_label.view(-1))
            if num_sequences is not None:
                next_sentence_loss = functional.divide(next_sentence_loss * next_sentence_label.numel(), num_sequences)
            elif num_items is not None:
                next_sentence_loss = functional.divide(next_sentence_loss * (labels != -100).sum(), num_items)
            loss = cast(Tensor, loss) + next_sentence_loss
        kind = BertForPreTrainingOutput if isinstance(logits, _deferred.Deferred) else stock.BertForPreTrainingOutput
        return kind(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=next_sentence_logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


def _shifted(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Each token's label is that of the next one; the last token of a row, or of a packed sequence, has none."""
    L = labels.shape[-1]
    if L == 0:
        return labels
    shifted = F.pad(labels[..., 1:], (0, 1), value=-100)
    if cu_seqlens is None or cu_seqlens.ndim != 1:
        return shifted
    last = (cu_seqlens[1:].long() - 1) % L  # of an empty first sequence the batch's last token, which has none anyway
    return shifted.index_fill(-1, last, -100)


def _kept(of_tokens: Tensor, keep: Tensor | int) -> Tensor:
    """(B, L, N) to (B, K, N): the last `keep` tokens, all for 0; or those that a tensor names, or a mask."""
    if isinstance(keep, int):
        return of_tokens[:, -keep:] if keep else of_tokens
    if keep.ndim == 2:
        return of_tokens[keep] if keep.dtype == torch.bool else of_tokens.take_along_dim(keep[..., None], dim=1)
    return of_tokens[:, keep]


_base.register(BertForMaskedLM, BertLMHeadModel, BertForPreTraining)
