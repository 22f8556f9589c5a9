"""patch, unpatch and report: fastbert in a model that is loaded already."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from fastbert import _library
from fastbert.families import CLASSES, _base, _inference, _subclasses
from fastbert.families._layers import Product
from fastbert.families._model import BaseModel
from fastbert.kernels import _product
from fastbert.prepared import why_no_precision

Model = TypeVar("Model", bound=nn.Module)

_RESIDUAL_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, None: None}


def patch(
    model: Model,
    *,
    strict: bool = False,
    residual_dtype: str | None = None,
    last_layer_subset: bool = True,
    lazy_logits: bool = True,
    padded_rows: str | None = None,
    prepare: bool = True,
    inference_dtype: str | None = None,
) -> Model:
    """Let a loaded model run on the packed encoder, in place.

    Parameters, buffers, hooks and the state dict stay as they are; `unpatch` undoes it.

    A call that cannot run packed runs as transformers' own, and `report` counts it. The first for a reason is also a
    warning on the logger "fastbert", with what can be done; `logging.getLogger("fastbert").setLevel(logging.ERROR)`
    turns these off.

    Args:
        model: a transformers model, or anything that contains one: a SentenceTransformer, a PEFT model.
        strict: raise `FellBack` in a call that would fall back to transformers. One that computes padding does not:
            it runs packed, on more rows.
        residual_dtype: "bf16" or "fp16" to keep hidden states in that dtype under autocast; float32 where it is None,
            as transformers has them.
        last_layer_subset: in masked-LM training, run the last layer's products only for the tokens that somebody
            reads: those with a label, and the first of each sequence where there is a pooler.
        lazy_logits: in masked-LM training, compute the logits of all tokens only when somebody reads them.
        padded_rows: "zeros" for hidden states and logits of all masked tokens, which then cost nothing; "computed" for
            transformers' values. A batch with padding then costs what a full one of its size does, and its attention is
            transformers' own. Where it is None, each call goes by its input_ids: if any is not the configuration's
            pad_token_id where attention_mask is 0, somebody wrote it and may read what becomes of it, as ColBERT does
            of its [MASK] tokens, and the call is computed; `report` counts it, the first is a warning. Else padding is
            zeros. So are all masked tokens without a pad_token_id, or with inputs_embeds. For sentence-transformers'
            query expansion with attend=False, as it is set at this moment, None is "computed".
        prepare: in inference on a CPU (`torch.no_grad()`, evaluation mode) run all layers in one call of C++, over a
            copy of their weights. It takes as much memory as the layers, is made anew when weights change, and given
            back in training. What is written through a parameter's `.data` is seen by a few words of each weight:
            after a write to single elements patch the model again. On a GPU it is for int8 alone, and a write through
            `.data` is not seen at all.
        inference_dtype: "bf16" or "int8" for the matrix products of the layers in inference, on a GPU only "int8"; the
            model's own where it is None. The parameters stay as they are, and so does training. A model for a GPU is to
            be there first, where the CPU lacks what "int8" needs.

    Returns:
        The same model.

    Raises:
        TypeError: if that is no model, but a name, a class or a pipeline.
        ValueError: if the model contains nothing that fastbert knows, or an option is none of these.
    """
    if padded_rows not in ("zeros", "computed", None):
        raise ValueError(f"padded_rows must be 'zeros' or 'computed', but is {padded_rows!r}")
    if residual_dtype not in _RESIDUAL_DTYPES:
        raise ValueError(f"residual_dtype must be 'bf16', 'fp16' or None, but is {residual_dtype!r}")
    if inference_dtype not in (None, "bf16", "int8"):
        raise ValueError(f"inference_dtype must be 'bf16', 'int8' or None, but is {inference_dtype!r}")
    _check_known(model, "patch")
    if inference_dtype is not None and (why := why_no_precision(inference_dtype, _device_of(model))) is not None:
        raise ValueError(f"inference_dtype={inference_dtype!r}: {why}")
    if inference_dtype is not None and not prepare:
        raise ValueError("inference_dtype needs prepare=True")
    if padded_rows is None and any(map(_scores_padding, model.modules())):
        padded_rows = "computed"
    options = _base.Options(
        strict=strict,
        residual_dtype=_RESIDUAL_DTYPES[residual_dtype],
        last_layer_subset=last_layer_subset,
        lazy_logits=lazy_logits,
        compute_padding=None if padded_rows is None else padded_rows == "computed",
        prepare=prepare,
        inference_dtype=inference_dtype,
    )
    _base.swap(model, options)
    return model


def _device_of(model: nn.Module) -> str:
    return next((p.device.type for p in model.parameters()), "cpu")


def _scores_padding(module: nn.Module) -> bool:
    """Whether it is sentence-transformers' Transformer that fills queries up with tokens whose mask is 0."""
    expansion = getattr(module, "query_expansion", None)
    return isinstance(expansion, dict) and not expansion.get("attend", True)


def _check_module(model: nn.Module, verb: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{verb} takes a model that is loaded, but was given {_what_instead(model, verb)}")


def _check_known(model: nn.Module, verb: str) -> None:
    """Raises: TypeError, if that is no module; ValueError, if there is no model in it that fastbert knows."""
    _check_module(model, verb)
    if not any(isinstance(m, PreTrainedModel) and _base.fast_class(type(m)) for m in model.modules()):
        raise ValueError(_why_unknown(model))


def _what_instead(thing: Any, verb: str) -> str:
    if isinstance(thing, str | os.PathLike):
        name = repr(os.fspath(thing))
        return f"the name {name}: fastbert.{verb}(transformers.AutoModel.from_pretrained({name}))"
    if isinstance(thing, type):
        return f"the class {thing.__name__}: make a model of it first, with from_pretrained"
    inside = ": give it its .model" if isinstance(getattr(thing, "model", None), nn.Module) else ""
    return f"something of type {type(thing).__name__}{inside}"


def _why_unknown(model: nn.Module) -> str:
    inside = sorted({type(m) for m in model.modules() if isinstance(m, PreTrainedModel)}, key=lambda c: c.__name__)
    close = [c for c in inside if any(base in CLASSES for base in c.__mro__)]
    what = type(model).__name__
    if (found := next(iter(close or inside), type(model))) is not type(model):
        what += f" with {found.__name__}"
    if close:
        return f"{what} cannot be patched: {_subclasses.why_not(close[0], CLASSES)}"
    return f"{what} is no model that fastbert knows. Families that it knows: {', '.join(_base.model_types())}"


def unpatch(model: Model) -> Model:
    """Give a patched model transformers' own classes again, in place.

    Raises:
        TypeError: if that is no model.  ValueError: if nothing in it is patched.
    """
    _check_module(model, "unpatch")
    if not _base.unswap(model):
        raise ValueError(f"{type(model).__name__} is not patched")
    return model


@dataclass(frozen=True)
class Report:
    """What is fused in a model, what fell back, and why. Its `str` is for people.

    Attributes:
        fused: for each part of the model, how many layers have it fused.
        plain: what runs unfused, and why.
        products: for each matrix product of the layers, which way it takes, and why.
        backends: for each operator, what serves it on the model's device.  patched: or else as it would be.
        packed_calls: forward passes through the packed encoder.  fallbacks: the others, by reason.
        computed: of the packed ones, those that computed rows of padding though `padded_rows` was None, by reason.
        inference: for each model in it on a CPU, how its layers run in inference there: `fastbert.prepared`.
    """

    model: str
    device: str
    fused: Counter[str]
    plain: Counter[str]
    products: Counter[str]
    backends: dict[str, str]
    packed_calls: int
    fallbacks: Counter[str]
    inference: Counter[str] = field(default_factory=Counter)
    patched: bool = True
    computed: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        would_be = "" if self.patched else "would be "
        lines = [f"{self.model} on {self.device}{'' if self.patched else ' is not patched; with fastbert.patch:'}"]
        lines += [f"{would_be}fused:", *(f"  {count:3} x {part}" for part, count in self.fused.items())]
        if self.plain:
            lines += ["not fused:", *(f"  {count:3} x {why}" for why, count in self.plain.items())]
        lines += ["products:", *(f"  {count:3} x {way}" for way, count in self.products.items())]
        lines += [f"inference: {how}" for how in self.inference]
        if self.patched:
            lines.append(f"calls: {self.packed_calls:,} packed, {self.fallbacks.total():,} fell back to transformers")
            lines += [f"  {count:3} x {reason}" for reason, count in self.fallbacks.most_common()]
            lines += [f"  {count:3} x packed, on all rows: {why}" for why, count in self.computed.most_common()]
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """What is fused in a patched model, what fell back, and why; of one that is not patched, what would be fused.

    Raises:
        TypeError, ValueError: as `patch` does, if that is no model, or none that fastbert knows.
    """
    if isinstance(model, nn.Module) and any(_base.is_fast(type(m)) for m in model.modules()):
        return _report(model)
    _check_known(model, "report")
    _base.swap(model, _base.Options())
    try:
        return replace(_report(model), patched=False)
    finally:
        _base.unswap(model)


def _report(model: nn.Module) -> Report:
    fast = [m for m in model.modules() if _base.is_fast(type(m))]
    fused: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    products: Counter[str] = Counter()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _base.fast_class(type(module)) is None:
            plain[f"{type(module).__name__}, around it: {_subclasses.why_not(type(module), CLASSES)}"] += 1
    weight = next(fast[0].parameters())
    packed_calls, fallbacks, computed, inference = 0, Counter[str](), Counter[str](), Counter[str]()
    for module in fast:
        if isinstance(module, PreTrainedModel):
            packed_calls += _base.state(module).packed_calls
            fallbacks += _base.state(module).fallbacks
            computed += _base.state(module).computed
        if isinstance(module, BaseModel) and _inference.is_told_of(module):
            inference[_inference.describe(module)] += 1
        fusions: Callable[[], list[tuple[str, str | None]]] = getattr(module, "fusions", list)
        for part, why in fusions():
            if why is None:
                fused[part] += 1
            else:
                plain[f"{part}: {why}"] += 1
        of_module: Callable[[], list[Product]] = getattr(module, "products", list)
        for K, N, form, called in of_module():
            way = called
            if way is None and K is not None and N is not None:
                way = _product.why(weight.device, weight.dtype, form, N, K)
            products[f"{K or '?'} -> {N or '?'}{'' if form is None else ' + GELU'}: {way}"] += 1
    device = weight.device.type
    backends = _library.backends(device)
    name = type(model).__name__
    return Report(name, device, fused, plain, products, backends, packed_calls, fallbacks, inference, computed=computed)
