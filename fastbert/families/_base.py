"""What all families share: swapping classes, falling back, and losses that honour gradient accumulation."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

_STATE = "_fastbert"


@dataclass
class State:
    """What fastbert remembers in a patched module.

    Attributes:
        strict: raise where a call would fall back.
        residual_dtype: of the hidden states between layers under autocast; None for what transformers has, float32.
        last_layer_subset: in masked-LM training, run the last layer only for the rows that somebody reads.
        packed_calls: forward passes through the packed path.  fallbacks: the others, by reason.
    """

    strict: bool = False
    residual_dtype: torch.dtype | None = None
    last_layer_subset: bool = True
    packed_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)


def state(module: nn.Module) -> State:
    """A module's state; the default one, unattached, where `swap` gave it none."""
    found = module.__dict__.get(_STATE)
    return found if isinstance(found, State) else State()


def swap(root: nn.Module, classes: Mapping[type, type], options: State) -> list[nn.Module]:
    """Give every module whose class stands in `classes` the fastbert class of the same name, in place.

    Returns:
        The modules that have a fastbert class now.
    """
    found = []
    for module in root.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
        elif type(module) not in classes.values():
            continue
        found.append(module)
        if isinstance(module, PreTrainedModel):
            record_outputs(module)
        module.__dict__[_STATE] = State(options.strict, options.residual_dtype, options.last_layer_subset)
    return found


def unswap(root: nn.Module, classes: Mapping[type, type]) -> list[nn.Module]:
    """Undo `swap`. Returns the modules that have transformers' class again."""
    originals = {fast: stock for stock, fast in classes.items()}
    found = [module for module in root.modules() if type(module) in originals]
    for module in found:
        module.__class__ = originals[type(module)]
        module.__dict__.pop(_STATE, None)
    return found


def max_tokens(model: PreTrainedModel) -> int:
    """The longest text a model takes, special tokens included; RoBERTa's first positions are for padding."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    first = getattr(table, "padding_idx", None)
    return int(model.config.max_position_embeddings) - (0 if first is None else first + 1)


def record_outputs(model: PreTrainedModel) -> None:
    """Let transformers' own path collect attentions from this class: its registry goes by the class's name."""
    dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(type(model)), model._can_record_outputs)


class FellBack(RuntimeError):
    """A call that cannot take the packed path, in a model patched with strict=True."""


def fall_back(module: nn.Module, reason: str) -> None:
    """Count a call that transformers' own forward will serve.

    Raises:
        FellBack: if the model is strict.
    """
    known = state(module)
    if known.strict:
        raise FellBack(f"{type(module).__name__} cannot run packed ({reason}), and strict=True")
    if not torch.compiler.is_compiling():
        known.fallbacks[reason] += 1


def mean_over_items(mean: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
    """The mean over this batch's labels as a share of the mean over all batches that are accumulated."""
    here = (labels != -100).sum()
    return torch.where(here > 0, mean, 0.0) * here / num_items


def same_signature(stock: type[PreTrainedModel]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For a forward that replaces transformers' own: the Trainer and others look at its arguments by name."""

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
        return forward

    return decorate


def honour_num_items(stock: type[PreTrainedModel]) -> Callable[..., Any]:
    """A head's forward whose loss is divided by `num_items_in_batch` where that is given.

    transformers' Trainer passes it and then leaves the division by the accumulation steps to the model, but BERT's
    heads ignore it: https://github.com/huggingface/transformers/issues/47688.
    """
    stock_forward = stock.forward
    parameters = inspect.signature(stock_forward)

    @functools.wraps(stock_forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        if num_items is None:
            return stock_forward(self, *args, **kwargs)
        labels = parameters.bind(self, *args, **kwargs).arguments.get("labels")
        return_dict = kwargs.pop("return_dict", None)
        output = stock_forward(self, *args, **kwargs, return_dict=True)
        if labels is not None:
            output["loss"] = mean_over_items(output.loss, labels, num_items)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    return forward


class Deferred:
    """Logits that nobody has read yet.

    In training only the rows with a label are projected onto the vocabulary. The others are computed, once, when the
    user reads them.
    """

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None

    def read(self) -> Tensor:
        if self._compute is not None:
            self._value, self._compute = self._compute(), None
        assert self._value is not None
        return self._value


class DeferredFields:
    """Mixed into an output class: attribute, key, index and `to_tuple` read a Deferred; `items` leaves it alone.

    `items` must, because accelerate walks it in every mixed-precision step.
    """

    _built = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # looks at every field, in some versions by attribute
        object.__setattr__(self, "_built", True)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value.read() if isinstance(value, Deferred) and self._built else value

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)  # type: ignore[misc]
        if isinstance(value, tuple):  # a slice
            return tuple(v.read() if isinstance(v, Deferred) else v for v in value)
        return value.read() if isinstance(value, Deferred) else value
