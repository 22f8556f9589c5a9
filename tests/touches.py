"""The ways in which somebody touches a module of a model, and how to tell that it made no difference to fastbert.

A kind of touch knows which variants it has for a module, and does one of them to the module at a path. It returns what
undoes it. Hooks note the shapes of all that they see. Nothing here knows what modules a model has.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize
from transformers.utils import ModelOutput

try:
    from accelerate import hooks as accelerate_hooks
except ModuleNotFoundError:
    accelerate_hooks = None

SCALE = 1.25
Seen = list[Any]  # for each call of a hook, the shapes it saw
Undo = Callable[[], None]


class Kind(NamedTuple):
    """One kind of touch.

    Attributes:
        variants: what can be done to the module at this path of the model; nothing where the kind does not fit.
        touch: does it, to the model, at the path, in the variant; hooks append to the last argument.
        backward: it is the backward pass that matters, in evaluation too.
    """

    variants: Callable[[nn.Module, str], list[str]]
    touch: Callable[[nn.Module, str, str, Seen], Undo]
    backward: bool = False


def scaled(value: Any) -> Any:
    """Every floating tensor in it, whatever the structure, times SCALE."""
    if isinstance(value, Tensor):
        return value * SCALE if value.is_floating_point() else value
    if isinstance(value, ModelOutput):
        return type(value)(**{key: scaled(value[key]) for key in value})
    if isinstance(value, tuple | list):
        return type(value)(scaled(part) for part in value)
    return value


def shapes(value: Any) -> Any:
    """The same structure with shapes instead of tensors; what is neither is left out."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: shapes(value[key]) for key in value}
    return [shapes(part) for part in value] if isinstance(value, tuple | list) else None


def _other(value: Any) -> Any:
    """Another input: floating tensors scaled, ids in the other order."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool:
        return value
    return scaled(value) if value.is_floating_point() else value.flip(-1)


def _once(model: nn.Module, path: str) -> list[str]:
    return [""]


def _forward_hook(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        seen.append(shapes((args, output)))
        return scaled(output)

    return model.get_submodule(path).register_forward_hook(hook).remove


def _pre_hook(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        seen.append(shapes((args, kwargs)))
        named = {key: _other(v) if key == "input_ids" or _is_floating(v) else v for key, v in kwargs.items()}
        return tuple(_other(v) for v in args), named

    return model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _backward_hook(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.append(shapes((grad_input, grad_output)))
        return scaled(grad_input)

    return model.get_submodule(path).register_full_backward_hook(hook).remove


def _backward_pre_hook(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    def hook(module: nn.Module, grad_output: Any) -> Any:
        seen.append(shapes(grad_output))
        return scaled(grad_output)

    return model.get_submodule(path).register_full_backward_pre_hook(hook).remove


def methods(kind: type[nn.Module]) -> list[str]:
    """`forward` and, of transformers' classes, what else `forward` might call."""
    own = [name for name, f in vars(kind).items() if inspect.isroutine(f) and name[:2] != "__"]
    others = [name for name in own if name != "forward" and not name.startswith(("get_", "set_"))]
    has_forward = kind.forward is not nn.Module.forward  # a list of modules has none
    return ["forward"] * has_forward + (others if kind.__module__.startswith("transformers.models.") else [])


def _method(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    module = model.get_submodule(path)
    before = getattr(module, variant)

    @functools.wraps(before)
    def method(*args: Any, **kwargs: Any) -> Any:
        seen.append(shapes(args))
        return scaled(before(*args, **kwargs))

    setattr(module, variant, method)
    return lambda: delattr(module, variant)


def patched_class(kind: type[nn.Module], name: str, seen: Seen) -> Undo:
    """Replace a method of a class for everybody."""
    before, own = getattr(kind, name), vars(kind).get(name)

    @functools.wraps(before)
    def method(*args: Any, **kwargs: Any) -> Any:
        seen.append(shapes([*args[not static :], *kwargs.values()]))
        return scaled(before(*args, **kwargs))

    static = isinstance(own, staticmethod)
    setattr(kind, name, staticmethod(method) if static else method)
    return lambda: delattr(kind, name) if own is None else setattr(kind, name, own)


def _subclass(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    module = model.get_submodule(path)
    before = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(shapes(args))
        return scaled(before.forward(self, *args, **kwargs))

    module.__class__ = type(f"My{before.__name__}", (before,), {"forward": forward})
    return lambda: setattr(module, "__class__", before)


class Wrapper(nn.Module):
    """Owns the module in whose place it stands, and scales what that returns."""

    def __init__(self, inner: nn.Module, seen: Seen) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append(shapes(args))
        return scaled(self.inner(*args, **kwargs))


class Likeness(Wrapper):
    """Has the attributes of the module inside as well, as PEFT's wrappers have."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _replacements(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    if not path:
        return []
    empty = not list(module.children()) and not list(module.parameters())
    return ["wrapped", "wrapped, with its attributes", *(["Identity"] if empty else [])]


def _replaced(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    parent, _, name = path.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(path)
    if variant == "Identity":
        setattr(owner, name, nn.Identity())
    else:
        setattr(owner, name, (Wrapper if variant == "wrapped" else Likeness)(module, seen))
    return lambda: setattr(owner, name, module)


class _Scale(nn.Module):
    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * SCALE


def _own_parameters(model: nn.Module, path: str) -> list[str]:
    return [name for name, _ in model.get_submodule(path).named_parameters(recurse=False)]


def _parametrised(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    module = model.get_submodule(path)
    parametrize.register_parametrization(module, variant, _Scale())
    return lambda: _quietly(parametrize.remove_parametrizations, module, variant, leave_parametrized=False)


def _quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Without PyTorch's advice to use something newer: old code exists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*args, **kwargs)


def _has_weight(model: nn.Module, path: str) -> list[str]:
    return [name for name in _own_parameters(model, path) if name == "weight"]


def _weight_norm(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    module = model.get_submodule(path)
    before = getattr(module, variant)
    _quietly(nn.utils.weight_norm, module, variant)
    with torch.no_grad():
        getattr(module, variant + "_g").mul_(SCALE)

    def undo() -> None:
        nn.utils.remove_weight_norm(module, variant)
        setattr(module, variant, before)

    return undo


def _accelerate(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    class Hook(accelerate_hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(shapes(args))
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return scaled(output)

    module = model.get_submodule(path)
    accelerate_hooks.add_hook_to_module(module, Hook())
    return lambda: accelerate_hooks.remove_hook_from_module(module)


_OF_ANY_MODULE = set(vars(nn.Module())) - {"training"}


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    """Other values that somebody might give an attribute, with what to call them."""
    if isinstance(value, bool):
        yield "inverted", not value
    elif isinstance(value, int):
        other = value // 2 if value > 1 else value + 1
        yield str(other), other
    elif isinstance(value, float):
        other = value / 2 if value else 1.0
        yield str(other), other
    elif isinstance(value, str):
        other = {"none": "tanh", "first": "mean"}.get(value, "none")
        yield other, other
    elif value is None:
        yield from (("1", 1), ("0.1", 0.1))
    elif isinstance(value, Tensor):
        yield "None", None
        if not isinstance(value, nn.Parameter):
            flipped = value.flip(-1)
            yield ("ones", torch.ones_like(value)) if torch.equal(value, flipped) else ("flipped", flipped)
    elif callable(value) and not isinstance(value, type):
        yield "another function", lambda *args, **kwargs: scaled(value(*args, **kwargs))


def _attribute_values(module: nn.Module) -> dict[str, tuple[str, Any]]:
    own = {name: value for name, value in vars(module).items() if name not in _OF_ANY_MODULE and name[0] != "_"}
    found = {**own, **module._parameters, **module._buffers}
    return {f"{name}={label}": (name, other) for name, value in found.items() for label, other in _others(value)}


def _attributes(model: nn.Module, path: str) -> list[str]:
    return list(_attribute_values(model.get_submodule(path)))


def _attribute(model: nn.Module, path: str, variant: str, seen: Seen) -> Undo:
    module = model.get_submodule(path)
    name, value = _attribute_values(module)[variant]
    before = getattr(module, name)
    setattr(module, name, value)
    return lambda: setattr(module, name, before)


EVERYWHERE = {
    "forward hook": module_hooks.register_module_forward_hook,
    "forward pre-hook": module_hooks.register_module_forward_pre_hook,
    "backward hook": module_hooks.register_module_full_backward_hook,
    "backward pre-hook": module_hooks.register_module_full_backward_pre_hook,
}


def hooked_everywhere(form: str, seen: Seen) -> Undo:
    """A hook on all modules there are. It changes inputs, outputs or gradients of each Linear."""

    def hook(module: nn.Module, *values: Any) -> Any:
        seen.append((type(module).__name__, shapes(values)))
        if not isinstance(module, nn.Linear):
            return None
        return scaled(values[0] if "backward" in form else values[-1])

    return EVERYWHERE[form](hook).remove


KINDS = {
    "forward hook": Kind(_once, _forward_hook),
    "forward pre-hook": Kind(_once, _pre_hook),
    "backward hook": Kind(_once, _backward_hook, backward=True),
    "backward pre-hook": Kind(_once, _backward_pre_hook, backward=True),
    "method of the instance": Kind(lambda model, path: methods(type(model.get_submodule(path))), _method),
    "subclass": Kind(_once, _subclass),
    "another module": Kind(_replacements, _replaced),
    "parametrisation": Kind(_own_parameters, _parametrised),
    "weight norm": Kind(_has_weight, _weight_norm),
    "accelerate's hook": Kind(lambda model, path: [""] if accelerate_hooks else [], _accelerate),
    "attribute": Kind(_attributes, _attribute),
}
