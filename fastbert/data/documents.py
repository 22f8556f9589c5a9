"""A document as it came, and what was left out on the way."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from fastbert.errors import InputError

_KEPT_PER_REASON = 10


@dataclass(frozen=True)
class Document:
    """A document as it came.

    Attributes:
        kind: what the texts are. "markdown" is source, of one document or of several.
        file, line: where it starts.  unit: what `line` counts.
    """

    kind: Literal["paragraphs", "sentences", "markdown"]
    texts: list[str]
    file: str
    line: int
    unit: Literal["line", "row"] = "line"

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))

    @property
    def where(self) -> str:
        return f"{self.file}, {self.unit} {self.line}"


@dataclass
class Problems:
    """What was left out, by reason, and where the first of each reason was.

    Attributes:
        strict: nothing may be left out: the first raises an InputError.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)
    strict: bool = False

    def add(self, reason: str, where: str) -> None:
        self.update({reason: 1}, {reason: [where]})

    def update(self, counts: dict[str, int], first: dict[str, list[str]]) -> None:
        """Add those of what comes later in the text."""
        if self.strict and counts:
            reason = next(iter(counts))
            where = "".join(f"{place}: " for place in first.get(reason, [])[:1])
            raise InputError(f"{where}{reason}; without --strict, that is counted and left out")
        self.counts.update(counts)
        for reason, places in first.items():
            kept = self.first.setdefault(reason, [])
            kept += places[: _KEPT_PER_REASON - len(kept)]

    def __str__(self) -> str:
        return ", ".join(f"{count:,} x {reason}" for reason, count in sorted(self.counts.items()))
