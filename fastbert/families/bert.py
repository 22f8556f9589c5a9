"""transformers' BERT on the packed encoder.

Every class is transformers' class of the same name with another forward. Given a `run`, a module takes packed hidden
states, (T, N); without one it is transformers' own, which is how calls fall back.

Dimension key:  B batch   L padded length   T packed tokens   N features   V vocabulary   M labelled rows
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPoolingAndCrossAttentions,
)
from transformers.models.bert import modeling_bert as stock

from fastbert import encoder, functional, touched
from fastbert.encoder import Run
from fastbert.families import _base, _inputs, _losses
from fastbert.kernels import _launch
from fastbert.packing import Packing
from fastbert.survey import Survey
from fastbert.touched import Each, Parts, container

Fusions = list[tuple[str, str | None]]  # what a module fuses, and why it does not, for `report`
Products = list[tuple[int, int, str | None]]  # of a module: features in and out, and the form of a GELU behind it


def _product(dense: nn.Module, activation: nn.Module | None = None) -> Products:
    """None of a module that is called: what it computes is its own business."""
    if touched.linear(dense) is not None:
        return []
    dense = cast(nn.Linear, dense)
    return [(dense.in_features, dense.out_features, touched.gelu_form(activation))]


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

    def products(self) -> Products:
        """All three at once, as where there are tokens enough."""
        return [(K, 3 * N, form) for K, N, form in _product(self.query)]


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

    def products(self) -> Products:
        return _product(self.dense)


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

    def products(self) -> Products:
        return _product(self.dense, self.intermediate_act_fn)


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

    def products(self) -> Products:
        return _product(self.dense)


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
        if run.called and not run.called.isdisjoint((inner, output)):
            return output(inner(attended, run=run), attended, run=run, stream=stream + 2, rows=rows)
        modules = inner.dense, inner.intermediate_act_fn, output.dense, output.LayerNorm
        if not encoder.fuses_feed_forward(*modules, run.called):
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
class _Encoded(BaseModelOutputWithPastAndCrossAttentions):
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
        return _Encoded(
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

    def products(self) -> Products:
        return _product(self.dense, self.transform_act_fn)


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
        "pooler": touched.container(stock.BertPooler),
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
        forced = _base.state(self).forced
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
        packing, survey = inputs.packing, self._surveyed()
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
        last = f"encoder.layer.{len(layers) - 1}"
        hooked = any(path == last or path.startswith(f"{last}.") for path in self._surveyed().hooked)
        return "the last layer is hooked" if hooked else None

    def _packed_hidden(
        self, encoded: _Encoded, inputs: _inputs.Inputs, rows: Tensor | None, run: Run
    ) -> "PackedHidden":
        hidden_TN, labelled = cast(Tensor, encoded.last_hidden_state), inputs.labelled
        if rows is None or labelled is None:
            labelled_MN = None if labelled is None else hidden_TN.index_select(0, labelled.rows)
            return PackedHidden(lambda: hidden_TN, inputs.packing, labelled, labelled_MN)
        all_TN = encoder.last_layer(cast(Tensor, encoded.last_layer_input), self.encoder.layer, run)
        labelled_MN = hidden_TN[rows.shape[0] - labelled.rows.shape[0] :]
        return PackedHidden(
            all_TN, inputs.packing, labelled, labelled_MN, self._surveyed().inside(self.encoder.layer[-1])
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

    def survey(self) -> Survey:
        """What is known of the parts, kept while it holds."""
        return _base.survey(self, ((self.config.__dict__, "is_decoder"),))

    def _surveyed(self) -> Survey:
        """What was found at the beginning of this call."""
        return cast(Survey, _base.state(self).survey)

    def why_touched(self) -> str | None:
        """The first part that somebody touched; what is inside of the embeddings, transformers' own can do."""
        survey = self.survey()
        foreign = survey.without("embeddings")
        if not isinstance(self.embeddings, BertEmbeddings):
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
    BertModel,
)
touched.remember(stock.BertPooler)
