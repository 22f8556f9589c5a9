"""Whatever somebody does to a module of a patched model, the model does what transformers' would do.

Each module of each class x each kind of touch x patched before or after it x evaluation or training with labels.
"""

import pytest

from tests.optional import needs
from tests.side_by_side import CLASSES, PHASES, Case, Stand, stand
from tests.touches import KINDS

SHOWN = 12  # of all that is wrong, in a message


def _orders(of: Stand, number: int, training: bool) -> tuple[str, ...]:
    """Both; but in heads, whose base is that of all others, one in evaluation and the other one in training."""
    if not of.paths[number].startswith("bert."):
        return ("before", "after")
    return ("before",) if (number % 2 == 0) == training else ("after",)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs("accelerate") if "accelerate" in kind else ()) for kind in KINDS]
)
@pytest.mark.parametrize("name", CLASSES)
def test_a_touched_module(name: str, kind: str) -> None:
    of, wrong, cases, compared = stand(name), [], 0, 0
    for training in PHASES.values():
        for number, path in enumerate(of.paths):
            for variant in KINDS[kind].variants(of.model, path):
                found = Case(of, kind, path, variant, training).check(_orders(of, number, training))
                cases, compared = cases + 1, compared + (found is not None)
                wrong += found or []
    print(f"{name}, {kind}: {compared} of {cases} compared")
    assert compared > cases / 2
    assert not wrong, "\n".join(
        [f"{len(wrong)} in {compared} cases", *wrong[:SHOWN], *(["..."] * (len(wrong) > SHOWN))]
    )
