"""The one rule for modules that somebody may have touched: hooked, wrapped, replaced, changed.

fastbert reads a leaf's parameters instead of calling it, skips containers, and hands modules packed hidden states,
(T, N). That is the same as transformers' own path only while nobody looks at a module or has changed what it does. So
each class says which parts it has and in which role (`parts`), a role says what is known of a module in its place, and
`fastbert.survey` asks all of them:

    plain    the module may be read, or called with packed hidden states
    called   it must be called, and takes packed hidden states as well: what it computes, it computes for each token
             (LoRA, quantised products, weight norm), or only machinery has hooked it (FSDP)
    else     the call falls back to transformers, for the reason given
"""

import functools
import inspect
import operator
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN

CALLED = "called"

Role = Callable[[nn.Module], str | None]  # None for plain, CALLED, or why the call falls back
Parts = Mapping[str, Any]  # by a child's name: its role, or for a list of children Each(role)

# What hooks modules without looking at what goes through them, or changing what they compute.
_MACHINERY = (
    "deepspeed.",
    "fastbert.",
    "torch._dynamo.",
    "torch.distributed.",
    "torch.nn.utils.",  # weight and spectral norm, pruning: they write a leaf's weight before it is called
    "torch.profiler.",
    "torch.utils.flop_counter",
    "torch.utils.module_tracker",
)
# Left on a model by the first call of transformers' own forward that returned hidden states or attentions. They do
# nothing but in such a call.
_CAPTURING = "transformers.utils.output_capturing"
_ASKING = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers', PEFT's
# Whose modules compute a product or a norm for each token, whatever the leading dimensions.
_TOKENWISE = (
    "apex.normalization.",
    "bitsandbytes.",
    "gptqmodel.",
    "hqq.",
    "loralib.",
    "optimum.quanto.",
    "peft.",
    "torchao.",
    "transformer_engine.",
    "transformers.integrations.",
)
ELEMENTWISE = {type(ACT2FN[name]) for name in ("gelu", "gelu_new", "gelu_fast", "quick_gelu", "gelu_10")}
ELEMENTWISE |= {type(ACT2FN[name]) for name in ("gelu_pytorch_tanh", "gelu_accurate", "laplace", "linear", "relu2")}
ELEMENTWISE |= {type(ACT2FN[name]) for name in ("mish", "silu", "leaky_relu", "relu6", "sigmoid", "tanh", "relu")}
ELEMENTWISE |= {nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Hardswish, nn.Identity}
_ELEMENTWISE_FUNCTIONS = {F.gelu, F.relu, F.silu, F.mish, torch.tanh, torch.relu}
_TOKENWISE_TYPES = {nn.Linear, nn.Dropout, nn.RMSNorm, *ELEMENTWISE}
_PARAMETRISED = "torch.nn.utils.parametrize"
_INSIDE = {*_TOKENWISE_TYPES, nn.LayerNorm, nn.Embedding, nn.Sequential}  # of a module of these
_INSIDE |= {nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList}
_GELU_FORMS = {type(ACT2FN["gelu_new"]): "tanh", type(ACT2FN["gelu_pytorch_tanh"]): "tanh"}
_GELU = type(ACT2FN["gelu"])

HOOKS = operator.itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_NAMES = ("a forward hook", "a forward pre-hook", "a backward hook", "a backward pre-hook")
_GLOBAL_HOOKS = {
    name: getattr(torch_module, f"_global_{name}")
    for name in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
}


_COMMON = ""
_FUNCTIONS: dict[str, list[tuple[Any, str, Any]]] = {}  # by the name of the module whose classes call them


def remember_functions(where: Any, *names: str, called_by: str = _COMMON) -> None:
    """Take down functions that the classes of a module of transformers' call; by default of all."""
    _FUNCTIONS.setdefault(called_by, []).extend((where, name, getattr(where, name)) for name in names)


remember_functions(F, "linear", "embedding", "layer_norm", "dropout", "gelu", "scaled_dot_product_attention")
remember_functions(F, "cross_entropy")
remember_functions(nn.Module, "__call__")
remember_functions(nn.CrossEntropyLoss, "forward")


class Each(NamedTuple):
    """The role of every child of a list."""

    role: Role


class Whole(NamedTuple):
    """The role of a part that has a survey of its own."""

    role: Role


_NOT_IN_A_FORWARD = ("__", "get_", "set_", "resize_", "_init_weights")
_WRITTEN: dict[type, dict[str, Any]] = {}  # methods as their authors wrote them


def remember(*kinds: type) -> None:
    """Take down the methods of classes that their forward may call, so that it is seen when somebody replaces one.

    One that stands in another package than its class, or is decorated there, was replaced already.
    """
    for kind in kinds:
        if kind in _WRITTEN:
            continue
        package = kind.__module__.partition(".")[0]
        ours = kind.__module__.startswith("transformers.models.")
        for name, method in vars(kind).items():
            function = method.__func__ if isinstance(method, staticmethod) else method
            if inspect.isfunction(function) and (
                name == "forward" or (ours and not name.startswith(_NOT_IN_A_FORWARD))
            ):
                _WRITTEN.setdefault(kind, {})[name] = method if is_of(function, package) else None


def is_of(function: Any, package: str) -> bool:
    """Whether a function, and whatever is wrapped around it, stands in a package's files, or in PyTorch's."""
    folders = _folders(package)
    while function is not None:
        function = function.func if isinstance(function, functools.partial) else function
        code = getattr(function, "__code__", None)
        if code is None:
            return type(function).__module__.partition(".")[0] in (package, "torch", "builtins")
        if not code.co_filename.startswith(folders):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


@functools.cache
def _folders(package: str) -> tuple[str, ...]:
    return tuple(os.path.dirname(cast(str, sys.modules[name].__file__)) for name in (package, "torch"))


def is_replaced(kind: type, method: str) -> bool:
    """Whether somebody replaced a method of a class that was taken down."""
    return vars(kind).get(method) is not _WRITTEN[kind][method]


def why_class_touched(kind: type) -> str | None:
    """Which method of a class, or of one that it comes from, somebody replaced for all instances."""
    for base, method in methods(kind):
        if is_replaced(base, method):
            return f"{base.__name__}.{method} is replaced"
    return None


def methods(kind: type) -> list[tuple[type, str]]:
    return [(base, name) for base in kind.__mro__ for name in _WRITTEN.get(base, ())]


def can_look_at(values: Tensor) -> bool:
    """Whether there are values, and waiting for them is allowed."""
    if values.is_meta or detect_fake_mode(values) is not None:
        return False
    return not (values.is_cuda and torch.cuda.is_current_stream_capturing())


def why_all_touched(home: str) -> str | None:
    """Whether somebody hooked all modules that there are, or replaced a function that transformers' layers call.

    home: the name of the module that these layers are in.
    """
    for called_by in (_COMMON, home):
        for where, name, function in _FUNCTIONS.get(called_by, ()):
            if getattr(where, name) is not function:
                return f"{where.__name__}.{name} is replaced"
    for name, hooks in _GLOBAL_HOOKS.items():
        if any(not _is_machinery(hook) for hook in hooks.values()):
            return f"{name} on all modules"
    return None


def why_touched(module: nn.Module) -> str | None:
    """Whether anything stands between calling a module and its class's forward: None, CALLED for machinery, or what."""
    own = module.__dict__
    touch = why_class_touched(type(module))
    if touch is not None:
        return touch
    forward = own.get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        return "its forward is replaced"
    for _, name in methods(type(module)):
        if name != "forward" and name in own:
            return f"its {name} is replaced"
    for hooks, name in zip(HOOKS(own), _HOOK_NAMES, strict=True):
        for hook in hooks.values():
            if _home(hook) == _CAPTURING:
                continue
            if not _is_machinery(hook):
                return name
            touch = CALLED
    for parameter in own["_parameters"].values():
        kind = type(parameter)
        if kind is not nn.Parameter and kind is not Tensor and parameter is not None and not _is_distributed(kind):
            touch = CALLED  # a quantised weight
    return touch


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook does anything in a packed call."""
    return any(_home(hook) != _CAPTURING for hooks in HOOKS(module.__dict__) for hook in hooks.values())


def _is_machinery(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__name__", "") in _ASKING or _home(hook).startswith(_MACHINERY)


def _home(hook: Any) -> str:
    """The module where a hook is written."""
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def _is_distributed(kind: type) -> bool:
    """A parameter that FSDP puts together before the module is called that owns it."""
    return kind.__module__.startswith("torch.distributed.")


def _foreign(module: nn.Module) -> str:
    return f"a {type(module).__name__} in its place"


def _plain(module: nn.Module, *kinds: type) -> str | None:
    return why_touched(module) if type(module) in kinds else _foreign(module)


def _tokenwise(module: nn.Module) -> str | None:
    """CALLED for a module that computes for each token; it is called, with all that it consists of."""
    kind = type(module)
    known = kind in _TOKENWISE_TYPES or kind.__module__.startswith(_TOKENWISE) or kind is nn.Sequential
    if kind in (nn.LayerNorm, nn.RMSNorm):
        known = len(cast(nn.LayerNorm, module).normalized_shape) == 1
    if kind.__module__ == _PARAMETRISED:
        known = kind.__mro__[1] in (nn.Linear, nn.LayerNorm)
    if not known:
        return _foreign(module)
    for name, inner in module.named_modules():
        known = type(inner) in _INSIDE or type(inner).__module__.startswith((*_TOKENWISE, _PARAMETRISED))
        if not known and inner is not module and "parametrizations" not in name:
            return f"a {type(inner).__name__} inside of it ({name})"
        touch = why_touched(inner)
        if touch not in (None, CALLED):
            return f"{touch} ({name})" if name else touch
    if kind is nn.Sequential:
        for inner in module.children():
            why = _tokenwise(inner)
            if why != CALLED:
                return why
    return CALLED


def linear(module: nn.Module) -> str | None:
    """The role of a matrix product."""
    return _plain(module, nn.Linear) if type(module) is nn.Linear else _tokenwise(module)


def read(role: Role) -> Role:
    """The role of a part that is never called, for what is in it is read."""

    def why(module: nn.Module) -> str | None:
        found = role(module)
        return f"{type(module).__name__} must be called" if found == CALLED else found

    return why


def norm(module: nn.Module) -> str | None:
    """The role of a LayerNorm."""
    if type(module) is not nn.LayerNorm or module.weight is None or module.bias is None:
        return _tokenwise(module)
    return why_touched(module) if len(module.normalized_shape) == 1 else "normalises more than features"


def dropout(module: nn.Module) -> str | None:
    """The role of a dropout."""
    return _plain(module, nn.Dropout, nn.Identity)


def dropout_rate(module: nn.Module) -> str | None:
    """The role of attention's dropout: transformers reads its `p` and never calls it."""
    return None if isinstance(getattr(module, "p", None), (float, int)) else "has no p"


def mean_loss(module: nn.Module) -> str | None:
    """The role of a cross-entropy that fastbert computes by itself."""
    touch = _plain(module, nn.CrossEntropyLoss)
    if touch is None and {name: getattr(module, name) for name in _LOSS} != _LOSS:
        return "its arguments are changed"
    return "hooked" if touch == CALLED else touch


_LOSS = {"weight": None, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


def activation(module: nn.Module) -> str | None:
    """The role of an activation; a function in a module's place is one of PyTorch's own."""
    if not isinstance(module, nn.Module):
        known = module in _ELEMENTWISE_FUNCTIONS
        return None if known else f"{getattr(module, '__name__', module)} in its place"
    if type(module) not in ELEMENTWISE:
        return _foreign(module)
    act = module.__dict__.get("act")
    if act is not None and not _is_known_act(module, act):
        return "its act is replaced"
    touch = why_touched(module)
    return "hooked" if touch == CALLED else touch


def _is_known_act(module: nn.Module, act: Any) -> bool:
    if isinstance(act, functools.partial):
        return act.func is F.gelu and act.keywords == {"approximate": "tanh"}
    return act is F.gelu or getattr(act, "__func__", None) in vars(type(module)).values()


def table(module: nn.Module) -> str | None:
    """The role of an embedding table. A hook that only asks for gradients of what comes out is one of ours, too."""
    why = _plain(module, nn.Embedding)
    if why == CALLED:
        why = None if _asks_for_gradients(module) else "hooked by machinery, or its weight is no plain tensor"
    if why is None and (module.max_norm is not None or module.sparse or module.scale_grad_by_freq):
        return "max_norm, sparse or scale_grad_by_freq"
    return why


def _asks_for_gradients(module: nn.Module) -> bool:
    """Whether its only hooks are those of gradient checkpointing, which let its output require gradients."""
    hooks = [hook for hooks in HOOKS(module.__dict__) for hook in hooks.values()]
    return bool(hooks) and all(getattr(hook, "__name__", "") in _ASKING for hook in hooks)


def unpadded_table(module: nn.Module) -> str | None:
    """The role of a table all of whose rows get gradients."""
    return table(module) or (None if module.padding_idx is None else "padding_idx")


def container(*kinds: type) -> Role:
    """The role of a module of these classes, or of what machinery makes of them; its `parts` are asked in turn."""

    def why(module: nn.Module) -> str | None:
        made = "_fastbert_made" in vars(type(module))  # of a user's subclass, and looked at then
        for kind in type(module).__mro__:
            if kind in kinds:
                return why_touched(module)
            if not made and not kind.__module__.startswith(_MACHINERY):
                break
        return _foreign(module)

    return why


def gelu_form(activation: object) -> str | None:
    """ "none" (erf) or "tanh" for an activation that is a GELU, None for another one."""
    if not isinstance(activation, nn.Module):
        return "none" if activation is F.gelu else None
    kind = type(activation)
    if kind is _GELU:
        return "none" if activation.__dict__.get("act") is F.gelu else None
    return activation.approximate if kind is nn.GELU else _GELU_FORMS.get(kind)  # type: ignore[return-value]


remember(nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding, nn.GELU, *ELEMENTWISE)
