"""A split of a task's data: inputs, labels, and where each stands in its file."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastbert.data.documents import Problems
from fastbert.data.records import Records
from fastbert.errors import InputError

EMPTY = "an empty text (kept)"


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of a task, in order.

    Attributes:
        name: of the file, in messages.
        inputs: what an engine takes, one a row: a text, a pair of texts, words, ...
        labels: as the file has them, one a row; None for a row, or a file, that has none.
        places: where each row stands, in messages.
        ids: by which predictions are told apart; the numbers of the rows, from 0, where a file has none.
        problems: rows that were left out, and what was odd.
        notes: what else is to be said of them.
    """

    name: str
    inputs: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    ids: list[Any] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inputs)

    def add(self, item: Any, label: Any, place: str, id: Any = None) -> None:
        self.ids.append(len(self.inputs) if id is None else id)
        self.inputs.append(item)
        self.labels.append(label)
        self.places.append(place)

    def select(self, rows: Iterable[int]) -> "Examples":
        """These alone, in this order; what was left out is counted no more."""
        rows = list(rows)
        inputs, labels, places, ids = (
            [values[i] for i in rows] for values in (self.inputs, self.labels, self.places, self.ids)
        )
        return Examples(self.name, inputs, labels, places, ids)

    @property
    def labelled(self) -> bool:
        """Whether any row has a label."""
        return any(label is not None for label in self.labels)


def read_table(
    path: Path | str,
    columns: Mapping[str, str],
    row: Callable[[Mapping[str, Any], str, Problems], tuple[Any, Any] | None],
    id_key: str | None = None,
    format: str | None = None,
) -> Examples:
    """Examples from CSV, TSV, JSON lines, Parquet or a dataset.

    Args:
        columns: that must be there, by the options that name them.
        row: from a record, its place and where problems are counted to (input, label); None leaves it out, which it has
            said.

    Raises:
        InputError: see `Records`; if no row is left.
    """
    records = Records(path, columns if id_key is None else {**columns, "--id-key": id_key}, format)
    examples = Examples(records.name, problems=Problems())
    for place, record in _read(records, examples.problems):
        found = row(record, place, examples.problems)
        if found is not None:
            examples.add(*found, place, None if id_key is None else record.get(id_key))
    if not examples.inputs:
        raise InputError(f"{records.name} has no row that can be used: {examples.problems}")
    return examples


def _read(records: Records, problems: Problems) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for place, record in records:
        if record is not None:
            yield records.where(place), record
    for reason, count in records.problems.counts.items():  # counts of what could not be read
        problems.update({reason.replace("taken as empty", "left out"): count}, {reason: records.problems.first[reason]})


def is_missing(value: Any) -> bool:
    """Whether a cell has nothing in it."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def name_of(value: Any) -> str:
    """A label as it is written; 1.0, which tables with empty cells make of 1, is 1."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()
