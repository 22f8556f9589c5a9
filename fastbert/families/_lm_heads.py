"""Heads whose labels are words, of every family: masked and left-to-right language models, and pretraining.

Dimension key:  B batch   L padded length   T packed tokens   N features   V vocabulary   M labelled rows
                K kept tokens
"""

import sys
from collections.abc import Set
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from fastbert import encoder, functional, touched
from fastbert.families import _base, _deferred, _inputs, _losses
from fastbert.families._family import Role, stock_of
from fastbert.families._heads import TokenHead
from fastbert.families._layers import Fusions, Product, product
from fastbert.families._model import PackedHidden
from fastbert.touched import Parts, container


def transform(
    hidden_states: Tensor, dense: nn.Module, activation: nn.Module, norm: nn.Module, called: Set[nn.Module]
) -> Tensor:
    """LayerNorm(activation(dense(x))), before the product with the vocabulary. called: leaves that are not read."""
    return encoder.normalise(encoder.linear_activation(hidden_states, dense, activation, called), norm, called)


def predict(
    transformed: Tensor,
    decoder: nn.Module,
    called: Set[nn.Module],
    labels: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Logits, (..., V); with labels, (M,), of transformed states (M, N), their cross-entropy."""
    if labels is None:
        return cast(Tensor, decoder(transformed))
    if decoder in called:
        return _losses.cross_entropy(decoder(transformed), labels, num_items=num_items)
    decoder = cast(nn.Linear, decoder)
    return functional.linear_cross_entropy(transformed, decoder.weight, decoder.bias, labels, num_items=num_items)


class Half(Role):
    """The half of a prediction head before the vocabulary."""

    def _leaves(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Its product, activation and LayerNorm."""
        raise NotImplementedError

    def _transformed(self, hidden_states: Tensor, called: Set[nn.Module]) -> Tensor:
        return transform(hidden_states, *self._leaves(), called)

    def fusions(self) -> Fusions:
        gelu = ("MLM head: linear + bias + GELU", encoder.why_not_gelu(*self._leaves()[:2]))
        return [gelu, *getattr(super(), "fusions", list)()]

    def products(self) -> list[Product]:
        return [product(*self._leaves()[:2])]


class Transform(Half):
    """It, where it is a module of its own."""

    parts: ClassVar[Parts] = {
        "dense": touched.linear,
        "transform_act_fn": touched.activation,
        "LayerNorm": touched.norm,
    }

    def _leaves(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.dense, self.transform_act_fn, self.LayerNorm

    def forward(self, hidden_states: Tensor, *, called: Set[nn.Module] | None = None) -> Tensor:
        """called: leaves that are not read; transformers' own way where it is None."""
        if called is None:
            return cast(Tensor, stock_of(self).forward(self, hidden_states))
        return self._transformed(hidden_states, called)


class PredictionHead(Role):
    """From hidden states to logits of the vocabulary: a transform, and a product with all words."""

    parts: ClassVar[Parts] = {"transform": container(Transform), "decoder": touched.linear}

    def _transformed(self, hidden_states: Tensor, called: Set[nn.Module]) -> Tensor:
        """What meets the vocabulary."""
        return cast(Tensor, self.transform(hidden_states, called=called))

    def forward(self, hidden_states: Tensor, *, called: Set[nn.Module] | None = None, **options: Any) -> Tensor:
        """What `predict` does; transformers' own where `called`, the leaves that are not read, is None."""
        if called is None:
            return cast(Tensor, stock_of(self).forward(self, hidden_states, **options))
        return predict(self._transformed(hidden_states, called), self.decoder, called, **options)

    def fusions(self) -> Fusions:
        return [("MLM head: labelled rows only", encoder.why_called(self.decoder, touched.linear))]


class PredictionHeads(Role):
    """One that holds a prediction head."""

    parts: ClassVar[Parts] = {"predictions": container(PredictionHead)}


class LMHead(TokenHead):
    """What the heads share whose labels are words of the vocabulary."""

    parts: ClassVar[Parts] = {**TokenHead.parts, "cls": container(PredictionHeads)}
    _kind: ClassVar[type[ModelOutput]] = MaskedLMOutput
    _output: ClassVar[type[ModelOutput]]
    _deferring: ClassVar[type[ModelOutput]]

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        return super().members(stock) | {"_output": cls._kind, "_deferring": _deferred.deferring(cls._kind)}

    def _head(self) -> Any:
        """The module of role PredictionHead."""
        return self.cls.predictions

    def _words(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """As `PredictionHead.forward`."""
        return cast(Tensor, self._head()(hidden_states, **options))

    def _word_modules(self) -> tuple[nn.Module, ...]:
        """All that `_words` calls."""
        return _base.surveyed(cast(nn.Module, self)).inside(self._head())

    def _token_labels(self, labels: Tensor | None, kwargs: dict[str, Any]) -> _inputs.TokenLabels | None:
        """What the base model is told of labels, with two arguments of the call, which are taken out."""
        max_labels, label_rows = kwargs.pop("max_labels", None), kwargs.pop("label_rows", None)
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
                return None, self._words(_kept(padded, keep))
            logits = self._words(padded)
            return self._loss(logits, labels, num_items), _kept(logits, keep)
        all_TN, packing, labelled = states.all_TN, states.packing, states.labelled
        this = cast(nn.Module, self)
        head, survey = self._words, _base.surveyed(this)
        called = survey.called

        def logits_BLV() -> Tensor:
            return packing.unpack(head(all_TN(), called=called))

        def kept_logits() -> Tensor:
            if isinstance(keep, int) and keep == 0:
                return logits_BLV()
            return head(_kept(packing.unpack(all_TN()), keep), called=called)

        if labels is None:
            return None, kept_logits()
        labels = _inputs.as_token_labels(labels, packing.shape)
        if labelled is None or survey.called_leaves:  # LoRA's dropout: one mask for the loss and the logits
            logits = logits_BLV()
            return self._loss(logits, labels, num_items), _kept(logits, keep)
        loss = head(cast(Tensor, states.labelled_MN), called=called, labels=labelled.labels, num_items=num_items)
        if labelled.too_many is not None:
            loss = torch.where(labelled.too_many, float("nan"), loss)
        if not _base.state(this).options.lazy_logits:
            return loss, kept_logits()
        modules = (*self._word_modules(), *states.computed_later)
        return loss, _deferred.later(kept_logits, modules, [(m, _base.surveyed(m)) for m in (this, self.base_model)])

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        return _losses.cross_entropy(logits, labels, num_items)

    def fusions(self) -> Fusions:
        why = _base.survey(cast(nn.Module, self)).first()
        if why is None:
            base = self.base_model
            why = base.why_touched() or base.why_all_rows(base.config.output_hidden_states)
        return [("last layer, in training: only the rows that are read", why)]

    def _result(self, loss: Tensor | None, logits: Any, output: Any, name: str = "logits", **fields: Any) -> Any:
        """The output, with the base model's own."""
        kinds = type(self)
        kind = kinds._deferring if isinstance(logits, _deferred.Deferred) else kinds._output
        states = {"hidden_states": output.hidden_states, "attentions": output.attentions}
        return kind(loss=loss, **{name: logits}, **states, **fields)


class OwnWords(LMHead):
    """Where the prediction head is not one module, but some of the model's own parts."""

    def _transformed(self, hidden_states: Tensor, called: Set[nn.Module]) -> Tensor:
        """What meets the vocabulary."""
        raise NotImplementedError

    def _decoder(self) -> nn.Module:
        """The product with the vocabulary."""
        raise NotImplementedError

    def _words(self, hidden_states: Tensor, *, called: Set[nn.Module] | None = None, **options: Any) -> Tensor:
        called = frozenset(self._word_modules()) if called is None else called
        return predict(self._transformed(hidden_states, called), self._decoder(), called, **options)

    def fusions(self) -> Fusions:
        return [
            ("MLM head: labelled rows only", encoder.why_called(self._decoder(), touched.linear)),
            *super().fusions(),
        ]


class MaskedLM(LMHead):
    @can_return_tuple
    def packed(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`.

        max_labels: at least as many as there are labels, best exactly: in training without an attention_mask nothing
        waits for a GPU then. If there are more, the loss is NaN; a ValueError on a CPU.
        label_rows: (M,) int64, of a packed batch: which of its tokens have a label, rising. Likewise, without a search.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        token_labels = self._token_labels(labels, kwargs)
        output, states = self._encode(token_labels, **kwargs)
        loss, logits = self._lm(states, output.last_hidden_state, labels, num_items)
        return self._result(loss, logits, output)


class CausalLM(LMHead):
    _kind = CausalLMOutputWithCrossAttentions
    facts = ("_loss_function", "loss_type")

    def why_changed(self) -> str | None:
        """A loss of one's own."""
        own = self.__dict__.get("_loss_function") is not None or self.loss_type not in (None, "ForCausalLM")
        return "its loss_function is replaced" if own else None

    @can_return_tuple
    def packed(
        self,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`.

        In training, and in evaluation with labels, there is no cache, whatever use_cache says.

        labels: (B, L), the tokens themselves: each is the label of the one before it. Of a packed batch, (1, T), the
        last token of each sequence has none.
        shift_labels: (B, L) or (1, T), each token's own label, the next token, and -100 for none: instead of labels.
        max_labels, label_rows: as in MaskedLM, of shift_labels, or of labels once they are shifted.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        if shift_labels is None and labels is not None:
            shift_labels = _shifted(labels, kwargs.get("cu_seq_lens_q"))
        if shift_labels is not None:
            use_cache = False
        token_labels = self._token_labels(shift_labels, kwargs)
        output, states = self._encode(token_labels, use_cache=use_cache, **kwargs)
        loss, logits = self._lm(states, output.last_hidden_state, shift_labels, num_items, logits_to_keep)
        cache, crossed = output.get("past_key_values"), output.get("cross_attentions")
        return self._result(loss, logits, output, past_key_values=cache, cross_attentions=crossed)

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """In at least float32, as transformers' for this class."""
        return _losses.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, num_items)


class PreTraining(LMHead):
    """Masked LM, and a pair of sentences: does the second follow the first?

    Attributes:
        _pair_label, _pair_logits: what transformers calls the second's label, and its logits.
    """

    _pair_label: ClassVar[str] = "next_sentence_label"
    _pair_logits: ClassVar[str] = "seq_relationship_logits"

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        kind = getattr(sys.modules[stock.__module__], f"{stock.__name__}Output")
        return super().members(stock) | {"_output": kind, "_deferring": _deferred.deferring(kind)}

    def _of_pair(self, pooled: Tensor) -> Tensor:
        """Logits, (B, 2)."""
        return cast(Tensor, self.cls.seq_relationship(pooled))

    @can_return_tuple
    def packed(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' arguments and outputs; `max_labels` and `label_rows` as in MaskedLM.

        With `num_items_in_batch`, the number of masked-LM labels of all accumulated batches, both losses are
        weighted with this batch's share of them; with `num_sequences_in_batch` too, the pairs' loss with its share of
        the sequences.
        """
        num_items = kwargs.pop("num_items_in_batch", None)
        num_sequences = kwargs.pop("num_sequences_in_batch", None)
        pair_label = kwargs.pop(self._pair_label, None)
        both = labels is not None and pair_label is not None
        token_labels = self._token_labels(labels if both else None, kwargs)
        output, states = self._encode(token_labels, **kwargs)
        loss, logits = self._lm(states, output.last_hidden_state, labels if both else None, num_items)
        of_pair = self._of_pair(output.pooler_output)
        if labels is not None and pair_label is not None:
            pair_loss = F.cross_entropy(of_pair.view(-1, 2), pair_label.view(-1))
            if num_sequences is not None:
                pair_loss = functional.divide(pair_loss * pair_label.numel(), num_sequences)
            elif num_items is not None:
                pair_loss = functional.divide(pair_loss * (labels != -100).sum(), num_items)
            loss = cast(Tensor, loss) + pair_loss
        return self._result(loss, logits, output, "prediction_logits", **{self._pair_logits: of_pair})


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
