"""The base model of every family on the packed encoder.

Dimension key:  B batch   L padded length   T packed tokens   N features   M labelled rows
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import ModelOutput

from fastbert import encoder, functional, touched
from fastbert.encoder import Run
from fastbert.families import _base, _inference, _inputs
from fastbert.families._family import ModelRole, stock_of
from fastbert.families._layers import Embeddings, Encoded, Encoder, Fusions, Pooler
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


class BaseModel(ModelRole):
    """Embeddings, an encoder, perhaps a pooler. Another family's says which they are, where it calls them otherwise.

    Attributes:
        _output: what transformers returns.
        _embeddings_take: arguments of the embeddings' forward.
        _stack_path: the encoder's name.
    """

    parts: ClassVar[Parts] = {
        "embeddings": container(Embeddings),
        "encoder": container(Encoder),
        "pooler": container(Pooler),
    }
    _output: ClassVar[type[ModelOutput]] = BaseModelOutputWithPoolingAndCrossAttentions
    _stack_path: ClassVar[str] = "encoder"
    _embeddings_take: ClassVar[tuple[str, ...]] = ("input_ids", "position_ids", "token_type_ids", "inputs_embeds")

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        return {"forward": _base.model_forward(stock, cls.packed)}

    def _stack(self) -> Any:
        """The module of role Encoder."""
        return getattr(self, self._stack_path)

    def _project(self, embedded_TN: Tensor) -> Tensor:
        """To the hidden size."""
        return embedded_TN

    def _projects(self) -> bool:
        """Whether a product stands between the embeddings and the first layer."""
        return False

    def _last_norm(self) -> Any:
        """The LayerNorm behind the last layer, or None."""
        return None

    def _finish(self, hidden_TN: Tensor, run: Run) -> Tensor:
        """What becomes of the last layer's output."""
        norm = self._last_norm()
        return hidden_TN if norm is None else encoder.normalise(hidden_TN, norm, run.called)

    def _finishers(self) -> tuple[nn.Module, ...]:
        """The modules that `_finish` reads."""
        norm = self._last_norm()
        return () if norm is None else tuple(norm.modules())

    def _pool(self, first_BN: Tensor) -> Tensor | None:
        """Of each sequence's first token; None without a pooler."""
        return None if self._reads_first() is None else self.pooler(first_BN[:, None])

    def _reads_first(self) -> Any:
        """What reads each sequence's first token, or None."""
        return getattr(self, "pooler", None)

    def packed(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' arguments and outputs; also `cu_seq_lens_q`, `max_length_q` for a packed batch, (1, T).

        Padded rows of every hidden state are zeros, unless a masked token is no padding: then all rows are
        transformers', see `fastbert.patch`. A packed batch has one pooled vector for each sequence. A decoder
        returns a cache in evaluation only, and not of a packed batch.

        Raises:
            ValueError: naming the argument and the bound, see `fastbert.families._inputs`.
        """
        this = cast(Any, self)
        keep_packed, token_labels = kwargs.pop("_keep_packed", False), kwargs.pop("_token_labels", None)
        reads = kwargs.pop("_reads", None)
        given = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "inputs_embeds": inputs_embeds,
            "task_type_ids": kwargs.get("task_type_ids"),
        }
        forced = _base.forced(this)
        reason = forced or kwargs.pop("_fall_back", None) or self._why_not_packed(attention_mask, kwargs)
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
                task_type_ids=given["task_type_ids"],
                compute_padding=_base.state(this).options.compute_padding,
            )
            if inputs.labels_on_padding:
                reason = "labels on padding"
            elif inputs.pads_first and (reads == "first" or self._reads_first() is not None):
                who = "the pooler" if reads is None else "the head"
                reason = f"{who} reads each row's first token, and one is padding"
            elif reads not in (None, "first") and (inputs.packing.indices is not None or cu_seqlens is not None):
                reason = f"{reads} reads padding"
        if inputs is None or reason is not None:
            if forced is None:
                _base.fall_back(this, reason or "", packed=cu_seqlens is not None)
            mine = {n: t for n, t in given.items() if t is not None and n not in kwargs}
            return stock_of(self).forward(self, attention_mask=attention_mask, **mine, **kwargs)
        if inputs.masked_words:
            _base.compute_masked_words(this, self.config.pad_token_id)
        packing, survey = inputs.packing, _base.surveyed(this)
        own_embeddings = survey.within("embeddings") is None
        drops = survey.drops(apart="" if own_embeddings else "embeddings")
        seed = functional.draw_seed(packing.cu_seqlens.device) if drops else None
        run = Run(packing, seed, self._is_decoder(), survey.called)
        if not torch.compiler.is_compiling():
            _base.state(this).count_packed()

        stack = self._stack()
        layers = stack._layers()
        selection = kwargs.get("output_hidden_states", self.config.output_hidden_states)
        wanted = _wanted(selection, len(layers) + 1)
        rows = self._rows_read(inputs, selection, reads) if keep_packed or reads is not None else None
        at_once = None if wanted else _inference.layers_for(this, inputs, run)
        if at_once is None:
            if own_embeddings:
                embedded_TN = self.embeddings(run=run, inputs=inputs)
                if "embeddings.word_embeddings" in survey.hooked and not embedded_TN.requires_grad:
                    embedded_TN.requires_grad_(torch.is_grad_enabled())  # what the hook does
            else:
                if position_ids is None and cu_seqlens is not None:
                    given["position_ids"] = inputs.position_ids[None]
                embedded_BLN = self.embeddings(**{name: given[name] for name in self._embeddings_take})
                embedded_TN = self.embeddings.as_residual(packing.pack(embedded_BLN))
            embedded_TN = self._project(embedded_TN)
            if inputs.padding_mask is not None:
                like_BLN = embedded_TN.view(*packing.shape, -1)
                run = run._replace(mask=self._attention_mask(inputs.padding_mask, like_BLN))
            encoded = stack(embedded_TN, run=run, wanted=wanted, rows=rows, finish=self._finish)
        else:
            firsts = rows is not None and reads == "first"
            rows = rows if firsts else None
            last_TN = _inference.hidden(this, at_once, inputs, run, first_only=firsts)
            encoded = Encoded(last_hidden_state=last_TN)
        hidden_TN = encoded.last_hidden_state
        pooled = None
        if self._reads_first() is not None:
            first_BN = packing.first(hidden_TN) if rows is None else packing.blank_empty(hidden_TN[: packing.sequences])
            pooled = self._pool(first_BN)
        last: Any
        if keep_packed:
            last = self._packed_hidden(encoded, inputs, rows, run)
        elif reads == "first":
            firsts_BN = packing.first(hidden_TN) if rows is None else packing.blank_empty(hidden_TN)
            last = firsts_BN[:, None]
        else:
            last = encoded.hidden_states[len(layers)] if len(layers) in wanted else packing.unpack(hidden_TN)
        output = self._output(
            last_hidden_state=last,
            **({} if pooled is None else {"pooler_output": pooled}),
            hidden_states=encoded.hidden_states if selection is not None and selection is not False else None,
        )
        return output.to_tuple() if kwargs.get("return_dict", self.config.return_dict) is False else output

    def encode_packed(
        self, input_ids: Tensor, token_type_ids: Tensor | None, packing: Packing, *, first_only: bool = False
    ) -> Tensor | None:
        """The last hidden states of prepared layers, without what a call takes besides, or None if one must be made.

        Args:
            input_ids, token_type_ids: (1, T), known to be good.

        Returns:
            (T, N), or with first_only (B, N).
        """
        this = cast(Any, self)
        if self.training or touched.why_touched(this) is not None or self._why_not_packed(None, {}) is not None:
            return None
        survey = _base.surveyed(this)
        if survey.touches or survey.hooked or survey.called or survey.drops() or self._is_decoder():
            return None
        run = Run(packing, None)
        inputs = _inputs.trusted(self._limits(), input_ids, token_type_ids, packing)
        at_once = _inference.layers_for(this, inputs, run)
        if at_once is None:
            return None
        _base.state(this).count_packed()
        return _inference.hidden(this, at_once, inputs, run, first_only=first_only)

    def _is_decoder(self) -> bool:
        return bool(getattr(self.config, "is_decoder", False))

    def _attention_mask(self, padding_mask: Tensor, like_BLN: Tensor) -> Any:
        """What transformers' attention takes for a (B, L) mask."""
        make = getattr(self, "_create_attention_masks", None)
        if make is not None:
            return make(padding_mask, None, like_BLN, None, None)[0]
        module = sys.modules[stock_of(self).__module__]
        return module.create_bidirectional_mask(config=self.config, inputs_embeds=like_BLN, attention_mask=padding_mask)

    def _rows_read(self, inputs: _inputs.Inputs, selection: Any, reads: str | None) -> Tensor | None:
        """The tokens whose last hidden state somebody reads: the first of each sequence, those with a label.

        (R,) int64, which of the packed tokens they are; None for all.
        """
        if reads == "first":
            all_rows = inputs.packing.tokens <= inputs.packing.sequences or self.why_all_rows(selection)
            return None if all_rows else inputs.packing.first_rows()
        if inputs.labelled is None or self.why_all_rows(selection):
            return None
        rows = inputs.labelled.rows
        if self._reads_first() is not None:
            rows = torch.cat([inputs.packing.first_rows(), rows])
        return rows if rows.shape[0] < inputs.packing.tokens else None

    def why_all_rows(self, selection: Any) -> str | None:
        """Why the last layer runs for all tokens where a head reads only some, or None.

        selection: of hidden states, as in `output_hidden_states`.
        """
        stack = self._stack()
        layers = stack._layers()
        if not _base.state(cast(Any, self)).options.last_layer_subset:
            return "last_layer_subset=False"
        if selection is not None and selection is not False:
            return "output_hidden_states"
        if len(layers) == 0:
            return "there is no layer"
        if not stack._replays and _base.surveyed(cast(Any, self)).drops():
            return "a layer that normalises first draws its dropout masks as it runs"
        last, survey = f"{self._stack_path}.{stack._last_path()}", _base.surveyed(cast(Any, self))
        if any(f"{last}.".startswith(f"{path}.") or path.startswith(f"{last}.") for path in survey.hooked):
            return "the last layer is hooked, or what holds it"
        if survey.called_leaves and not survey.called_leaves.isdisjoint(survey.inside(layers[-1])):
            return "a part of the last layer is called: it may compute something else when logits are read later"
        return None

    def _packed_hidden(self, encoded: Encoded, inputs: _inputs.Inputs, rows: Tensor | None, run: Run) -> PackedHidden:
        hidden_TN, labelled = cast(Tensor, encoded.last_hidden_state), inputs.labelled
        if rows is None or labelled is None:
            labelled_MN = None if labelled is None else hidden_TN.index_select(0, labelled.rows)
            return PackedHidden(lambda: hidden_TN, inputs.packing, labelled, labelled_MN)
        stack = self._stack()
        all_TN = encoder.last_layer(cast(Tensor, encoded.last_layer_input), stack._layers(), run, self._finish)
        labelled_MN = hidden_TN[rows.shape[0] - labelled.rows.shape[0] :]
        later = (*_base.surveyed(cast(Any, self)).inside(stack._layers()[-1]), *self._finishers())
        return PackedHidden(all_TN, inputs.packing, labelled, labelled_MN, later)

    def _why_not_packed(self, attention_mask: Any, kwargs: dict[str, Any]) -> str | None:
        """Why this call must go to transformers, or None."""
        config = self.config
        if getattr(config, "add_cross_attention", False):
            return "a decoder with cross-attention"
        if kwargs.get("encoder_hidden_states") is not None or kwargs.get("past_key_values") is not None:
            return "cross-attention or a cache"
        if self._is_decoder() and not self.training:
            use_cache = kwargs.get("use_cache")
            if use_cache is None:
                use_cache = config.use_cache and kwargs.get("cu_seq_lens_q") is None
            if use_cache:
                return "a decoder that returns a cache"
        if kwargs.get("output_attentions", config.output_attentions):
            return "output_attentions"
        for is_causal in (kwargs.get("is_causal"), getattr(config, "is_causal", None)):
            if is_causal is not None and bool(is_causal) != self._is_decoder():
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
        survey = _base.survey(cast(Any, self), ((self.config.__dict__, "is_decoder"),))
        foreign = survey.without("embeddings")
        if survey.is_touched("embeddings"):  # itself, not only what is in it: it may give another length
            foreign = survey.within("embeddings")
        if self.config.hidden_size > functional.MAX_FEATURES:
            return f"hidden states of {self.config.hidden_size} features, more than {functional.MAX_FEATURES}"
        return foreign or _base.why_transformers(self.config, stock_of(self).__module__)

    def fusions(self) -> Fusions:
        cross = "a decoder with cross-attention" if getattr(self.config, "add_cross_attention", False) else None
        why = cross or _launch.why_not(self._device()) or self.why_touched()
        return [("no padding from the embeddings to the last layer", why)]

    def _device(self) -> torch.device:
        """Where the model lies; a replica of DataParallel's has its weights as mere attributes."""
        parameter = next(self.parameters(), None)
        return cast(torch.device, (self.embeddings.word_embeddings.weight if parameter is None else parameter).device)

    def _limits(self) -> _inputs.Limits:
        size = getattr(self.config, "embedding_size", self.config.hidden_size)
        limits = cast(_inputs.Limits, self.embeddings._limits(size, self._device()))
        return replace(limits, pad_token_id=getattr(self.config, "pad_token_id", None))


def _wanted(selection: Any, hidden_states: int) -> set[int]:
    """Which hidden states `output_hidden_states` asks for: a flag, an index, or several, negative ones too."""
    if selection is None or isinstance(selection, bool):
        return set(range(hidden_states)) if selection else set()
    indices = [selection] if isinstance(selection, int) else list(selection)
    return {i % hidden_states for i in indices if -hidden_states <= i < hidden_states}
