"""Logits of a training step that are computed when somebody reads them.

In training only the rows with a label meet the vocabulary. Whoever reads `outputs.logits`, in whatever way, gets the
tensor that transformers would have given: of the weights, modes, dropout masks and autocast of the forward pass.
"""

import contextlib
import dataclasses
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.utils.generic import ModelOutput

from fastbert.survey import Survey

_UNREAD: "weakref.WeakSet[Deferred]" = weakref.WeakSet()
_CHANGED = (
    "logits of a training step are computed when they are read, from the weights of that step, but {} since. "
    "Read them before, or let every step compute them: fastbert.patch(model, lazy_logits=False)"
)
# Who walks through every output of every step and looks for gradients: not somebody who reads.
_WALKERS = ("torch.distributed.fsdp.", "torch.distributed._composable.", "torch.nn.parallel.distributed")
_ON_THE_WAY = (__name__, "torch.utils._pytree", "torch.utils._cxx_pytree", "transformers.utils.generic", "collections")
_SAMPLE = 64  # elements of a weight, to see that somebody wrote it without PyTorch's knowing


def later(
    compute: Callable[[], Tensor], modules: Iterable[nn.Module], surveys: Sequence[tuple[nn.Module, Survey]]
) -> "Deferred | Tensor":
    """Logits that are computed when they are read; or now, where nobody could see that a weight has changed.

    Args:
        compute: computes them.
        modules: all that it calls.
        surveys: models, and what was known of their parts.
    """
    modes = {m: m.training for m in modules}
    weights = [(m, name, p) for m in modes for name, p in m._parameters.items() if p is not None]
    # A replica has none, and what was built in inference mode no versions.
    if not torch.compiler.is_compiling() and (not weights or any(p.is_inference() for _, _, p in weights)):
        return compute()
    return Deferred(compute, modes, weights, surveys)


class Deferred:
    """Logits that nobody has read yet. `later` makes them.

    Args:
        compute: computes them.
        modes: what it calls, and whether that was training.
        weights: of these, with their names.
        surveys: models, and what was known of their parts.
    """

    def __init__(
        self,
        compute: Callable[[], Tensor],
        modes: dict[nn.Module, bool],
        weights: list[tuple[nn.Module, str, nn.Parameter]],
        surveys: Sequence[tuple[nn.Module, Survey]],
    ) -> None:
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None
        self._modes, self._weights = modes, weights
        self._versions = [p._version for _, _, p in self._weights]
        self._surveys = list(surveys)
        self._sample = None if torch.compiler.is_compiling() else _sample([p for _, _, p in self._weights])
        self.dtype: torch.dtype | None = None  # that mixed precision gives its outputs
        self._kept: list[Tensor] | None = None  # copies, once an optimiser is about to change them
        self._sharded_changed = False
        self._grad = torch.is_grad_enabled()
        device = self._weights[0][2].device.type
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        _note_steps()
        _UNREAD.add(self)

    def read(self) -> Tensor:
        """The logits, computed once.

        Raises:
            RuntimeError: if the weights are others by now, and nobody could keep those of the forward pass.
        """
        if self._compute is not None:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.set_grad_enabled(self._grad and self._kept is None))
                stack.enter_context(torch.autocast(*self._autocast))
                stack.enter_context(self._as_they_were())
                self._value = self._compute()
            if self.dtype is not None and self._value.dtype.itemsize < 4:
                self._value = self._value.to(self.dtype)
            self._compute, self._kept, self._surveys = None, None, []
            self._modes, self._weights = {}, []
            _UNREAD.discard(self)
        return cast(Tensor, self._value)

    @contextlib.contextmanager
    def _as_they_were(self) -> Iterator[None]:
        """Modes and weights."""
        now = {m: m.training for m in self._modes}
        weights = [m._parameters.get(name) for m, name, _ in self._weights]
        self._check(weights)
        try:
            for module, mode in self._modes.items():
                module.training = mode
            if self._kept is not None:
                for (module, name, _), kept in zip(self._weights, self._kept, strict=True):
                    module._parameters[name] = cast(nn.Parameter, kept)
            yield
        finally:
            for module, mode in now.items():
                module.training = mode
            if self._kept is not None:
                for (module, name, _), weight in zip(self._weights, weights, strict=True):
                    module._parameters[name] = weight

    def _check(self, weights: list[nn.Parameter | None]) -> None:
        """That all but what is kept is as it was."""
        for module, survey in self._surveys:
            if not survey.holds(module):
                raise RuntimeError(_CHANGED.format(f"a part of {type(module).__name__} was changed"))
        if self._kept is not None:
            return
        if self._sharded_changed:
            raise RuntimeError(_CHANGED.format("an optimiser has changed them"))
        for (_, name, then), version, now in zip(self._weights, self._versions, weights, strict=True):
            if now is not then and not (_is_sharded(now) or _is_sharded(then)):
                raise RuntimeError(_CHANGED.format(f"{name} was replaced"))
            if now is then and then._version != version:
                raise RuntimeError(_CHANGED.format(f"{name} was changed"))
        if self._sample is not None:
            sample = _sample([p for _, _, p in self._weights])
            if sample is None or sample.dtype != self._sample.dtype or not torch.equal(sample, self._sample):
                raise RuntimeError(_CHANGED.format("somebody has changed them"))

    def before_step(self, optimizer: torch.optim.Optimizer, copies: dict[int, Tensor]) -> None:
        """Keep the weights that an optimiser is about to change; copies, by weight, are shared with other outputs."""
        if self._kept is not None or self._compute is None:
            return
        changing = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(_is_sharded(m._parameters.get(name)) for m, name, _ in self._weights):
            self._sharded_changed = True
        elif any(id(p) in changing for _, _, p in self._weights):
            self._check([m._parameters.get(name) for m, name, _ in self._weights])
            for _, _, p in self._weights:
                if id(p) not in copies:
                    copies[id(p)] = p.detach().clone()
            self._kept = [copies[id(p)] for _, _, p in self._weights]


def _sample(weights: Sequence[Tensor]) -> Tensor | None:
    """Some elements of some weights; None where they are sharded or have no values."""
    weights = weights[:: 1 + len(weights) // 6]
    if any(_is_sharded(p) or p.is_meta for p in weights):
        return None
    with torch.no_grad():
        return torch.cat([p.detach().reshape(-1)[:_SAMPLE] for p in weights])


def _is_sharded(weight: Tensor | None) -> bool:
    return type(weight).__module__.startswith("torch.distributed.")


_NOTING = False


def _note_steps() -> None:
    global _NOTING
    if not _NOTING:
        register_optimizer_step_pre_hook(_before_step)
        _NOTING = True


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    copies: dict[int, Tensor] = {}
    for deferred in list(_UNREAD):
        deferred.before_step(optimizer, copies)


def _who_asks() -> str:
    """ "walker" for one that only walks through all outputs, "converter" for mixed precision's, "reader" else."""
    frame = sys._getframe(1)
    while frame is not None:
        where = str(frame.f_globals.get("__name__"))
        if where == "accelerate.utils.operations":
            if frame.f_code.co_name == "convert_to_fp32":
                return "converter"
        elif not where.startswith(_ON_THE_WAY):
            return "walker" if where.startswith(_WALKERS) else "reader"
        frame = cast(Any, frame.f_back)
    return "reader"


def _asked(value: Any) -> Any:
    """What somebody gets who asks for a value."""
    if not isinstance(value, Deferred):
        return value
    who = _who_asks()
    if who == "reader":
        return value.read()
    if who == "converter":
        value.dtype = torch.float32
    return value


def deferring(kind: type[ModelOutput]) -> type[ModelOutput]:
    """transformers' output class, for logits that are computed when they are read. Pickled it is transformers'."""

    def reduce(self: Any) -> Any:
        return kind, tuple(self.get(field.name) for field in dataclasses.fields(self))

    members = {"__module__": __name__, "__doc__": kind.__doc__, "__reduce__": reduce}
    return cast(type[ModelOutput], dataclasses.dataclass(type(kind.__name__, (DeferredFields, kind), members)))


class DeferredFields(ModelOutput):
    """Mixed into an output class, so that whatever reads a Deferred gets the tensor.

    Only accelerate's and PyTorch's own walks through every step's outputs leave it as it is.
    """

    _built = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]  # looks at every field, in some versions by attribute
        object.__setattr__(self, "_built", True)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return _asked(value) if isinstance(value, Deferred) and self._built else value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return _asked(OrderedDict.__getitem__(self, key))
        keys = list(self)[key]
        return self[keys] if isinstance(keys, str) else tuple(self[name] for name in keys)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def values(self) -> Any:
        return {key: self[key] for key in self}.values()

    def items(self) -> Any:
        return {key: self[key] for key in self}.items()

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        key, value = super().popitem(last)
        return key, _asked(value)
