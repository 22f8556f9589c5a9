"""Tokenised texts, end to end, and batches of them by a token budget.

Dimension key:  B texts   T tokens
"""

from collections.abc import Iterator
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
        flat = np.repeat(self.starts[rows] - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
        return flat, cu_seqlens.astype(np.int32)


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
