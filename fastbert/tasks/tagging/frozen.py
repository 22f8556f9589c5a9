"""A BiLSTM over what a frozen encoder makes of words: BERT's feature-based approach.

    x = h_0, h_L-1 or h_L, or [h_L-3 ... h_L], or g * sum_k softmax(w)_k h_k, at each word's first token
    tag = argmax(W BiLSTM(BiLSTM(x)) + b)

Source: https://arxiv.org/abs/1810.04805, section 5.3 and table 7; the weighted sum, whose w and g are learnt:
https://arxiv.org/abs/1802.05365, equation 1.

Dimension key:  T tokens   M words that have tokens   K layers that are kept   D hidden size   C classes   I sentences
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from transformers import AutoConfig, AutoModel

import fastbert
from fastbert.data.store import write_json
from fastbert.errors import InputError
from fastbert.inference.engine import Engine
from fastbert.inference.loading import load_model
from fastbert.inference.windows import Windows
from fastbert.tasks.scores import Scores
from fastbert.tasks.tagging.words import firsts, sentence_of
from fastbert.tasks.task import Judge, Recipe, head_of, labels_of

FEATURES = ("embeddings", "second-to-last", "last", "weighted-sum", "last-4-sum", "last-4-concat")
RECIPE = Recipe(epochs=10, learning_rate=1e-3, max_length=None)  # ours: the paper says nothing of it
BYTES = 2  # of a number that is kept: float16
_SIZE = 768  # of the BiLSTM, both directions together
_LAYERS = 2
_WEIGHTS, _ABOUT = "bilstm.safetensors", "frozen.json"
_SENTENCES = 256  # tagged at once


def layers_of(features: str, config: Any) -> list[int]:
    """Which hidden states are kept; 0 are the embeddings.

    Raises:
        InputError: if there are no such features, or the encoder has too few layers.
    """
    if features not in FEATURES:
        raise InputError(f"--features must be one of {', '.join(FEATURES)}, but is {features!r}")
    count = int(config.num_hidden_layers)
    if features.startswith("last-4") and count < 4:
        raise InputError(f"--features {features}: the encoder has {count} layers")
    every = list(range(1, count + 1))
    return {
        "embeddings": [0],
        "second-to-last": [count - 1],
        "last": every[-1:],
        "weighted-sum": every,
    }.get(features, every[-4:])


@dataclass(frozen=True, eq=False)
class Vectors:
    """What the encoder makes of the words of some sentences.

    Attributes:
        values: (M, K, D) float16.
        at: (M,) where each of the words is read among the tokens.
        lengths: (I,) how many of these words a sentence has.
    """

    values: npt.NDArray[np.float16]
    at: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def of(self, sentences: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], list[int]]:
        """Where the words of these sentences are, one after the other, and how many each has; without empty ones."""
        ends = self.lengths.cumsum()
        some = sentences[self.lengths[sentences] > 0]
        rows = [np.arange(ends[i] - self.lengths[i], ends[i]) for i in some]
        return np.concatenate([*rows, np.zeros(0, np.int64)]), self.lengths[some].tolist()


@torch.inference_mode()
def vectors(
    engine: Engine,
    tokens: Windows,
    layers: list[int],
    progress: Callable[[int], None] = lambda count: None,
    at: npt.NDArray[np.int64] | None = None,
) -> Vectors:
    """Of the engine's model, a bare encoder.

    Args:
        at: (M,) where each word is read; None for `words.firsts`.

    Raises:
        InputError: if they are out of float16's range.
    """
    at = firsts(tokens) if at is None else at
    number = np.full(len(tokens.ids), -1)
    number[at] = np.arange(len(at))
    values = np.zeros((len(at), len(layers), engine.model.config.hidden_size), np.float16)
    for batch in engine.batches(tokens):
        words = number[tokens.places(batch.rows)[0]]
        here = np.flatnonzero(words >= 0)
        states = engine.model(**batch.inputs(), output_hidden_states=True).hidden_states
        chosen = torch.from_numpy(here).to(states[0].device)
        values[words[here]] = torch.stack([states[i][0][chosen] for i in layers], 1).half().cpu().numpy()
        progress(batch.tokens)
    if not np.isfinite(values).all():
        raise InputError("the encoder's hidden states are not finite in float16")
    lengths = np.bincount(sentence_of(tokens)[at], minlength=len(tokens.texts)).astype(np.int64)
    return Vectors(values, at, lengths)


@dataclass(frozen=True)
class About:
    """What a BiLSTM is made of.

    Attributes:
        encoder: a checkpoint's directory, or its name on the Hugging Face hub.
    """

    encoder: str
    features: str
    labels: list[str]
    kept: int
    hidden: int
    size: int = _SIZE
    layers: int = _LAYERS


class WordLSTM(nn.Module):
    """From vectors of words to logits of their tags."""

    def __init__(self, about: About, dropout: float = 0.0) -> None:
        super().__init__()
        self.about = about
        self.sums = about.features in ("weighted-sum", "last-4-sum")
        if self.sums:
            self.weights = nn.Parameter(torch.zeros(about.kept))
            self.scale = nn.Parameter(torch.ones(()))
        width = about.hidden * (1 if self.sums else about.kept)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(width, about.size // 2, about.layers, bidirectional=True, dropout=dropout)
        self.classifier = nn.Linear(about.size, len(about.labels))

    def forward(self, vectors_MKD: Tensor, lengths: list[int]) -> Tensor:
        """(M, C). Args: lengths: words of each sentence, which stand one after the other; none is 0."""
        if self.sums:
            inputs_MX = self.scale * torch.einsum("k,mkd->md", self.weights.softmax(0), vectors_MKD)
        else:
            inputs_MX = vectors_MKD.flatten(1)
        packing = pack_sequence(list(torch.arange(len(inputs_MX)).split(lengths)), enforce_sorted=False)
        order = packing.data.to(inputs_MX.device)  # step by step: the first words of all sentences, then the second
        packed = PackedSequence(self.dropout(inputs_MX)[order], packing.batch_sizes)
        states = self.lstm(packed)[0].data
        logits_MC: Tensor = self.classifier(self.dropout(states))
        return torch.empty_like(logits_MC).index_copy(0, order, logits_MC)

    def save(self, folder: Path) -> None:
        """Raises: InputError, if it cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: t.cpu().contiguous() for name, t in self.state_dict().items()}, folder / _WEIGHTS)
            write_json(folder / _ABOUT, asdict(self.about))
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write {folder}: {error}") from error

    @classmethod
    def load(cls, folder: Path) -> "WordLSTM":
        """Raises: InputError, if it is damaged."""
        try:
            model = cls(About(**json.loads((folder / _ABOUT).read_text(encoding="utf-8"))))
            model.load_state_dict(load_file(folder / _WEIGHTS))
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{folder} has no BiLSTM that can be read: {error}") from error
        return model.eval()


def is_frozen(folder: str) -> bool:
    """Whether a BiLSTM was saved there."""
    return (Path(folder) / _ABOUT).is_file()


def encoder_of(name: str, device: torch.device) -> Any:
    """The encoder alone, patched. Raises: InputError, see `load_model`."""
    model: Any = fastbert.patch(load_model(AutoModel, name))
    return model.to(device)


def config_of(about: About) -> Any:
    """The encoder's configuration with the tags as its labels."""
    head = head_of(about.labels, "single_label_classification")
    del head["num_labels"]  # as many as there are names
    return AutoConfig.from_pretrained(about.encoder, **head)


def scored(model: WordLSTM, judge: Judge, read: Vectors) -> Scores:
    """How well it does, of what the encoder made of the judge's words."""
    logits_TC = np.zeros((len(judge.tokens.ids), judge.width), np.float32)
    logits_TC[read.at] = logits(model, read)
    return judge.score(logits_TC)


@torch.inference_mode()
def logits(model: WordLSTM, read: Vectors) -> npt.NDArray[np.float32]:
    """(M, C), of each word."""
    model.eval()
    device = model.classifier.weight.device
    logits_MC = np.zeros((len(read.at), len(model.about.labels)), np.float32)
    longest_first = np.argsort(-read.lengths, kind="stable")
    for start in range(0, len(longest_first), _SENTENCES):
        rows, lengths = read.of(longest_first[start : start + _SENTENCES])
        if lengths:
            values = torch.from_numpy(read.values[rows]).to(device).float()
            logits_MC[rows] = model(values, lengths).cpu().numpy()
    return logits_MC


def evaluated(
    model: WordLSTM, engine: Engine, judge: Judge, progress: Callable[[int], None] = lambda count: None
) -> Scores:
    """How well it does, with its encoder."""
    assert isinstance(judge.tokens, Windows)
    layers = layers_of(model.about.features, engine.model.config)
    return scored(model, judge, vectors(engine, judge.tokens, layers, progress))


def about_of(encoder: str, features: str, config: Any) -> About:
    """Args: config: of the encoder, with the tags as its labels."""
    place = str(Path(encoder).resolve()) if Path(encoder).is_dir() else encoder
    kept = len(layers_of(features, config))
    return About(place, features, labels_of(config), kept, int(config.hidden_size))
