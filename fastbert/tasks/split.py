"""Data that is set aside to judge on, where a task comes without."""

import hashlib
import json
from typing import Any

from fastbert.errors import InputError
from fastbert.tasks.examples import Examples


def held_out(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """The rest, and a share of each class; by a hash of the inputs, so that it is the same for any order of the rows,
    and the same text is never on both sides.

    Raises:
        InputError: if the share is none, or one side would be empty.
    """
    if not 0 < share < 1:
        raise InputError(f"the share to set aside must be in (0, 1), but is {share}")
    order = sorted(range(len(examples)), key=lambda i: _hash(examples.inputs[i]))
    by_class: dict[str, list[int]] = {}
    for i in order:
        by_class.setdefault(_class(examples.labels[i]), []).append(i)
    aside = {_hash(examples.inputs[i]) for rows in by_class.values() for i in rows[: round(share * len(rows))]}
    dev = [i for i in range(len(examples)) if _hash(examples.inputs[i]) in aside]
    train = [i for i in range(len(examples)) if _hash(examples.inputs[i]) not in aside]
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
