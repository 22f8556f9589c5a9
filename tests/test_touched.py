"""Whatever somebody does to a module of a patched model, the model does what transformers' would do.

Each module of each class x each kind of touch x patched before or after it x evaluation or training with labels.
FASTBERT_WHOLE_MATRIX=1 runs all of it, for all families. Else BertModel has all; in BERT's heads, order and phase of a
head's own modules take turns, and variants too of the base model's, each of which meets each kind once in each head. Of
other families, only modules count whose role BERT does not have, and of two kinds each meets one.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import fastbert
from tests.optional import needs
from tests.side_by_side import PHASES, Case, Result, Stand, Wrong, in_a_line, is_named, message, phase, stand
from tests.touched_classes import BERTS, CLASSES, OTHERS, own_paths
from tests.touches import EVERYWHERE, KINDS, Seen, Undo, hooked_everywhere, methods, patched_class

WHOLE = os.environ.get("FASTBERT_WHOLE_MATRIX") == "1"
ORDERS = ("patched after", "patched before")
NAMES = CLASSES if WHOLE else (*BERTS, *OTHERS)


def _paths(of: Stand) -> list[str]:
    """Of the modules that are touched."""
    return own_paths(of.name) if of.name in OTHERS and not WHOLE else of.paths


def _cells(of: Stand, kind: str, number: int) -> list[tuple[str, bool, tuple[str, ...], bool]]:
    """Variants, phases (training or not) and orders in which a module is touched, and whether it is undone."""
    path = _paths(of)[number]
    variants = KINDS[kind].variants(of.model, path)
    if WHOLE or of.name == "BertModel":
        return list(itertools.product(variants, PHASES.values(), [ORDERS], [True]))
    turn = NAMES.index(of.name)
    cell = number + list(KINDS).index(kind) + turn
    if of.name in OTHERS and (cell % 2 or not variants):
        return []
    if of.name in BERTS and not path.startswith("bert."):
        undo = cell // 2 % 2 == 0
        return [(v, training, (ORDERS[(cell + training) % 2],), undo) for v in variants for training in PHASES.values()]
    order, undo = ORDERS[cell // 2 % 2], cell // 4 % 4 == 0
    return [(variants[turn % len(variants)], number % 2 == 0, (order,), undo)] if variants else []


def _touched(of: Stand, kinds: Iterable[str], few: float) -> None:
    """few: the share of touches that transformers must feel, for the rest to mean anything."""
    wrong, skipped, felt = [], 0, 0
    cases = [(kind, path, *cell) for kind in kinds for n, path in enumerate(_paths(of)) for cell in _cells(of, kind, n)]
    for kind, path, variant, training, orders, undo in cases:
        case = Case(of, kind, path, variant, training)
        found = case.check(orders, undo)
        skipped, felt = skipped + (found is None), felt + case.felt
        wrong += found or []
    of.restore()
    assert skipped < len(cases) / 3, f"transformers raises in {skipped} of {len(cases)} cases"
    assert felt > few * len(cases), f"transformers felt only {felt} of {len(cases)} touches"
    if wrong:
        pytest.fail(message(wrong), pytrace=False)


@pytest.mark.filterwarnings("ignore:.*[bB]ackward hook")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs("accelerate") if "accelerate" in kind else ()) for kind in KINDS]
)
@pytest.mark.parametrize("name", CLASSES if WHOLE else BERTS)
def test_a_touched_module(name: str, kind: str) -> None:
    _touched(stand(name), [kind], few=0.03 if kind == "attribute" else 0.7)  # most attributes are read by nobody


@pytest.mark.filterwarnings("ignore:.*[bB]ackward hook")
@pytest.mark.parametrize("name", () if WHOLE else OTHERS)
def test_a_touched_module_of_another_family(name: str) -> None:
    _touched(stand(name), KINDS, few=0.5)


@pytest.mark.filterwarnings("ignore:.*[bB]ackward hook")
@pytest.mark.parametrize("form", EVERYWHERE)
@pytest.mark.parametrize("name", CLASSES if WHOLE else BERTS)
def test_a_hook_on_all_modules(name: str, form: str) -> None:
    """It sees the same modules, by their classes' names, and shapes."""
    of, wrong = stand(name), []
    for training in PHASES.values():
        wrong += _everywhere(of, form, functools.partial(hooked_everywhere, form), training)[0]
    if wrong:
        pytest.fail(message(wrong), pytrace=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_of_a_class_replaced(name: str) -> None:
    """For everybody: of transformers' classes and PyTorch's. What is in the encoder falls back."""
    of, wrong = stand(name), []
    inside = {type(m) for path, m in of.model.named_modules() if re.search(r"(encoder|transformer)\.", path)}
    classes = dict.fromkeys(type(of.model.get_submodule(path)) for path in _paths(of))
    for chosen, method in [(kind, method) for kind in classes for method in methods(kind)]:
        what = f"{chosen.__name__}.{method}"
        for training in PHASES.values():
            found, reasons, called = _everywhere(of, what, functools.partial(patched_class, chosen, method), training)
            wrong += found
            if called and chosen in inside and not reasons:
                wrong.append(Wrong(what, phase(training), "the call did not fall back"))
            unnamed = [reason for reason in reasons if not is_named(reason, "", chosen)]
            wrong += [Wrong(what, phase(training), f"it is not named: {reason}") for reason in unnamed]
    if wrong:
        pytest.fail(message(wrong), pytrace=False)


def _gathered(of: Stand, path: str, training: bool) -> tuple[list[str], bool]:
    """What is wrong where a module's weights are there only while it is called; and whether the call ran packed."""
    of.restore(training)
    fastbert.patch(of.model, lazy_logits=False)
    module = of.model.get_submodule(path)
    own = {p: p.detach().clone() for p in module.parameters()}

    def gather(*_: Any) -> None:
        for p, value in own.items():
            p.data = value.clone()

    def give_away(*_: Any) -> None:
        for p in own:
            p.data = torch.full_like(p, torch.nan)

    gather.__module__ = give_away.__module__ = "torch.distributed.fsdp"
    give_away()
    module.register_forward_pre_hook(gather)
    module.register_forward_hook(give_away)
    results = [of.run([], training)]
    packed = fastbert.report(of.model).packed_calls > 0
    fastbert.unpatch(of.model)
    results.append(of.run([], training))
    if any(not t.isfinite().all() for t in results[1].outputs.values()):
        return [], packed  # transformers reads them elsewhere too
    return list(of.differences(*results, training, packed)), packed


def _everywhere(
    of: Stand, what: str, touch: Callable[[Seen], Undo], training: bool
) -> tuple[list[Wrong], list[str], bool]:
    """What is wrong when all modules are touched; why calls fell back; whether transformers' call met the touch."""
    wrong, reasons, seen = [], [], []
    results: list[Result] = []
    for order in ("", *ORDERS):
        of.restore(training)
        if order == "patched before":
            fastbert.patch(of.model)
        undo, found = touch(seen), []
        try:
            if order == "patched after":
                fastbert.patch(of.model)
            results.append(of.run(seen, training, backward=True))
            if order:
                report = fastbert.report(of.model)
                reasons += report.fallbacks
                found += of.differences(results[-1], results[0], training, packed=report.packed_calls > 0)
        except Exception as error:
            found.append(in_a_line(error))
        finally:
            undo()
        wrong += [Wrong(what, f"{phase(training)}, {order}", "; ".join(found[:3]))] * bool(found)
    fastbert.patch(of.model)
    found = list(of.differences(of.run([], training, training), of.untouched[training], training, packed=True))
    if fastbert.report(of.model).packed_calls != 1:
        found.append("not packed")
    wrong += [Wrong(what, f"{phase(training)}, undone", "; ".join(found))] * bool(found)
    of.restore()
    return wrong, reasons, bool(results[0].seen)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_there_only_in_a_call(name: str) -> None:
    """As under FSDP, whose hooks gather a module's weights and give them away again."""
    of, wrong, packed = stand(name), [], set()
    for training, path in itertools.product(PHASES.values(), filter(None, _paths(of))):
        found, is_packed = _gathered(of, path, training)
        wrong += [Wrong(path, phase(training), "; ".join(found[:3]))] * bool(found)
        packed |= {path} if is_packed else set()
    of.restore()
    layers = {path for path in _paths(of) if re.search(r"layers?\.\d$", path)}
    assert not wrong, message(wrong)
    assert layers <= packed
