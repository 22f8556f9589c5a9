"""When a model's layers run prepared, as `fastbert.prepared` has them, and until when a copy of their weights is good.

A copy is made in the first call that can use it. Once weights have changed, another is made when two calls in a row
have found them the same: whoever evaluates between training steps does not pay for copies that serve once.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastbert import prepared, prepared_int8
from fastbert.encoder import Run
from fastbert.families import _base
from fastbert.families._inputs import Inputs
from fastbert.kernels import _launch
from fastbert.prepared import Prepared, Watch
from fastbert.prepared_int8 import PreparedInt8
from fastbert.survey import Survey


@dataclass(eq=False)
class Copy:
    """What a model has of its layers.

    Attributes:
        survey: for which it was made.  watch: over the weights.
        layers: None while there is no copy.  why_not: there cannot be one.
    """

    survey: Survey
    watch: Watch | None
    layers: Prepared | PreparedInt8 | None
    why_not: str | None


def is_told_of(model: Any) -> bool:
    """Whether how its layers run is a choice: on a CPU, and where another precision was asked for."""
    return model.device.type == "cpu" or _base.state(model).options.inference_dtype is not None


def describe(model: Any) -> str:
    """How a base model's layers run in inference: for people."""
    survey = Survey(model)
    if survey.touches or survey.called or survey.hooked:
        return f"layer by layer: {survey.first() or 'a part is called or hooked'}"
    why = _why_not(model)
    if why is not None:
        return f"layer by layer: {why}"
    return f"{'products' if _by_operators(model) else 'all layers in one call'}, {_precision(model)}"


def _why_not(model: Any) -> str | None:
    precision = _precision(model)
    if precision is None:
        return "neither float32 nor bfloat16"
    if not _base.state(model).options.prepare:
        return "prepare=False"
    why = prepared.why_not(_parts(model), precision, model._last_norm())
    return prepared_int8.why_not(_known_parts(model)) if why is None and _by_operators(model) else why


def _by_operators(model: Any) -> bool:
    return prepared.by_operators(model.device.type)


def hidden(
    model: Any, at_once: Prepared | PreparedInt8, inputs: Inputs, run: Run, *, first_only: bool = False
) -> Tensor:
    """The last hidden states, (T, N), or with first_only (B, N): see `Prepared.run`."""
    if isinstance(at_once, Prepared) and not model._projects():
        embeddings: prepared.Embeddings = model.embeddings._tables(inputs)
        if embeddings.can_be_read(at_once.features):
            return at_once.run(embeddings, run.packing, first_only=first_only)
    embedded_TN = model._project(model.embeddings(run=run, inputs=inputs))
    return at_once.run(model._stack()._begin(embedded_TN), run.packing, first_only=first_only)


def layers_for(model: nn.Module, inputs: Inputs, run: Run) -> Prepared | PreparedInt8 | None:
    """The model's layers, if this call can use them."""
    known = _base.state(model)
    device = inputs.packing.cu_seqlens.device.type
    possible = device == "cpu" or known.options.inference_dtype == "int8"
    if torch.is_grad_enabled() or not possible or not known.options.prepare:
        if known.copy is not None and cast(Any, model).training:
            known.copy = None
        return None
    plain = run.seed is None and not run.causal and inputs.padding_mask is None and not run.called
    if not plain or torch.compiler.is_compiling() or torch.is_autocast_enabled(device) or _is_watched(inputs):
        return None
    survey = _base.surveyed(model)
    if survey.hooked or survey.touches:
        return None
    copy: Copy | None = known.copy
    if _launch.is_compiling():  # what operators write is not written
        return _made(model, survey).layers
    if copy is not None and copy.survey is survey:
        if copy.watch is None or copy.watch.holds():
            if copy.layers is None and copy.why_not is None:
                copy = known.copy = _made(model, survey)
            return copy.layers
        known.copy = Copy(survey, _watch(model), None, None)  # at once, for other threads may ask
        return None
    known.copy = copy = _made(model, survey)
    return copy.layers


def _made(model: Any, survey: Survey) -> Copy:
    watch, why = _watch(model), _why_not(model)  # first the watch: it sees what is written from here on
    if why is not None:
        return Copy(survey, watch, None, why)
    layers = _known_parts(model)
    if _by_operators(model):
        return Copy(survey, watch, PreparedInt8(layers), None)
    return Copy(survey, watch, Prepared(layers, cast(str, _precision(model)), model._last_norm()), None)


def _watch(model: Any) -> Watch | None:
    parts = _parts(model)
    known = [part for part in parts if part is not None]
    return Watch(list(dict.fromkeys(known)), model._last_norm()) if len(known) == len(parts) else None


def _parts(model: Any) -> list[prepared.Parts | None]:
    layers = model._stack()._layers()
    return [layer._prepared_parts() if hasattr(layer, "_prepared_parts") else None for layer in layers]


def _known_parts(model: Any) -> list[prepared.Parts]:
    """Of a model all of whose layers have them."""
    return cast("list[prepared.Parts]", _parts(model))


def _precision(model: nn.Module) -> str | None:
    return prepared.precision_of(cast(Any, model).dtype, _base.state(model).options.inference_dtype)


def _is_watched(inputs: Inputs) -> bool:
    """Whether something wants to see each operator, or inputs are no plain tensors."""
    modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
    given = inputs.input_ids, inputs.position_ids, inputs.token_type_ids, inputs.task_type_ids, inputs.inputs_embeds
    return modes > 0 or any(type(t) is not Tensor for t in given if t is not None)
