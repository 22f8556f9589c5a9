"""Data that is set aside to judge on, where a task comes without."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

from fastbert.errors import InputError
from fastbert.tasks.examples import Examples


def held_out(
    examples: Examples, share: float, unit: Callable[[Any], Any] = lambda item: item
) -> tuple[Examples, Examples]:
    """The rest, and a share of each class; by a hash of the inputs, so that it is the same for any order of the rows,
    and the same text is never on both sides.

    Args:
        unit: what of an input is never on both sides: of a question its passage, which other questions have too.

    Raises:
        InputError: if the share is none, or one side would be empty.
    """
    if not 0 < share < 1:
        raise InputError(f"the share to set aside must be in (0, 1), but is {share}")
    of = [_hash(unit(item)) for item in examples.inputs]
    order = sorted(range(len(examples)), key=of.__getitem__)
    by_class: dict[str, list[int]] = {}
    for i in order:
        by_class.setdefault(_class(examples.labels[i]), []).append(i)
    aside = {of[i] for rows in by_class.values() for i in rows[: round(share * len(rows))]}
    dev = [i for i in range(len(examples)) if of[i] in aside]
    train = [i for i in range(len(examples)) if of[i] not in aside]
    if not dev or not train:
        raise InputError(f"{examples.name} has too few rows to set {share:.0%} aside: give dev data")
    rest, set_aside = examples.select(train), examples.select(dev)
    rest.problems.update(dict(examples.problems.counts), examples.problems.first)
    return rest, set_aside


def _hash(item: Any) -> str:
    return hashlib.blake2b(json.dumps(item, default=str).encode(), digest_size=16).hexdigest()


def _class(label: Any) -> str:
    """Numbers and lists are one class."""
    return label if isinstance(label, str) else ""
