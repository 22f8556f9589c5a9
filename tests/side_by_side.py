"""One tiny model of transformers, touched, and the same one patched: what differs between them, in words.

Dimension key:  B batch   L padded length
"""

import functools
import inspect
import re
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import fastbert
import fastbert.patching  # takes down methods as they are written, before a test replaces one
from tests.families import without_cache
from tests.models import labels_for, padded
from tests.touched_classes import tiny
from tests.touches import KINDS, Seen

PHASES = {"evaluation": False, "training": True}
TOLERANCE = 2e-5


class Result(NamedTuple):
    """What a call came to; gradients only where it had a backward pass."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    seen: Seen


class Stand:
    """A model of a class, and the one place where it is run. `restored` gives it back as it was built.

    Attributes:
        untouched: results of the stock model, by phase.
    """

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        config = tiny(name)
        self.model = getattr(transformers, name)(config)
        with torch.no_grad():
            for p in self.model.parameters():  # as initialised, biases are 0 and LayerNorms 1
                p.add_(0.3 * torch.randn_like(p))
        self.paths = [path for path, _ in self.model.named_modules()]
        self._tensors = [*self.model.parameters(), *self.model.buffers()]
        self._values = [t.detach().clone() for t in self._tensors]
        if config.num_hidden_layers > 1:
            self.run([], training=False)  # then transformers' hooks on layers are there, always before a test's own
        self._parts = {}
        for training in PHASES.values():
            self.model.train(training)
            self._parts[training] = [_Part(m) for m in self.model.modules()]
        self.untouched = {}
        for training in PHASES.values():
            self.restore(training)
            self.untouched[training] = self.run([], training, backward=training)

    def restore(self, training: bool = False) -> None:
        """The model as it was built, in a mode, whatever was done to it."""
        for part in self._parts[training]:
            part.restore()
        self.restore_values()

    def restore_values(self) -> None:
        """Of parameters and buffers."""
        with torch.no_grad():
            torch._foreach_copy_(self._tensors, self._values)

    def run(self, seen: Seen, training: bool, backward: bool = False) -> Result:
        """A call, with labels in training; and a backward pass if asked for."""
        seen.clear()
        inputs, valid = _batch(self.name, training)
        self.model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(backward):
            output = self.model(**inputs)
            outputs = dict(_tensors(output))
        if backward:
            loss = outputs.get("loss")
            if loss is None:
                loss = sum(_weighted(_rows(t, valid)) for t in outputs.values())
            loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters()} if backward else {}
        return Result(outputs, gradients, list(seen))

    def differences(self, actual: Result, expected: Result, training: bool, packed: bool) -> Iterator[str]:
        """In words. Rows of padding count where nothing ran packed."""
        valid = _batch(self.name, training)[1] if packed else None
        if actual.seen != expected.seen:
            yield _calls(actual.seen, expected.seen)
        rows = [{key: _rows(t, valid) for key, t in of.outputs.items()} for of in (actual, expected)]
        if "hidden_states[0]" not in rows[1]:  # transformers finds none in a class made at run time
            rows[0] = {key: t for key, t in rows[0].items() if not key.startswith("hidden_states")}
        yield from _apart(*rows, scale=1.0)
        all_gradients = [*expected.gradients.values(), *self.untouched[True].gradients.values()]
        largest = max(0.01, *(_largest(g) for g in all_gradients if g is not None))  # of choices, they almost cancel
        wrong = list(_apart(actual.gradients, expected.gradients, scale=largest))
        if wrong:
            yield f"{len(wrong)} of {len(expected.gradients)} gradients: {wrong[0]}"


class _Part:
    """A module as it is now. Its containers, as those of its hooks, are copied too."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.state = module, type(module), dict(vars(module))
        self.containers = {key: v.copy() for key, v in self.state.items() if isinstance(v, dict | set | list)}

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        state = vars(self.module)
        state.clear()
        state.update(self.state)
        for key, container in self.containers.items():
            state[key] = container.copy()


@functools.cache
def stand(name: str) -> Stand:
    return Stand(name)


@functools.cache
def _batch(name: str, training: bool) -> tuple[dict[str, Any], Tensor]:
    """The inputs, and which of the tokens are no padding, (B, L).

    Token types are given in evaluation only; positions never: then a model reads its buffers.
    """
    ids = torch.tensor([[2, 7, 0, 3, 1], [2, 9, 3, 4, 5]])
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    if training and name.endswith("QuestionAnswering"):  # in transformers, padding takes a share of the softmax
        valid = torch.ones_like(valid)
    types = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
    if name.endswith("MultipleChoice"):
        ids, valid, types = (torch.stack([t, t.flip(0)], dim=1) for t in (ids, valid, types))
    inputs: dict[str, Any] = {"input_ids": padded(name, ids, valid), "attention_mask": valid}
    taken = inspect.signature(getattr(transformers, name).forward).parameters
    if training:
        inputs |= labels_for(name, ids, valid.bool())
        if name.endswith("QuestionAnswering"):
            inputs |= {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([2, 1])}
    else:
        more: dict[str, Any] = {"token_type_ids": types}
        more |= {"task_type_ids": types + 1} if types.ndim == 2 else {}  # transformers takes none of several choices
        inputs |= {key: value for key, value in more.items() if key in taken}
        inputs |= {"output_hidden_states": True, **without_cache(name)}
    return inputs, valid.flatten(0, -2).bool()


def _tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    for key in output:
        value = output[key]
        parts = (
            {key: value} if isinstance(value, Tensor) else dict(enumerate(value)) if isinstance(value, tuple) else {}
        )
        for i, part in parts.items():
            if isinstance(part, Tensor):
                yield (key if i == key else f"{key}[{i}]"), part


def _rows(value: Tensor, valid: Tensor | None) -> Tensor:
    """Of what has a row for each token, those that are no padding."""
    if valid is None or value.shape[:2] != valid.shape:
        return value
    return value[valid]


def _weighted(value: Tensor) -> Tensor:
    return (value * torch.cos(torch.arange(value.numel())).view_as(value)).sum()


def _apart(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], scale: float) -> Iterator[str]:
    """Which tensors are not the same up to rounding, relative to the scale or the largest number, and by how much."""
    if actual.keys() != expected.keys():
        yield f"in one of them only: {sorted(actual.keys() ^ expected.keys())}"
        return
    if _surely_close(list(actual.values()), [expected[name] for name in actual], TOLERANCE * scale):
        return
    for name, a in actual.items():
        e = expected[name]
        if a is None or e is None:
            if a is not e:
                yield f"{name} is {'None' if a is None else 'a tensor'}, expected {'None' if e is None else 'a tensor'}"
        elif (a.shape, a.layout) != (e.shape, e.layout):
            yield f"{name} is {tuple(a.shape)} {a.layout}, expected {tuple(e.shape)} {e.layout}"
        else:
            largest = max(scale, _largest(e))
            a, e = a.detach().to_dense(), e.detach().to_dense()
            if not torch.allclose(a, e, rtol=0, atol=TOLERANCE * largest, equal_nan=True):
                yield f"{name} differs by {float((a - e).abs().max()):.2g} of {largest:.2g}"


@torch.no_grad()
def _surely_close(actual: list[Tensor | None], expected: list[Tensor | None], tolerance: float) -> bool:
    """Quick, of many small tensors; False is a maybe."""
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if a is not None or e is not None]
    for a, e in pairs:
        if a is None or e is None or (a.shape, a.layout, e.layout) != (e.shape, torch.strided, torch.strided):
            return False
    if not pairs:
        return True
    a, e = (torch.cat([t.reshape(-1) for t in side]) for side in zip(*pairs, strict=True))
    return bool(((a - e).abs() <= tolerance).all())


def _largest(value: Tensor) -> float:
    value = value.detach().to_dense().nan_to_num(0, 0, 0)
    return float(value.abs().max()) if value.numel() else 0.0


def _calls(actual: Seen, expected: Seen) -> str:
    """How two lists of calls differ: their numbers and the first that is another one."""
    there = f"hooks saw {len(actual)} calls, expected {len(expected)}" if len(actual) != len(expected) else ""
    for a, e in zip(actual, expected, strict=False):
        if a != e:
            return f"{there + ', one' if there else 'a hook'} saw {a}"[:150] + f", expected {e}"[:150]
    return there


class Wrong(NamedTuple):
    """What was touched, in which phase and order, and what came of it."""

    touched: str
    cell: str
    text: str


def message(wrong: list[Wrong], shown: int = 25) -> str:
    """For people: a line for all that was touched, with what was wrong first."""
    lines: dict[str, list[Wrong]] = {}
    for one in wrong:
        lines.setdefault(one.touched, []).append(one)
    texts = [f"{touched}: {len(of)} x wrong; {of[0].cell}: {of[0].text}" for touched, of in lines.items()]
    return "\n".join([f"{len(wrong)} wrong, at {len(lines)}", *texts[:shown], *["..."][: len(texts) > shown]])


def phase(training: bool) -> str:
    return "training" if training else "evaluation"


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def is_named(reason: str, path: str, kind: type) -> bool:
    """Whether a reason names a module: the end of its path, or its class."""
    parts = path.split(".")
    name = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    return kind.__name__ in reason or bool(name and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reason))


class Case:
    """One touch of one module in one phase.

    Attributes:
        felt: after `check`, whether transformers met the touch: a hook was called, or something came out otherwise.
    """

    def __init__(self, of: Stand, kind: str, path: str, variant: str, training: bool) -> None:
        self.of, self.kind, self.path, self.variant, self.training = of, KINDS[kind], path, variant, training
        of.restore(training)
        self.closed = not path and kind in ("subclass", "method of the instance")  # then nobody asks fastbert
        self.class_ = type(of.model.get_submodule(path))
        self.seen: Seen = []
        self.felt = False

    def check(self, orders: Sequence[str], undo: bool = True) -> list[Wrong] | None:
        """What is wrong, or None if transformers cannot do it either. What it does not feel is tried in one order.

        undo: the touch is undone too, and the model unpatched.
        """
        try:
            self._touch()
            self.expected = self._run()
        except Exception:
            return None
        before, wrong = self.of.untouched[self.training], []
        if not self.training:
            before = before._replace(gradients=self.expected.gradients)
        self.felt = any(True for _ in self.of.differences(self.expected, before, self.training, packed=False))
        if not self.felt:
            orders, undo = [orders[len(self.variant) % len(orders)]], False
        for order in sorted(orders):  # "patched after" first: it goes on with the model that is touched now
            if order == "patched before":
                self.of.restore(self.training)
            found = []
            try:
                found.extend(self._patched_before(undo) if order == "patched before" else self._patched_after())
            except Exception as error:
                found.append(in_a_line(error))
            if found:
                where = " ".join(filter(None, (self.path or self.of.name, self.variant)))
                wrong.append(Wrong(where, f"{phase(self.training)}, {order}", "; ".join(found[:3])))
        return wrong

    def _touch(self) -> Any:
        return self.kind.touch(self.of.model, self.path, self.variant, self.seen)

    def _run(self) -> Result:
        return self.of.run(self.seen, self.training, self.training or self.kind.backward)

    def _patched_after(self) -> Iterator[str]:
        """The model is touched, and was run."""
        try:
            model = fastbert.patch(self.of.model)
        except ValueError as error:
            if self.closed and self.class_.__name__ in str(error):
                return  # a class of somebody's own
            raise
        if (yield from self._run_patched()):
            fastbert.patch(model, strict=True)
            yield from self._raises()

    def _patched_before(self, undo: bool) -> Iterator[str]:
        """And touched; the touch undone, touched again; then unpatched."""
        fastbert.patch(self.of.model)
        back = self._touch()
        fell_back = yield from self._run_patched()
        if undo:
            back()
            yield from self._undone()
            fastbert.patch(self.of.model, strict=True)
            self._touch()
            if fell_back:
                yield from self._raises()
            fastbert.unpatch(self.of.model)
            for text in self.of.differences(self._run(), self.expected, self.training, packed=False):
                yield f"unpatched: {text}"

    def _undone(self) -> Iterator[str]:
        self.of.restore_values()
        before, result, after = (
            fastbert.report(self.of.model),
            self.of.run([], self.training),
            fastbert.report(self.of.model),
        )
        expected = self.of.untouched[self.training]._replace(gradients={})
        for text in self.of.differences(result, expected, self.training, packed=True):
            yield f"undone: {text}"
        if after.packed_calls != before.packed_calls + 1 or after.fallbacks != before.fallbacks:
            yield f"undone: not packed, {dict(after.fallbacks)}"

    def _run_patched(self) -> Generator[str, None, bool]:
        """Returns whether the call fell back."""
        result, report = self._run(), fastbert.report(self.of.model)
        yield from self.of.differences(result, self.expected, self.training, packed=report.packed_calls > 0)
        if not report.packed_calls + report.fallbacks.total() and not self.closed:
            yield "the call was not counted"
        for reason in report.fallbacks:
            if not is_named(reason, self.path, self.class_):
                yield f"the report does not name it: {reason}"
        return report.fallbacks.total() > 0

    def _raises(self) -> Iterator[str]:
        """With strict=True."""
        try:
            self._run()
        except fastbert.FellBack as error:
            if not is_named(str(error), self.path, self.class_):
                yield f"strict=True does not name it: {error}"
        else:
            yield "strict=True did not raise"
