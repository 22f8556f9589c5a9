"""Whatever somebody does to a module of a patched model, the model does what transformers' would do.

Each module of each class x each kind of touch x patched before or after it x evaluation or training with labels.
FASTBERT_WHOLE_MATRIX=1 runs all of it, in minutes. Else the modules of the base model, which all heads share, meet it
all in BertModel; in a head they meet each kind once, in another variant, order and phase from head to head.
"""

import itertools
import os

import pytest

from tests.optional import needs
from tests.side_by_side import CLASSES, PHASES, Case, Stand, stand
from tests.touches import KINDS

WHOLE = os.environ.get("FASTBERT_WHOLE_MATRIX") == "1"
ORDERS = ("patched after", "patched before")
SHOWN = 15  # of all that is wrong, in a message


def _cells(of: Stand, kind: str, number: int) -> list[tuple[str, bool, tuple[str, ...], bool]]:
    """Variants, phases (training or not) and orders in which a module is touched, and whether it is undone."""
    variants = KINDS[kind].variants(of.model, of.paths[number])
    if WHOLE or not of.paths[number].startswith("bert."):
        return list(itertools.product(variants, PHASES.values(), [ORDERS], [True]))
    turn = CLASSES.index(of.name)
    cell = number + list(KINDS).index(kind) + turn
    order, back = ORDERS[cell // 2 % 2], cell // 4 % 4 == 0
    return [(variants[turn % len(variants)], cell % 2 == 0, (order,), back)] if variants else []


@pytest.mark.filterwarnings("ignore:.*[bB]ackward hook")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs("accelerate") if "accelerate" in kind else ()) for kind in KINDS]
)
@pytest.mark.parametrize("name", CLASSES)
def test_a_touched_module(name: str, kind: str) -> None:
    of, wrong, skipped = stand(name), [], 0
    cases = [(path, *cell) for number, path in enumerate(of.paths) for cell in _cells(of, kind, number)]
    for path, variant, training, orders, back in cases:
        found = Case(of, kind, path, variant, training).check(orders, back)
        skipped += found is None  # transformers raises too
        wrong += found or []
    of.restore()
    assert skipped < len(cases) / 3, f"transformers raises in {skipped} of {len(cases)} cases"
    assert not wrong, "\n".join([f"{len(wrong)} wrong in {len(cases)} cases", *wrong[:SHOWN]])
