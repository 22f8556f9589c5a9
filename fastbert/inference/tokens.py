"""Tokenised texts, end to end, and batches of them by a token budget.

Dimension key:  B texts   T tokens
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts, or pairs of texts, end to end.

    Attributes:
        ids: (T,) int32.  lengths: (B,) int64, tokens of each.
        unknown: how many tokens are the unknown one.
        types: (T,) int8, the token types of pairs; None where all are 0.
        cut: how many were longer than they may be.
        prompt: how many at the head of each belong to a prompt that takes no part in pooling.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    unknown: int = 0
    types: npt.NDArray[np.int8] | None = None
    cut: int = 0
    prompt: int = 0

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """(B,) where each begins."""
        return self.lengths.cumsum() - self.lengths

    def places(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """Where the tokens of these texts are, one text after the other, and where each text begins there, and T."""
        lengths = self.lengths[rows]
        cu_seqlens = np.concatenate([[0], lengths.cumsum()])
        return ranges(self.starts[rows], lengths), cu_seqlens.astype(np.int32)

    def select(self, rows: npt.NDArray[np.int64]) -> "Tokens":
        """These texts alone, in this order; nothing is counted again."""
        flat, _ = self.places(rows)
        types = None if self.types is None else self.types[flat]
        return Tokens(self.ids[flat], self.lengths[rows], types=types, prompt=self.prompt)


def ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """start, start + 1, ... of each of these, `length` numbers, one after the other."""
    firsts = starts + lengths - np.cumsum(lengths, dtype=np.int64)
    return np.repeat(firsts, lengths) + np.arange(int(lengths.sum()), dtype=np.int64)


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The texts of all parts, one after the other; the parts have the same `prompt`."""
    if len(parts) == 1:
        return parts[0]
    types = None
    if any(part.types is not None for part in parts):
        types = np.concatenate([np.zeros(len(p.ids), np.int8) if p.types is None else p.types for p in parts])
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        sum(part.unknown for part in parts),
        types,
        sum(part.cut for part in parts),
        parts[0].prompt,
    )


def by_budget(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of batches with at most `budget` tokens each, but at least one text; longest first, empty ones left out."""
    order = np.argsort(-lengths, kind="stable")
    order = order[lengths[order] > 0]
    ends = lengths[order].cumsum()
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield order[start:end]
        start = end
