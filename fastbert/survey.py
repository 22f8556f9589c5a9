"""What is known of all parts of a model, by the rule in `fastbert.touched`, and whether it still holds.

A survey is kept with the model. Whether it holds is asked in every call, and so costs little.
"""

import operator
import weakref
from collections.abc import Collection, Iterable
from itertools import chain, repeat
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from fastbert.touched import (
    CALLED,
    ELEMENTWISE,
    HOOKS,
    Each,
    Role,
    Whole,
    dropout,
    dropout_rate,
    is_hooked,
    methods,
    why_class_touched,
)

_FACTS = {  # attributes by which a role decides, of leaves
    nn.Embedding: ("max_norm", "sparse", "scale_grad_by_freq", "padding_idx"),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.Dropout: ("p",),
    nn.CrossEntropyLoss: ("ignore_index", "reduction", "label_smoothing"),
    **dict.fromkeys(ELEMENTWISE, ("act", "approximate")),
}


class Touch(NamedTuple):
    """A part that is not plain, and why."""

    path: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def _can_be_watched(module: Any) -> bool:
    """Whether it is a module of Python's own, with its hooks, parts and parameters in dictionaries."""
    if not isinstance(module, nn.Module) or not isinstance(module.__dict__.get("_modules"), dict):
        return False
    return "_forward_hooks" in module.__dict__ and isinstance(module.__dict__.get("_parameters"), dict)


class Survey:
    """What was found in a module's parts, and whether it still holds. The module itself is not kept alive by it.

    Attributes:
        root: the module, weakly.
        touches: the parts for which a call falls back.
        called: what must be called.  called_leaves: of these, what others made, which may have a state of its own.
        hooked: what machinery has hooked, by path.
    """

    def __init__(self, root: nn.Module, facts: Iterable[tuple[dict[str, Any], str]] = ()) -> None:
        """facts: what the root itself goes by, by dictionary and key."""
        self.root = weakref.ref(root)
        self.touches: list[Touch] = []
        self.called: set[nn.Module] = set()
        self.called_leaves: set[nn.Module] = set()
        self.hooked: list[str] = []
        self._inside: dict[nn.Module, tuple[nn.Module, ...]] = {}
        self._dropouts: list[tuple[str, nn.Module, nn.Module]] = []  # with the module whose mode each goes by
        self._visited: dict[nn.Module, None] = {}
        self._facts = list(facts)
        self._root_facts: list[str] = []
        self._values: list[Tensor] = []
        self._look_at_root(root)
        self._walk(root, "")
        self._modules = list(self._visited)
        self._dicts = [m.__dict__ for m in self._modules]
        self._children = [root._modules, *(d["_modules"] for d in self._dicts if d["_modules"])]
        self._parameters = [d["_parameters"] for d in self._dicts if d["_parameters"]]
        kinds = dict.fromkeys((type(root), *map(type, self._modules)))
        self._methods = list(dict.fromkeys(key for kind in kinds for key in methods(kind)))
        self._fact_values, self._then, self._hooks = self._now_facts(root), self._now(), list(self._now_hooks())

    def _look_at_root(self, root: nn.Module) -> None:
        """Its hooks and its forward are called anyway; not what its forward calls."""
        why = why_class_touched(type(root))
        for _, name in methods(type(root)):
            if name != "forward":
                self._root_facts.append(name)
                why = why or (f"its {name} is replaced" if name in root.__dict__ else None)
        self._root_facts += getattr(root, "facts", ())
        changed = getattr(root, "why_changed", None)
        why = why or (None if changed is None else changed())
        if why is not None:
            self.touches.append(Touch(type(root).__name__, why))

    def _walk(self, module: nn.Module, path: str) -> None:
        for name, role in getattr(module, "parts", {}).items():
            child = module._modules.get(name, module.__dict__.get(name))
            if child is None:
                continue
            if isinstance(role, Each):
                if type(child) is not nn.ModuleList:
                    self.touches.append(Touch(f"{path}{name}", f"a {type(child).__name__} in its place"))
                    self._facts.append((module.__dict__, name))
                    continue
                self._visited[child] = None
                for i, inner in enumerate(child):
                    self._look(inner, f"{path}{name}.{i}", role.role, module)
            elif isinstance(role, Whole):
                self._look(child, f"{path}{name}", role.role, module, inside=False)
            else:
                self._look(child, f"{path}{name}", role, module)
                if not isinstance(child, nn.Module):
                    self._facts.append((module.__dict__, name))

    def _look(self, module: Any, path: str, role: Role, parent: nn.Module, inside: bool = True) -> None:
        why = role(module)
        if why is not None and why != CALLED:
            self.touches.append(Touch(path, why))
        if not _can_be_watched(module):
            return  # a function, or a scripted module: known by what stands in its parent
        self._visited[module] = None
        if is_hooked(module):
            self.hooked.append(path)
        if why == CALLED and inside:
            self._visited.update((m, None) for m in module.modules() if _can_be_watched(m))
        ours = any(kind.__module__.startswith("fastbert.families.") for kind in type(module).__mro__)
        if why == CALLED:
            self.called.add(module)
            if not ours:
                self.called_leaves.add(module)
        if role is dropout_rate or (role is dropout and type(module) is nn.Dropout):
            self._dropouts.append((path, module, parent if role is dropout_rate else module))
        own = module.__dict__
        self._facts += [(own, name) for name in _FACTS.get(type(module), ())]
        self._facts += [(own, name) for _, name in methods(type(module)) if name != "forward"]
        if type(module) is nn.CrossEntropyLoss:
            self._facts.append((own["_buffers"], "weight"))
        if not ours:
            return  # a module of others' may have attributes of any name
        changed = getattr(module, "why_changed", None)
        self._facts += [(own, name) for name in getattr(module, "facts", ())]
        for name in getattr(module, "buffers_read", ()):
            self._facts.append((own["_buffers"], name))
            self._values += [own["_buffers"][name]] if own["_buffers"].get(name) is not None else []
        if inside and changed is not None and (why := changed()) is not None:
            self.touches.append(Touch(path, why))
        if inside:
            self._walk(module, f"{path}.")

    def _now(self) -> list[Any]:
        return [
            list(map(type, self._modules)),
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(type, chain.from_iterable(map(dict.values, self._parameters)))),
            list(map(dict.get, self._dicts, repeat("forward"))),
            [kind.__dict__.get(name) for kind, name in self._methods],
            [None if values.is_inference() else values._version for values in self._values],
        ]

    def _now_hooks(self) -> Iterable[int]:
        """Their keys, which are never given twice."""
        return chain.from_iterable(chain.from_iterable(map(HOOKS, self._dicts)))

    def _now_facts(self, root: nn.Module) -> list[Any]:
        own = root.__dict__
        return [*(values.get(name) for values, name in self._facts), *map(own.get, self._root_facts)]

    def holds(self, root: nn.Module) -> bool:
        """Whether nothing has changed since."""
        if self._hooks:
            hooked_alike = list(self._now_hooks()) == self._hooks
        else:
            hooked_alike = not any(chain.from_iterable(map(HOOKS, self._dicts)))
        facts_alike = all(map(operator.is_, self._now_facts(root), self._fact_values))
        return hooked_alike and facts_alike and self._now() == self._then

    @property
    def visited(self) -> Collection[nn.Module]:
        """What it looks at; of the root only children and attributes."""
        return self._visited.keys()

    def first(self) -> str | None:
        """Why a call falls back, or None."""
        return str(self.touches[0]) if self.touches else None

    def within(self, part: str) -> str | None:
        """What is touched of this part, or None."""
        return next((str(t) for t in self.touches if t.path == part or t.path.startswith(f"{part}.")), None)

    def is_touched(self, part: str) -> bool:
        """Whether the part itself is touched, not only what is in it."""
        return any(t.path == part for t in self.touches)

    def without(self, part: str) -> str | None:
        """What else is touched, or None."""
        return next((str(t) for t in self.touches if t.path != part and not t.path.startswith(f"{part}.")), None)

    def inside(self, module: nn.Module) -> tuple[nn.Module, ...]:
        """A part with all that is in it."""
        if module not in self._inside:
            self._inside[module] = tuple(module.modules())
        return self._inside[module]

    def drops(self, apart: str = "") -> bool:
        """Whether any dropout drops anything now; those inside of one part left out."""
        for path, module, goes_by in self._dropouts:
            if goes_by.training and cast(float, module.p) > 0 and not (apart and path.startswith(f"{apart}.")):
                return True
        return False
