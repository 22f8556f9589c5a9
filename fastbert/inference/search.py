"""The rows of a corpus that are nearest to queries, each compared with each: what a vector database is measured by.

Dimension key:  Q queries   B rows   N vector size
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastbert.errors import InputError, require
from fastbert.inference.formats import MODEL

_BLOCK = 8192  # rows
Block: TypeAlias = tuple[npt.NDArray[np.float32], Callable[[int], tuple[Any, str | None]]]


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: the row's, or its number.  text: None where the corpus has vectors alone.
    """

    score: float
    id: Any
    text: str | None


class Nearest:
    """The nearest rows to each query, of a corpus that comes some rows at a time.

    Args:
        queries_QN: their vectors.
        k: how many rows, at least 1.
        similarity: of (Q, N) and (B, N) to (Q, B), higher for what is closer.

    Attributes:
        hits: for each query, best first; of rows that are as close, the first.
    """

    def __init__(
        self,
        queries_QN: npt.NDArray[np.float32],
        k: int,
        similarity: Callable[[npt.NDArray[np.float32], npt.NDArray[np.float32]], npt.NDArray[np.float32]],
    ) -> None:
        self._queries_QN, self._k, self._similarity = queries_QN, k, similarity
        self.hits: list[list[Hit]] = [[] for _ in queries_QN]

    def add(self, vectors_BN: npt.NDArray[np.float32], row: Callable[[int], tuple[Any, str | None]]) -> None:
        """Some more of the corpus.

        Args:
            row: id and text of one of these, by its place among them.
        """
        scores_QB = self._similarity(self._queries_QN, vectors_BN)
        for query, scores_B in enumerate(scores_QB):
            best = np.argsort(-scores_B, kind="stable")[: self._k]
            found = [Hit(float(scores_B[i]), *row(int(i))) for i in best if self._is_among(query, scores_B[i])]
            self.hits[query] = sorted([*self.hits[query], *found], key=lambda hit: -hit.score)[: self._k]

    def _is_among(self, query: int, score: np.float32) -> bool:
        return len(self.hits[query]) < self._k or float(score) > self.hits[query][-1].score


@dataclass(frozen=True)
class Vectors:
    """A corpus that `fastbert embed` wrote.

    Attributes:
        size: N.
        model: the fingerprint of what made them; None where the file does not say it.
        blocks: (B, N) float32, some rows at a time, and id and text of each of them, by its place.
    """

    size: int
    model: str | None
    blocks: Iterator[Block]


def read_vectors(path: Path) -> Vectors | None:
    """Of a .npy, or a .parquet with a column "vector"; None where that is no such file.

    Raises:
        InputError: if it cannot be read, or its vectors are none.
    """
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".parquet"):
        return None
    try:
        return _of_array(path) if suffix == ".npy" else _of_parquet(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # which Arrow's errors are
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"cannot read {path}: {reason}") from error


def _of_array(path: Path) -> Vectors:
    array = np.load(path, mmap_mode="r")
    if array.ndim != 2 or array.dtype.kind != "f":
        raise InputError(f"{path} has {array.dtype} of shape {array.shape}, but rows of vectors are wanted")

    def blocks() -> Iterator[Block]:
        for start in range(0, len(array), _BLOCK):
            yield (
                np.array(array[start : start + _BLOCK], np.float32),
                lambda place, start=start: (start + place, None),  # type: ignore[misc]
            )

    return Vectors(array.shape[1], None, blocks())


def _of_parquet(path: Path) -> Vectors | None:
    require("pyarrow", to="read Parquet")
    import pyarrow as pa
    from pyarrow import parquet

    schema = parquet.read_schema(path)
    if "vector" not in schema.names:
        return None
    kind = schema.field("vector").type
    if not pa.types.is_fixed_size_list(kind):
        raise InputError(f"{path} has a column 'vector' of {kind}, but lists of a fixed size are wanted")

    def blocks() -> Iterator[Block]:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("id", "text", "vector") if name in schema.names]
            start = 0
            for batch in file.iter_batches(_BLOCK, columns=columns):
                vectors = batch["vector"].flatten().to_numpy(zero_copy_only=False)

                def row(place: int, batch: Any = batch, start: int = start) -> tuple[Any, str | None]:
                    number = batch["id"][place].as_py() if "id" in columns else start + place
                    return number, batch["text"][place].as_py() if "text" in columns else None

                yield vectors.astype(np.float32).reshape(-1, kind.list_size), row
                start += len(batch)

    model = (schema.metadata or {}).get(MODEL.encode())
    return Vectors(kind.list_size, model.decode() if model else None, blocks())
