"""Subclasses of transformers' classes: patched where what fastbert replaces is the parent's.

`class MyBert(BertForMaskedLM)` with another `__init__` or further methods becomes `MyBert` with fastbert's
BertForMaskedLM between it and transformers'.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from fastbert import touched

_MADE: dict[type, type] = {}  # the user's class: the one made from it


def fast(kind: type, classes: Mapping[type, type]) -> type | None:
    """The class for a user's subclass; None where it has a parent that fastbert does not know, or its own forward."""
    if kind in _MADE:
        return _MADE[kind]
    if why_not(kind, classes) is not None:
        return None
    known = _parent(kind, classes)
    made = type(kind.__name__, (kind, classes[known]), {"__reduce_ex__": _reduce, "_fastbert_made": True})
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__
    _MADE[kind] = made
    return made


def why_not(kind: type, classes: Mapping[type, type]) -> str | None:
    """Why a class cannot be patched, or None: for people."""
    known = _parent(kind, classes)
    if known is None:
        return "it comes from no class that fastbert knows"
    replaced = [name for name, value in vars(classes[known]).items() if inspect.isfunction(value)]
    replaced += [name for _, name in touched.methods(known)]
    for base in kind.__mro__[: kind.__mro__.index(known)]:
        own = [name for name in ("forward", *replaced, "__call__") if name in vars(base)]
        if own:
            return f"{base.__name__} has its own {own[0]}, where {known.__name__}'s is what fastbert replaces"
    return None


def _parent(kind: type, classes: Mapping[type, type]) -> Any:
    return next((base for base in kind.__mro__[1:] if base in classes), None)


def original(kind: type) -> type | None:
    """The user's class that a class was made from, or None."""
    return kind.__mro__[1] if vars(kind).get("_fastbert_made") else None


def _reduce(self: Any, protocol: Any) -> Any:
    _, _, *state = super(type(self), self).__reduce_ex__(protocol)
    return _rebuild, (original(type(self)),), *state


def _rebuild(kind: type) -> Any:
    made = sys.modules["fastbert.families._base"].fast_class(kind)
    return made.__new__(made)
