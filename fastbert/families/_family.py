"""A family of transformers': which of its classes plays which role.

A role is a class without a parent of transformers': what fastbert does where transformers' class stands. `family` makes
of both a class of the same name.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import GenerationMixin, PreTrainedModel

from fastbert import touched
from fastbert.families import _base, _losses
from fastbert.touched import Parts

BASE = "the base model"  # in `parts` of a head: the model inside of it, which each family calls by another name

# What transformers' modules call of their own module.
_FUNCTIONS = ("create_bidirectional_mask", "create_causal_mask", "CrossEntropyLoss", "gelu")


class Role:
    """What all roles have.

    Attributes:
        _stock: transformers' class.
        parts: roles of its children, see `fastbert.touched`.
    """

    _stock: ClassVar[Any]
    parts: ClassVar[Parts] = {}

    if TYPE_CHECKING:  # what transformers' class has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        """What the class that is made of this role and transformers' class has besides: a forward, perhaps."""
        return {}


def stock_of(module: Any) -> Any:
    """transformers' class of a module; it may have that one again, while somebody keeps its forward from before."""
    kind: Any = type(module)
    return getattr(kind, "_stock", kind)


class Packed(Role):
    """Of a module that takes packed hidden states, (T, N), given a `run`; without one it is transformers' own."""

    def forward(self, *args: Any, run: Any = None, **kwargs: Any) -> Any:
        if run is None:
            return stock_of(self).forward(self, *args, **kwargs)
        return self._packed(*args, run=run, **kwargs)

    def _packed(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class ModelRole(Role):
    """Of a model that one can load. Built directly (not patched later), it gets fastbert's classes in all its parts."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        _base.swap(self, _base.Options())  # type: ignore[arg-type]


class HeadRole(ModelRole):
    """Of a head around a base model: transformers' own forward, unless the role has a packed one."""

    packed: ClassVar[Callable[..., Any] | None] = None

    @classmethod
    def members(cls, stock: Any) -> dict[str, Any]:
        return {"forward": _base.head_forward(stock, cls.packed or _losses.honour_num_items(stock))}


def family(module: ModuleType, roles: Mapping[str, type[Role]]) -> dict[str, type]:
    """fastbert's classes for a module of transformers', by name, which `patch` knows from now on.

    Args:
        module: of transformers'.
        roles: by the names of its classes.
    """
    home = sys._getframe(1).f_globals["__name__"]
    made = {name: _class(getattr(module, name), role, home) for name, role in roles.items()}
    called = (name for name in _FUNCTIONS if hasattr(module, name))
    touched.remember_functions(module, *called, called_by=module.__name__)
    _base.register(*made.values())
    return made


def named(prefix: str, roles: Mapping[str, type[Role]]) -> dict[str, type[Role]]:
    """The same roles for names that begin with a family's."""
    return {prefix + name: role for name, role in roles.items()}


def _built(role: Any) -> Callable[..., None]:
    """A class's own `__init__`, so that it can have transformers' signature: people look for its arguments there."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        role.__init__(self, *args, **kwargs)

    return __init__


def _class(stock: Any, role: type[Role], home: str) -> type:
    members: dict[str, Any] = {"__module__": home, "__doc__": role.__doc__, "_stock": stock}
    if issubclass(stock, PreTrainedModel):
        members["__init__"] = functools.wraps(stock.__init__)(_built(role))
        members["parts"] = {stock.base_model_prefix if n is BASE else n: of for n, of in role.parts.items()}
    mixed_in = [base for base in stock.__bases__ if base is GenerationMixin]  # transformers looks among the bases
    return type(stock.__name__, (role, stock, *mixed_in), members | role.members(stock))
