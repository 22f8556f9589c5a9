"""Token stores in memory, for tests of what is made from them."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastbert.data.store import SpecialTokens

VOCABULARY = 500
SPECIAL = SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4, all=(0, 1, 2, 3, 4))


@dataclass
class MemoryPart:
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    sentences: npt.NDArray[np.uint32]
    documents: npt.NDArray[np.uint32]


@dataclass
class MemoryStore:
    """What PretrainingBatches reads of a Store."""

    parts: list[MemoryPart]
    vocab_size: int = VOCABULARY
    special: SpecialTokens = SPECIAL
    continuations: npt.NDArray[np.bool_] = field(default_factory=lambda: np.arange(VOCABULARY) >= 400)
    path: Path = Path("memory")

    @property
    def documents(self) -> int:
        return sum(len(part.documents) - 1 for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(len(part.tokens) for part in self.parts)


def part_of(documents: list[list[list[int]]], dtype: type = np.uint16) -> MemoryPart:
    """From documents of sentences of token ids."""
    sentences = [sentence for document in documents for sentence in document]
    return MemoryPart(
        np.array([token for sentence in sentences for token in sentence], dtype),
        np.cumsum([0, *map(len, sentences)]).astype(np.uint32),
        np.cumsum([0, *map(len, documents)]).astype(np.uint32),
    )


def random_store(
    documents: int = 200,
    *,
    parts: int = 3,
    sentences: int = 12,
    tokens: int = 40,
    seed: int = 0,
    dtype: type = np.uint16,
) -> MemoryStore:
    """Documents of 1 to `sentences` sentences of 1 to `tokens` tokens."""
    generator = np.random.default_rng(seed)

    def document() -> list[list[int]]:
        return [
            generator.integers(5, VOCABULARY, generator.integers(1, tokens + 1)).tolist()
            for _ in range(generator.integers(1, sentences + 1))
        ]

    made = [document() for _ in range(documents)]
    bounds = np.linspace(0, documents, parts + 1).astype(int)
    return MemoryStore([part_of(made[a:b], dtype) for a, b in pairwise(bounds)])


def numbered_store(lengths: list[list[int]]) -> MemoryStore:
    """Every token of the corpus is another id: what a sequence holds says where it comes from.

    lengths: tokens of each sentence of each document.
    """
    next_id = len(SPECIAL.all)
    made = []
    for document in lengths:
        made.append([])
        for n in document:
            made[-1].append(list(range(next_id, next_id + n)))
            next_id += n
    return MemoryStore([part_of(made, np.uint32)], vocab_size=next_id, continuations=np.zeros(next_id, np.bool_))
