"""transformers' BertModel on the packed encoder.

Dimension key:  B batch   L padded length   T packed tokens   N features   M labelled rows
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as stock

from fastbert import encoder, functional, touched
from fastbert.encoder import Run
from fastbert.families import _base, _inputs
from fastbert.families.bert_layers import BertEmbeddings, BertEncoder, Encoded, Fusions
from fastbert.kernels import _launch
from fastbert.packing import Packing
from fastbert.touched import Parts, container


@dataclass(frozen=True, eq=False)
class PackedHidden:
    """What a head gets that works on packed hidden states. In `BertModel`'s output instead of padded ones.

    Attributes:
        all_TN: returns all of them, or computes them.
        labelled: which tokens have a label, where the head asked for that.  labelled_MN: their hidden states.
        computed_later: what all_TN calls.
    """

    all_TN: Callable[[], Tensor]
    packing: Packing
    labelled: _inputs.Labelled | None = None
    labelled_MN: Tensor | None = None
    computed_later: Sequence[nn.Module] = ()


class Built:
    """Built directly (not patched later), a model gets fastbert's classes in all of its parts."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _base.swap(cast(nn.Module, self), _base.Options())


class BertModel(Built, stock.BertModel):
    parts: ClassVar[Parts] = {
        "embeddings": container(BertEmbeddings),
        "encoder": container(BertEncoder),
        "pooler": container(stock.BertPooler),
    }

    @_base.model_forward(stock.BertModel)
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
        forced = _base.forced(self)
        reason = (
            forced
            or kwargs.pop("_fall_back", None)
            or self._why_not_packed(encoder_hidden_states, past_key_values, use_cache, attention_mask, kwargs)
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
                compute_padding=_base.state(self).options.compute_padding,
            )
            if inputs.labels_on_padding:
                reason = "labels on padding"
            elif inputs.pads_first and self.pooler is not None:
                reason = "the pooler reads each row's first token, and one is padding"
        if inputs is None or reason is not None:
            if forced is None:
                _base.fall_back(self, reason or "", packed=cu_seqlens is not None)
            return stock.BertModel.forward(
                self,
                input_ids,
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
        packing, survey = inputs.packing, _base.surveyed(self)
        own_embeddings = survey.within("embeddings") is None
        drops = survey.drops(apart="" if own_embeddings else "embeddings")
        seed = functional.draw_seed(packing.cu_seqlens.device) if drops else None
        run = Run(packing, seed, bool(self.config.is_decoder), survey.called)
        if not torch.compiler.is_compiling():
            _base.state(self).count_packed()

        layers = len(self.encoder.layer)
        selection = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        wanted = _wanted(selection, layers + 1)
        rows = self._rows_read(inputs, selection)
        if own_embeddings:
            embedded_TN = self.embeddings(run=run, inputs=inputs)
            if "embeddings.word_embeddings" in survey.hooked and not embedded_TN.requires_grad:
                embedded_TN.requires_grad_(torch.is_grad_enabled())  # what the hook does
        else:
            if position_ids is None and cu_seqlens is not None:
                position_ids = packing.position_ids[None]
            embeddings = cast(BertEmbeddings, self.embeddings)
            embedded_BLN = embeddings(
                input_ids=input_ids,
                position_ids=position_ids,
                token_type_ids=token_type_ids,
                inputs_embeds=inputs_embeds,
                past_key_values_length=0,
            )
            embedded_TN = embeddings.as_residual(packing.pack(embedded_BLN))
        if inputs.padding_mask is not None:
            like_BLN = embedded_TN.view(*packing.shape, -1)
            masks = cast(Any, self)._create_attention_masks(inputs.padding_mask, None, like_BLN, None, None)
            run = run._replace(mask=masks[0])
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
        if not _base.state(self).options.last_layer_subset:
            return "last_layer_subset=False"
        if selection is not None and selection is not False:
            return "output_hidden_states"
        if len(layers) == 0:
            return "there is no layer"
        last, survey = f"encoder.layer.{len(layers) - 1}", _base.surveyed(self)
        if any(path == last or path.startswith(f"{last}.") for path in survey.hooked):
            return "the last layer is hooked"
        if survey.called_leaves and not survey.called_leaves.isdisjoint(survey.inside(layers[-1])):
            return "a part of the last layer is called: it may compute something else when logits are read later"
        return None

    def _packed_hidden(self, encoded: Encoded, inputs: _inputs.Inputs, rows: Tensor | None, run: Run) -> "PackedHidden":
        hidden_TN, labelled = cast(Tensor, encoded.last_hidden_state), inputs.labelled
        if rows is None or labelled is None:
            labelled_MN = None if labelled is None else hidden_TN.index_select(0, labelled.rows)
            return PackedHidden(lambda: hidden_TN, inputs.packing, labelled, labelled_MN)
        all_TN = encoder.last_layer(cast(Tensor, encoded.last_layer_input), self.encoder.layer, run)
        labelled_MN = hidden_TN[rows.shape[0] - labelled.rows.shape[0] :]
        return PackedHidden(
            all_TN, inputs.packing, labelled, labelled_MN, _base.surveyed(self).inside(self.encoder.layer[-1])
        )

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
        return _launch.why_not(self._device()) or self.why_touched()

    def why_touched(self) -> str | None:
        """The first part that somebody touched; what is inside of the embeddings, transformers' own can do."""
        survey = _base.survey(self, ((self.config.__dict__, "is_decoder"),))
        foreign = survey.without("embeddings")
        if survey.is_touched("embeddings"):  # itself, not only what is in it: it may give another length
            foreign = survey.within("embeddings")
        if self.config.hidden_size > functional.MAX_FEATURES:
            return f"hidden states of {self.config.hidden_size} features, more than {functional.MAX_FEATURES}"
        return foreign or _base.why_transformers(self.config, stock.eager_attention_forward)

    def fusions(self) -> Fusions:
        decoder = "a decoder with cross-attention" if self.config.add_cross_attention else None
        why = decoder or _launch.why_not(self._device()) or self.why_touched()
        return [("no padding from the embeddings to the last layer", why)]

    def _device(self) -> torch.device:
        """Where the model lies; a replica of DataParallel's has its weights as mere attributes."""
        parameter = next(self.parameters(), None)
        return (self.embeddings.LayerNorm.weight if parameter is None else parameter).device

    def _limits(self) -> _inputs.Limits:
        embeddings = self.embeddings
        return _inputs.Limits(
            vocab_size=_rows(embeddings.word_embeddings),
            type_vocab_size=_rows(embeddings.token_type_embeddings),
            max_position_embeddings=_rows(embeddings.position_embeddings),
            hidden_size=self.config.hidden_size,
            device=self._device(),
            dtype=getattr(getattr(embeddings.LayerNorm, "weight", None), "dtype", None),
        )


def _rows(table: nn.Module) -> int | None:
    """How many ids a table knows; None for another module in its place."""
    return table.weight.shape[0] if type(table) is nn.Embedding else None


def _wanted(selection: Any, hidden_states: int) -> set[int]:
    """Which hidden states `output_hidden_states` asks for: a flag, an index, or several, negative ones too."""
    if selection is None or isinstance(selection, bool):
        return set(range(hidden_states)) if selection else set()
    indices = [selection] if isinstance(selection, int) else list(selection)
    return {i % hidden_states for i in indices if -hidden_states <= i < hidden_states}


_base.register(BertModel)
touched.remember(stock.BertPooler)
touched.remember_functions(stock, "create_bidirectional_mask", "create_causal_mask", "CrossEntropyLoss")
