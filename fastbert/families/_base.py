"""What all families share: swapping classes, surveys, and falling back to transformers."""

import functools
import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from fastbert import touched
from fastbert.families import _fallbacks, _losses, _subclasses
from fastbert.survey import Survey

_STATE = "_fastbert"
CLASSES: dict[type, type] = {}  # transformers' class: fastbert's of the same name


def register(*fast: type) -> None:
    """Let `patch` know fastbert's classes, each made from transformers' class of the same name, its `_stock`."""
    for kind in fast:
        original = vars(kind)["_stock"]
        CLASSES[original] = kind
        touched.remember(original)


@dataclass(frozen=True)
class Options:
    """How a patched model runs.

    Attributes:
        strict: raise where a call would fall back.
        residual_dtype: of the hidden states between layers under autocast; None for what transformers has, float32.
        last_layer_subset: in masked-LM training, run the last layer only for the rows that somebody reads.
        lazy_logits: in masked-LM training, compute logits when they are read.
        compute_padding: hidden states of padding are transformers', not zeros. Where it is None, in calls that mask
            what is no padding.
        prepare: in inference on a CPU, and for int8, keep a copy of the layers' weights: `fastbert.prepared`.
        inference_dtype: "bf16" or "int8" for these layers' products; None for the model's own.
    """

    strict: bool = False
    residual_dtype: torch.dtype | None = None
    last_layer_subset: bool = True
    lazy_logits: bool = True
    compute_padding: bool | None = None
    prepare: bool = True
    inference_dtype: str | None = None


@dataclass
class State:
    """What fastbert remembers in a patched module.

    Attributes:
        packed_calls: forward passes through the packed path.  fallbacks: the others, by reason.
        computed: of the packed ones, those that computed padding though nobody had asked for it, by reason.
        said: of these reasons, the ones that were logged.
        survey: of the module's parts; made anew for a copy.
        of: the state of the module that this one's is a replica of, as DataParallel makes them.
        copy: of the layers' weights, see `fastbert.families._inference`; not of a copied module.
        graphs: those of `fastbert.inference.graphs` that may serve a call, or None.
    """

    options: Options = field(default_factory=Options)
    packed_calls: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    computed: Counter[str] = field(default_factory=Counter)
    said: set[str] = field(default_factory=set)
    survey: Survey | None = None
    of: "State | None" = None
    copy: Any = None
    graphs: Any = None

    def count_packed(self) -> None:
        """One more forward pass through the packed path."""
        counting = self if self.of is None else self.of
        counting.packed_calls += 1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | dict.fromkeys(("survey", "of", "copy", "graphs"))


def state(module: nn.Module) -> State:
    """A module's state; the default one, unattached, where `swap` gave it none."""
    found = module.__dict__.get(_STATE)
    return found if isinstance(found, State) else State()


def swap(root: nn.Module, options: Options) -> list[nn.Module]:
    """Give every module of a class that fastbert knows fastbert's class of the same name, in place.

    Returns:
        The modules that have a fastbert class now.
    """
    found = []
    for module in root.modules():
        kind = type(module)
        fast = fast_class(kind)
        if fast is None:
            continue
        if fast is not kind:
            _become(module, fast)
        found.append(module)
        if isinstance(module, PreTrainedModel):
            record_outputs(module)
        module.__dict__[_STATE] = State(options)
    return found


def unswap(root: nn.Module) -> list[nn.Module]:
    """Undo `swap`. Returns the modules that have transformers' class again."""
    originals = {fast: stock for stock, fast in CLASSES.items()}
    found = []
    for module in root.modules():
        kind = type(module)
        original = originals.get(kind) or _subclasses.original(kind)
        if original is not None:
            _become(module, original)
        if is_fast(kind):  # without a state, one of somebody's own does what transformers' does
            module.__dict__.pop(_STATE, None)
            found.append(module)
    return found


def fast_class(kind: type) -> type | None:
    """fastbert's class for a module's class: for a subclass of transformers' that keeps its forward, one is made."""
    if is_fast(kind):
        return kind
    if kind in CLASSES:
        return CLASSES[kind]
    return _subclasses.fast(kind, CLASSES)


def model_types() -> list[str]:
    """The families that fastbert knows, by transformers' name for each."""
    configs = (stock.config_class for stock in CLASSES if issubclass(stock, PreTrainedModel))
    return sorted({config.model_type for config in configs if config is not None})


def is_fast(kind: type) -> bool:
    """Whether it is a class of fastbert's, or comes from one."""
    return any(base in CLASSES.values() for base in kind.__mro__)


def _become(module: nn.Module, kind: Any) -> None:
    """Change a module's class, and what others keep of its old one: `forward`, put aside in the module itself."""
    old: Any = type(module).forward
    module.__class__ = kind
    for name, value in module.__dict__.items():
        if isinstance(value, types.MethodType) and value.__self__ is module and value.__func__ is old:
            module.__dict__[name] = types.MethodType(kind.forward, module)


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


def fall_back(module: nn.Module, reason: str, *, packed: bool = False) -> None:
    """Count a call that transformers' own forward will serve, and log the first for a reason.

    packed: the batch came packed.

    Raises:
        FellBack: if the model is strict. ValueError: for a packed batch, which transformers would not take.
    """
    known = state(module)
    if known.options.strict:
        raise FellBack(f"{type(module).__name__} cannot run packed ({reason}), and strict=True")
    if not torch.compiler.is_compiling():
        known.fallbacks[reason] += 1
    if packed:
        raise ValueError(f"a packed batch (cu_seq_lens_q) cannot fall back to transformers, but must: {reason}")
    _say_once(module, reason)


def compute_masked_words(module: nn.Module, padding_id: int | None) -> None:
    """Count a packed call in which masked tokens are no padding, so that all rows are computed; log the first."""
    reason = f"{_fallbacks.MASKED_WORDS} ({padding_id})"
    if not torch.compiler.is_compiling():
        state(module).computed[reason] += 1
    _say_once(module, reason)


@torch.compiler.assume_constant_result  # compiled code logs when it is traced, without a break in its graph
def _say_once(module: nn.Module, reason: str) -> bool:
    said = state(module).said
    if reason not in said:
        said.add(reason)
        _fallbacks.say(module, reason)
    return True


def survey(module: nn.Module, facts: Iterable[tuple[dict[str, Any], str]] = ()) -> Survey:
    """What is known of a module's parts, kept while it holds. Compiled code keeps what it was when it was traced."""
    known = state(module)
    if torch.compiler.is_compiling():
        _survey_when_traced(module)
    elif known.survey is None:
        known.survey = Survey(module, facts)
    elif known.survey.root() is not module:  # a replica has got the state along with all else
        module.__dict__[_STATE] = replace(known, survey=Survey(module, facts), of=known.of or known, copy=None)
    elif not known.survey.holds(module):
        known.survey = Survey(module, facts)
    return surveyed(module)


def surveyed(module: nn.Module) -> Survey:
    """What `survey` found at the beginning of this call."""
    return cast(Survey, state(module).survey)


@torch.compiler.assume_constant_result
def _survey_when_traced(module: nn.Module) -> bool:
    state(module).survey = Survey(module)
    return True


def why_transformers(config: PretrainedConfig, home: str) -> str | None:
    """Why a call falls back for what is outside of its model, or None.

    home: the name of transformers' module of the family.
    """
    if torch.compiler.is_compiling():
        return cast("str | None", _why_transformed_when_traced())
    name = config._attn_implementation
    eager_attention = sys.modules[home].eager_attention_forward
    attention = eager_attention if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name)
    if attention is not None and "/" not in name and not touched.is_of(attention, "transformers"):
        return f"an attention of one's own: {name}"
    return _why_transformed() or touched.why_all_touched(home)


def _why_transformed() -> str | None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


_why_transformed_when_traced = torch.compiler.assume_constant_result(_why_transformed)


def model_forward(stock: type[PreTrainedModel], packed: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that replaces transformers' own. `packed` gets all arguments by name.

    It has transformers' signature, for the Trainer and others look at the arguments by name. Where the model is not
    patched any more, or somebody replaced the method of transformers' class, that is called.
    """
    touched.remember(stock)
    plain = _losses.honour_num_items(stock)
    names = [*inspect.signature(stock.forward).parameters][1:]

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        if _STATE not in self.__dict__:
            return stock.forward(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            replaced = _replaced_when_traced(stock)
        else:
            replaced = touched.is_replaced(stock, "forward")
        if replaced:
            return _as_transformers(self, f"{stock.__name__}.forward is replaced", plain, args, kwargs)
        kwargs = _by_name(names, args, kwargs) if args else kwargs
        graphs = self.__dict__[_STATE].graphs
        if graphs is not None and not torch.compiler.is_compiling():
            output = graphs.call(self, functools.partial(packed, self), kwargs)
            if output is not None:
                return output
        return packed(self, **kwargs)

    return _like(stock, packed, forward)


@torch.compiler.assume_constant_result
def _replaced_when_traced(stock: type) -> bool:
    return touched.is_replaced(stock, "forward")


def _by_name(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) > len(names):
        raise TypeError(f"forward() takes {len(names)} arguments, but {len(args)} were given")
    given = dict(zip(names, args, strict=False))
    if twice := given.keys() & kwargs.keys():
        raise TypeError(f"forward() got multiple values for argument {min(twice)!r}")
    return given | kwargs


def head_forward(stock: type[PreTrainedModel], packed: Callable[..., Any]) -> Callable[..., Any]:
    """`model_forward` for a head: transformers' own where one of its parts is touched."""
    plain = _losses.honour_num_items(stock)

    def forward(self: PreTrainedModel, **kwargs: Any) -> Any:
        reason = survey(self).first() or touched.why_all_touched(stock.__module__)
        if reason is None:
            return packed(self, **kwargs)
        return _as_transformers(self, reason, plain, (), kwargs)

    return model_forward(stock, functools.wraps(packed)(forward))


def _as_transformers(
    model: PreTrainedModel, reason: str, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A call that falls back with the models inside of it, without what only fastbert knows."""
    fall_back(model, reason, packed=kwargs.get("cu_seq_lens_q") is not None)
    kwargs = {name: value for name, value in kwargs.items() if name not in _OURS}
    if kwargs.get("shift_labels") is not None:
        kwargs.setdefault("labels", kwargs["shift_labels"])
    with _forced(model, reason):
        return plain(model, *args, **kwargs)


_OURS = ("max_labels", "label_rows", "num_sequences_in_batch", "_keep_packed", "_token_labels", "_reads")


_FORCED: ContextVar[tuple[str, frozenset[nn.Module]] | None] = ContextVar("forced", default=None)


@contextmanager
def _forced(root: nn.Module, reason: str) -> Iterator[None]:
    """Let the models inside fall back in this thread, uncounted."""
    token = _FORCED.set((reason, frozenset(m for m in root.modules() if isinstance(m, PreTrainedModel))))
    try:
        yield
    finally:
        _FORCED.reset(token)


def forced(model: nn.Module) -> str | None:
    """Why a call of this model must fall back, for a model around it does so; None else."""
    if torch.compiler.is_compiling():
        return None
    found = _FORCED.get()
    return found[0] if found is not None and model in found[1] else None


def _like(stock: type[PreTrainedModel], forward: Callable[..., Any], packed: Callable[..., Any]) -> Callable[..., Any]:
    functools.update_wrapper(packed, forward)
    del packed.__wrapped__  # type: ignore[attr-defined]
    # torch.compile counts compilations by code object: each class has its own.
    packed.__code__ = packed.__code__.replace(co_name=stock.__name__)
    packed.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    packed.__annotations__ = dict(inspect.unwrap(stock.forward).__annotations__)
    return packed
