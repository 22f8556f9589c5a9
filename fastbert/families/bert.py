"""transformers' BERT on the packed encoder.

Every class is transformers' class of the same name with another forward. Given a `run`, a module takes packed hidden
states, (T, N); without one it is transformers' own, which is how calls fall back.

Dimension key:  B batch   L padded length   T packed tokens   N features   V vocabulary   M labelled rows
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    TokenClassifierOutput,
)
from transformers.models.bert import modeling_bert as stock
from transformers.utils.generic import can_return_tuple

from fastbert import encoder, functional
from fastbert.encoder import Run
from fastbert.families import _base, _inputs
from fastbert.kernels import _launch
from fastbert.packing import Packing

Fusions = list[tuple[str, str | None]]  # what a module fuses, and why it does not, for `report`
Products = list[tuple[int, int, str | None]]  # of a module: features in and out, and the form of a GELU behind it


def _product(dense: nn.Module, activation: nn.Module | None = None) -> Products:
    """None of a module that is called: what it computes is its own business."""
    if not encoder.is_plain(dense, nn.Linear):
        return []
    return [(dense.in_features, dense.out_features, encoder.gelu_form(activation))]


class BertEmbeddings(stock.BertEmbeddings):
    def forward(
        self, *args: Any, run: Run | None = None, inputs: _inputs.Inputs | None = None, **kwargs: Any
    ) -> Tensor:
        if run is None or inputs is None:
            return super().forward(*args, **kwargs)
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
        dtype = _base.state(self).residual_dtype
        if dtype is None or not torch.is_autocast_enabled(hidden_TN.device.type):
            return hidden_TN
        return hidden_TN.to(dtype)

    def fusions(self) -> Fusions:
        return [("embedding sum + LayerNorm + dropout", encoder.why_not_plain(self.LayerNorm, nn.LayerNorm))]


class BertSelfAttention(stock.BertSelfAttention):
    def forward(self, hidden_states: Tensor, *args: Any, run: Run | None = None, stream: int = 0, **kwargs: Any) -> Any:
        if run is None:
            return super().forward(hidden_states, *args, **kwargs)
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

    def fusions(self) -> Fusions:
        return [("packed attention", None)]

    def products(self) -> Products:
        """All three at once, as where there are tokens enough."""
        return [(K, 3 * N, form) for K, N, form in _product(self.query)]


class BertSelfOutput(stock.BertSelfOutput):
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
            return super().forward(hidden_states, input_tensor)
        return encoder.project_and_add(
            hidden_states, self.dense, self.dropout, self.LayerNorm, input_tensor, run, stream, rows
        )

    def fusions(self) -> Fusions:
        return [("bias + dropout + residual + LayerNorm", encoder.why_not_plain(self.LayerNorm, nn.LayerNorm))]

    def products(self) -> Products:
        return _product(self.dense)


class BertAttention(stock.BertAttention):
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
            return super().forward(hidden_states, *args, **kwargs)
        context = self.self(hidden_states, run=run, stream=stream)
        if rows is not None:
            context, hidden_states = context.index_select(0, rows), hidden_states.index_select(0, rows)
        return self.output(context, hidden_states, run=run, stream=stream + 1, rows=rows)


class BertIntermediate(stock.BertIntermediate):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if _launch.why_not(hidden_states.device) is not None:
            return super().forward(hidden_states)
        return encoder.linear_activation(hidden_states, self.dense, self.intermediate_act_fn)

    def fusions(self) -> Fusions:
        return [("linear + bias + GELU", encoder.why_not_gelu(self.dense, self.intermediate_act_fn))]

    def products(self) -> Products:
        return _product(self.dense, self.intermediate_act_fn)


class BertOutput(stock.BertOutput):
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
            return super().forward(hidden_states, input_tensor)
        return encoder.project_and_add(
            hidden_states, self.dense, self.dropout, self.LayerNorm, input_tensor, run, stream, rows
        )

    def fusions(self) -> Fusions:
        return [("bias + dropout + residual + LayerNorm", encoder.why_not_plain(self.LayerNorm, nn.LayerNorm))]

    def products(self) -> Products:
        return _product(self.dense)


class BertLayer(stock.BertLayer):
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
            return super().forward(hidden_states, *args, **kwargs)
        attended = self.attention(hidden_states, run=run, stream=stream, rows=rows)
        inner, output = self.intermediate, self.output
        if self._why_not_one_operator() is not None:
            return output(inner(attended), attended, run=run, stream=stream + 2, rows=rows)
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

    def _why_not_one_operator(self) -> str | None:
        """Why the halves of the feed-forward are called one after the other, or None."""
        inner, output = self.intermediate, self.output
        return (
            encoder.why_not_plain(inner, BertIntermediate)
            or encoder.why_not_plain(output, BertOutput)
            or encoder.why_not_feed_forward(inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm)
        )

    def fusions(self) -> Fusions:
        return [("feed-forward in one operator, its GELU not kept", self._why_not_one_operator())]


@dataclass
class _Encoded(BaseModelOutputWithPastAndCrossAttentions):
    last_layer_input: Tensor | None = None


class BertEncoder(stock.BertEncoder):
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
            return super().forward(hidden_states, *args, **kwargs)
        last, hidden, before = encoder.run_layers(hidden_states, self.layer, run, wanted or set(), rows)
        return _Encoded(
            last_hidden_state=last, hidden_states=cast(Any, hidden), last_layer_input=None if rows is None else before
        )


class BertPredictionHeadTransform(stock.BertPredictionHeadTransform):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if _launch.why_not(hidden_states.device) is not None:
            return super().forward(hidden_states)
        hidden_states = encoder.linear_activation(hidden_states, self.dense, self.transform_act_fn)
        if not encoder.is_plain(self.LayerNorm, nn.LayerNorm):
            return cast(Tensor, self.LayerNorm(hidden_states))
        norm = self.LayerNorm
        return functional.layer_norm(hidden_states, norm.weight, norm.bias, eps=norm.eps)

    def fusions(self) -> Fusions:
        return [("MLM head: linear + bias + GELU", encoder.why_not_gelu(self.dense, self.transform_act_fn))]

    def products(self) -> Products:
        return _product(self.dense, self.transform_act_fn)


class BertLMPredictionHead(stock.BertLMPredictionHead):
    def forward(
        self, hidden_states: Tensor, labels: Tensor | None = None, num_items: Tensor | int | None = None
    ) -> Tensor:
        """Logits, (..., V); with labels, (M,), of hidden states (M, N), their cross-entropy."""
        if labels is None:
            return cast(Tensor, super().forward(hidden_states))  # type: ignore[no-untyped-call]
        hidden_MN = self.transform(hidden_states)
        if encoder.is_plain(self.decoder, nn.Linear):
            return functional.linear_cross_entropy(
                hidden_MN, self.decoder.weight, self.decoder.bias, labels, num_items=num_items
            )
        return _cross_entropy(self.decoder(hidden_MN), labels, num_items)

    def fusions(self) -> Fusions:
        return [("MLM head: labelled rows only", encoder.why_not_plain(self.decoder, nn.Linear))]


@dataclass(frozen=True, eq=False)
class PackedHidden:
    """What a head gets that works on packed hidden states. In `BertModel`'s output instead of padded ones.

    Attributes:
        all_TN: returns all of them, or computes them.
        labelled: which tokens have a label, where the head asked for that.  labelled_MN: their hidden states.
    """

    all_TN: Callable[[], Tensor]
    packing: Packing
    labelled: _inputs.Labelled | None = None
    labelled_MN: Tensor | None = None


class _Built:
    """Built directly (not patched later), a model gets fastbert's classes in all of its parts."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _base.swap(cast(nn.Module, self), CLASSES, _base.State())


class BertModel(_Built, stock.BertModel):
    @_base.same_signature(stock.BertModel)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; also `cu_seq_lens_q`, `max_length_q` for a packed batch, (1, T).

        Padded rows of every hidden state are zeros. A packed batch has one pooled vector for each sequence. A decoder
        returns a cache in evaluation only, and not of a packed batch.

        Raises:
            ValueError: naming the argument and the bound, see `fastbert.families._inputs`.
        """
        keep_packed, token_labels = kwargs.pop("_keep_packed", False), kwargs.pop("_token_labels", None)
        reason = kwargs.pop("_fall_back", None) or self._why_not_packed(
            encoder_hidden_states, past_key_values, use_cache, attention_mask, kwargs
        )
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        inputs = None
        if reason is None:
            inputs = _inputs.prepare(
                self._limits(),
                input_ids,
                attention_mask,
                token_type_ids,
                position_ids,
                inputs_embeds,
                cu_seqlens,
                kwargs.get("max_length_q"),
                token_labels,
            )
            if inputs.labels_on_padding:
                reason = "labels on padding"
            elif inputs.pads_first and self.pooler is not None:
                reason = "the pooler reads each row's first token, and one is padding"
        if inputs is None or reason is not None:
            _base.fall_back(self, reason or "")
            if cu_seqlens is not None:
                raise ValueError(f"a packed batch (cu_seq_lens_q) cannot fall back to transformers, but must: {reason}")
            return super().forward(
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
        packing = inputs.packing
        drops = self.training and max(self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob) > 0
        seed = functional.draw_seed(packing.cu_seqlens.device) if drops else None
        run = Run(packing, seed, causal=bool(self.config.is_decoder))
        if not torch.compiler.is_compiling():
            _base.state(self).packed_calls += 1

        layers = len(self.encoder.layer)
        selection = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        wanted = _wanted(selection, layers + 1)
        rows = self._rows_read(inputs, selection)
        embedded_TN = self.embeddings(run=run, inputs=inputs)
        encoded = self.encoder(embedded_TN, run=run, wanted=wanted, rows=rows)
        hidden_TN = encoded.last_hidden_state
        pooled = None
        if self.pooler is not None:
            first_BN = packing.first(hidden_TN) if rows is None else packing.blank_empty(hidden_TN[: packing.sequences])
            pooled = self.pooler(first_BN[:, None])
        last: Any
        if keep_packed:
            last = self._packed_hidden(encoded, inputs, rows, run)
        else:
            last = encoded.hidden_states[layers] if layers in wanted else packing.unpack(hidden_TN)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states if selection is not None and selection is not False else None,
        )
        return output.to_tuple() if kwargs.get("return_dict", self.config.return_dict) is False else output

    def _rows_read(self, inputs: _inputs.Inputs, selection: Any) -> Tensor | None:
        """The tokens whose last hidden state somebody reads: the first of each sequence, those with a label.

        (R,) int64, which of the packed tokens they are; None for all.
        """
        if inputs.labelled is None or self.why_all_rows(selection):
            return None
        rows = inputs.labelled.rows
        if self.pooler is not None:
            rows = torch.cat([inputs.packing.first_rows(), rows])
        return rows if rows.shape[0] < inputs.packing.tokens else None

    def why_all_rows(self, selection: Any) -> str | None:
        """Why the last layer runs for all tokens where a head reads only some, or None.

        selection: of hidden states, as in `output_hidden_states`.
        """
        layers = self.encoder.layer
        if not _base.state(self).last_layer_subset:
            return "last_layer_subset=False"
        if selection is not None and selection is not False:
            return "output_hidden_states"
        if not layers or any(encoder.is_hooked(module) for module in layers[-1].modules()):
            return "the last layer is hooked" if layers else "there is no layer"
        return None

    def _packed_hidden(
        self, encoded: _Encoded, inputs: _inputs.Inputs, rows: Tensor | None, run: Run
    ) -> "PackedHidden":
        hidden_TN, labelled = cast(Tensor, encoded.last_hidden_state), inputs.labelled
        if rows is None or labelled is None:
            labelled_MN = None if labelled is None else hidden_TN.index_select(0, labelled.rows)
            return PackedHidden(lambda: hidden_TN, inputs.packing, labelled, labelled_MN)
        all_TN = encoder.last_layer(cast(Tensor, encoded.last_layer_input), self.encoder.layer, run)
        return PackedHidden(all_TN, inputs.packing, labelled, hidden_TN[rows.shape[0] - labelled.rows.shape[0] :])

    def _why_not_packed(
        self,
        encoder_hidden_states: Tensor | None,
        past_key_values: Any,
        use_cache: bool | None,
        attention_mask: Any,
        kwargs: dict[str, Any],
    ) -> str | None:
        """Why this call must go to transformers, or None."""
        config = self.config
        if config.add_cross_attention:
            return "a decoder with cross-attention"
        if encoder_hidden_states is not None or past_key_values is not None:
            return "cross-attention or a cache"
        if config.is_decoder and not self.training:
            if use_cache is None:
                use_cache = config.use_cache and kwargs.get("cu_seq_lens_q") is None
            if use_cache:
                return "a decoder that returns a cache"
        if kwargs.get("output_attentions", config.output_attentions):
            return "output_attentions"
        for is_causal in (kwargs.get("is_causal"), getattr(config, "is_causal", None)):
            if is_causal is not None and bool(is_causal) != bool(config.is_decoder):
                return "is_causal"
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2):
            if isinstance(attention_mask, Tensor) and attention_mask.ndim != 4:
                raise ValueError(f"attention_mask must be 2-D or 4-D, but is {tuple(attention_mask.shape)}")
            return "an attention_mask that is not 2-D"
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            return "exporting: the exported program is transformers' own"
        return _launch.why_not(self.device) or self._foreign_part()

    def _foreign_part(self) -> str | None:
        """The first part that somebody replaced with a module that fastbert does not know, or whose mask is another."""
        if not isinstance(self.embeddings, BertEmbeddings):
            return _foreign(self.embeddings)
        if not isinstance(self.encoder, BertEncoder):
            return _foreign(self.encoder)
        for layer in self.encoder.layer:
            if not isinstance(layer, BertLayer):
                return _foreign(layer)
            if not isinstance(layer.attention, BertAttention):
                return _foreign(layer.attention)
            if not isinstance(layer.intermediate, BertIntermediate):
                return _foreign(layer.intermediate)
            if not isinstance(layer.output, BertOutput):
                return _foreign(layer.output)
            if not isinstance(layer.attention.self, BertSelfAttention):
                return _foreign(layer.attention.self)
            if not isinstance(layer.attention.output, BertSelfOutput):
                return _foreign(layer.attention.output)
            if bool(layer.attention.self.is_causal) != bool(self.config.is_decoder):
                return "a layer that was not built with config.is_decoder as it is now"
        return None

    def fusions(self) -> Fusions:
        decoder = "a decoder with cross-attention" if self.config.add_cross_attention else None
        return [
            (
                "no padding from the embeddings to the last layer",
                decoder or _launch.why_not(self.device) or self._foreign_part(),
            )
        ]

    def _limits(self) -> _inputs.Limits:
        embeddings = self.embeddings
        return _inputs.Limits(
            vocab_size=embeddings.word_embeddings.num_embeddings,
            type_vocab_size=embeddings.token_type_embeddings.num_embeddings,
            max_position_embeddings=embeddings.position_embeddings.num_embeddings,
            hidden_size=self.config.hidden_size,
            device=self.device,
        )


class _Head(_Built):
    """What the heads with a logit for each token share."""

    bert: Any

    def _encode(self, token_labels: _inputs.TokenLabels | None, **kwargs: Any) -> tuple[Any, PackedHidden | None]:
        """The base model's output, and its packed hidden states where it did not fall back."""
        kwargs["return_dict"] = True
        output = self.bert(_keep_packed=True, _token_labels=token_labels, **kwargs)
        last = output.last_hidden_state
        return output, last if isinstance(last, PackedHidden) else None


@dataclass
class BertMaskedLMOutput(_base.DeferredFields, MaskedLMOutput):
    """transformers' output; `logits` of a training step are computed when they are read."""


@dataclass
class BertForPreTrainingOutput(_base.DeferredFields, stock.BertForPreTrainingOutput):
    """transformers' output; `prediction_logits` of a training step are computed when they are read."""


@dataclass
class BertLMOutput(_base.DeferredFields, CausalLMOutputWithCrossAttentions):
    """transformers' output; `logits` of a training step are computed when they are read."""


class _LMHead(_Head):
    """What the heads share whose labels are words of the vocabulary."""

    cls: Any
    training: bool

    def _token_labels(
        self, labels: Tensor | None, max_labels: int | None, label_rows: Tensor | None
    ) -> _inputs.TokenLabels | None:
        find = self.training and isinstance(self.cls.predictions, BertLMPredictionHead)
        return None if labels is None else _inputs.TokenLabels(labels, find, max_labels, label_rows)

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

        def logits_BLV() -> Tensor:
            return packing.unpack(self.cls.predictions(all_TN()))

        def kept_logits() -> Tensor:
            if isinstance(keep, int) and keep == 0:
                return logits_BLV()
            return cast(Tensor, self.cls.predictions(_kept(packing.unpack(all_TN()), keep)))

        if labels is None:
            return None, kept_logits()
        _check_token_labels(labels, packing)
        if labelled is None:
            logits = logits_BLV()
            return self._loss(logits, labels, num_items), _kept(logits, keep)
        loss = self.cls.predictions(states.labelled_MN, labels=labelled.labels, num_items=num_items)
        if labelled.too_many is not None:
            loss = torch.where(labelled.too_many, float("nan"), loss)
        return loss, _base.Deferred(kept_logits)

    def _loss(self, logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        return _cross_entropy(logits, labels, num_items)

    def fusions(self) -> Fusions:
        known = isinstance(self.cls.predictions, BertLMPredictionHead) and isinstance(self.bert, BertModel)
        why = "a head that fastbert does not know" if not known else self.bert._foreign_part()
        why = why or self.bert.why_all_rows(self.bert.config.output_hidden_states)
        return [("last layer, in training: only the rows that are read", why)]


class BertForMaskedLM(_LMHead, stock.BertForMaskedLM):
    @_base.same_signature(stock.BertForMaskedLM)
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
        kind = BertMaskedLMOutput if isinstance(logits, _base.Deferred) else MaskedLMOutput
        return kind(loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions)


class BertLMHeadModel(_LMHead, stock.BertLMHeadModel):
    @_base.same_signature(stock.BertLMHeadModel)
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
        kind = BertLMOutput if isinstance(logits, _base.Deferred) else CausalLMOutputWithCrossAttentions
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
        return _cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels, num_items)


class BertForPreTraining(_LMHead, stock.BertForPreTraining):
    @_base.same_signature(stock.BertForPreTraining)
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
                next_sentence_loss = next_sentence_loss * next_sentence_label.numel() / num_sequences
            elif num_items is not None:
                next_sentence_loss = next_sentence_loss * (labels != -100).sum() / num_items
            loss = cast(Tensor, loss) + next_sentence_loss
        kind = BertForPreTrainingOutput if isinstance(logits, _base.Deferred) else stock.BertForPreTrainingOutput
        return kind(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=next_sentence_logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class BertForTokenClassification(_Head, stock.BertForTokenClassification):
    @_base.same_signature(stock.BertForTokenClassification)
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
        loss = None if labels is None else _cross_entropy(logits, labels, num_items)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class BertForQuestionAnswering(_Head, stock.BertForQuestionAnswering):
    @_base.same_signature(stock.BertForQuestionAnswering)
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

        Logits of padding are the lowest number of their dtype: padding takes no share of the softmax. For a packed
        batch, logits are (1, T) and positions count within each sequence.
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
            lowest = torch.finfo(logits_T2.dtype).min
            logits = rows = states.packing.unpack(logits_T2, lowest)
            if states.packing.shape[0] != states.packing.sequences:
                rows = states.packing.per_sequence().unpack(logits_T2, lowest)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_span_loss(rows[..., 0], start_positions) + _span_loss(rows[..., 1], end_positions)) / 2
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=logits[..., 0].contiguous(),
            end_logits=logits[..., 1].contiguous(),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class BertForNextSentencePrediction(_Built, stock.BertForNextSentencePrediction):
    forward = _base.honour_num_items(stock.BertForNextSentencePrediction)


class BertForSequenceClassification(_Built, stock.BertForSequenceClassification):
    forward = _base.honour_num_items(stock.BertForSequenceClassification)


class BertForMultipleChoice(_Built, stock.BertForMultipleChoice):
    forward = _base.honour_num_items(stock.BertForMultipleChoice)


def _foreign(part: object) -> str:
    return f"a part that fastbert does not know: {type(part).__name__}"


def _wanted(selection: Any, hidden_states: int) -> set[int]:
    """Which hidden states `output_hidden_states` asks for: a flag, an index, or several, negative ones too."""
    if selection is None or isinstance(selection, bool):
        return set(range(hidden_states)) if selection else set()
    indices = [selection] if isinstance(selection, int) else list(selection)
    return {i % hidden_states for i in indices if -hidden_states <= i < hidden_states}


def _cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / num_items


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


def _check_token_labels(labels: Tensor, packing: Packing) -> None:
    if tuple(labels.shape) != tuple(packing.shape):
        raise ValueError(f"labels is {tuple(labels.shape)}, not {tuple(packing.shape)} as the batch")


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


def _span_loss(logits_BL: Tensor, positions: Tensor) -> Tensor:
    """Positions outside of the row are left out, as in transformers."""
    outside = logits_BL.shape[1]
    return F.cross_entropy(logits_BL, positions.reshape(-1).clamp(0, outside), ignore_index=outside)


CLASSES: dict[type, type] = {
    getattr(stock, fast.__name__): fast
    for fast in (
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
        BertModel,
        BertForMaskedLM,
        BertLMHeadModel,
        BertForPreTraining,
        BertForTokenClassification,
        BertForQuestionAnswering,
        BertForNextSentencePrediction,
        BertForSequenceClassification,
        BertForMultipleChoice,
    )
}
