"""Texts to the entities in them, by any model for token classification.

Dimension key:  T tokens   W words   C classes
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.encoding import checked, is_text, is_words, naming_surrogates
from fastbert.inference.engine import Progress
from fastbert.inference.heads import HeadEngine
from fastbert.inference.windows import Bodies, Windower, Windows

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class Entity:
    """A piece of a text and what it is.

    Attributes:
        type: the label, without B- or I- but where nothing is aggregated.
        text: the piece.  start, end: where it stands, in characters.
        score: the mean probability of its words.
    """

    type: str
    text: str
    start: int
    end: int
    score: float


class Tagger(HeadEngine):
    """Entities in texts, as transformers' token-classification pipeline has them, but for long texts.

    A text that is longer than the model takes goes to it in windows that overlap. Each token is read in the window
    where it has more text around it, so that an entity is whole and found once, wherever windows end.

    Args:
        strategy: how tokens become entities: "simple" joins neighbours of a type; "first", "average" and "max" before
            that give all tokens of a word the label of its first one, of the mean of its probabilities, or of the
            likeliest; "none" is an entity a token.
        ignore: labels, or types, that are no entities.
        stride: tokens that windows of a long text have in common.
        given_words: in a list of words each is one word, whatever its tokens are; where the pipeline goes by tokens.
        join: whether neighbours of a type are one entity; else each word is its own.
        options: of `Engine`.

    Raises:
        InputError: if an option is out of range, the model has another head, or the tokenizer knows no offsets.
    """

    _auto = AutoModelForTokenClassification
    _head = "ForTokenClassification"
    _items = {"text": is_text, "list of words": is_words}  # noqa: RUF012

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strategy: str = "simple",
        ignore: Sequence[str] = ("O",),
        stride: int = 64,
        given_words: bool = False,
        join: bool = True,
        **options: Any,
    ) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}, but is {strategy!r}")
        if stride < 0:
            raise InputError(f"stride must be at least 0, but is {stride}")
        super().__init__(model, tokenizer, **options)
        self.strategy, self.ignore, self.stride = strategy, frozenset(ignore), stride
        self.given_words, self.join = given_words, join
        self._windower = Windower(tokenizer, pairs=False, types=self._takes_types, needed_by=type(self).__name__)
        self._is_continuing = _continuing(self._windower.backend)

    def predict(self, items: Iterable[str] | Iterable[Sequence[str]]) -> list[list[Entity]]:
        """The entities of each text, in order.

        Args:
            items: texts, or lists of words; of words, places are those in a text that has a blank between any two.

        Raises:
            InputError: naming an item that is neither.
        """
        return self.results(self.tokenize(items))

    def tokenize(self, items: Iterable[Any], progress: Progress | None = None) -> Windows:
        """Windows over all texts; see `predict` and `Engine.tokenize`."""
        listed = checked(items, self._items)
        with naming_surrogates(listed):
            encodings = self._encode(listed)
        bodies = Bodies.of(encodings)
        words = [
            None if isinstance(item, str) else np.cumsum([0, *(len(word) + 1 for word in item)]) for item in listed
        ]
        starts = bodies.lengths.cumsum() - bodies.lengths
        for i, before in enumerate(words):  # offsets are within each word
            if before is None:
                continue
            bodies.offsets[starts[i] : starts[i] + bodies.lengths[i]] += before[encodings[i].word_ids][:, None]
        texts = [item if isinstance(item, str) else " ".join(item) for item in listed]
        if progress is not None:
            progress(len(listed))
        unknown = self._unknown(bodies.ids)
        return self._windower.windows(texts, bodies, self.max_length, self.stride, unknown=unknown, words=words)

    def _encode(self, listed: Sequence[Any]) -> list[Any]:
        encodings: list[Any] = [None] * len(listed)
        for of_words in (False, True):
            rows = [i for i, item in enumerate(listed) if isinstance(item, str) != of_words]
            encoded = self._windower.backend.encode_batch(
                [listed[i] for i in rows], is_pretokenized=of_words, add_special_tokens=False
            )
            for i, encoding in zip(rows, encoded, strict=True):
                encodings[i] = encoding
        return encodings

    def results(self, tokens: Windows, progress: Progress | None = None) -> list[list[Entity]]:
        """As `predict`, of tokenised items; `progress` as in `Engine.gather`."""
        labels = self.labels
        text = np.repeat(tokens.text_of, tokens.lengths)[tokens.read]
        start, end = tokens.offsets[tokens.read].T
        number = self._given(tokens, text, start)
        inside = self._subwords(tokens, text, start)
        firsts = _begin(text) | ~np.where(number < 0, inside, ~_begin(number))
        probabilities_TC = self._probabilities(tokens, firsts, progress)
        label, score = _words(probabilities_TC, firsts, self.strategy)
        text, start, end = text[firsts], start[firsts], end[np.roll(firsts, -1)]
        number = number[firsts]
        types = labels
        if self.strategy != "none":
            tag = np.unique([name[2:] if name[:2] in ("B-", "I-") else name for name in labels], return_inverse=True)[1]
            begins = np.asarray([name.startswith("B-") or not self.join for name in labels])[label]
            apart = (number >= 0) & (number != np.roll(number, 1) + 1)  # words without a token are between
            firsts = _begin(text) | _begin(tag[label]) | begins | apart
            score = _means(score, firsts)
            text, label, start, end = text[firsts], label[firsts], start[firsts], end[np.roll(firsts, -1)]
            types = [name.split("-", 1)[-1] for name in labels]
        entities: list[list[Entity]] = [[] for _ in tokens.texts]
        for i, kind, a, b, p in zip(*(x.tolist() for x in (text, label, start, end, score)), strict=True):
            if types[kind] not in self.ignore:
                entities[i].append(Entity(types[kind], tokens.texts[i][a:b], a, b, p))
        return entities

    def _probabilities(
        self, tokens: Windows, firsts: npt.NDArray[np.bool_], progress: Progress | None
    ) -> npt.NDArray[np.float32]:
        """(T, C) of each token that is read. firsts: (T,) which of these begin a word."""
        return self.gather(
            tokens,
            len(self.labels),
            lambda batch: self.model(**batch.inputs()).logits[0].float().softmax(-1),
            progress,
            per_token=True,
        )[tokens.read]

    def _given(
        self, tokens: Windows, text: npt.NDArray[np.int64], start: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int64]:
        """(T,) which of the words that are given a token is of; -1 where tokens decide."""
        number = np.full(len(text), -1)
        if self.given_words and self.strategy not in ("none", "simple"):
            ends = np.searchsorted(text, np.arange(len(tokens.words) + 1))
            for i, before in enumerate(tokens.words):
                if before is not None:
                    some = slice(ends[i], ends[i + 1])
                    number[some] = np.searchsorted(before, start[some], side="right") - 1
        return number

    def _subwords(
        self, tokens: Windows, text: npt.NDArray[np.int64], start: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        """(T,) whether a token goes on with the word of the one before it; no matter, where nothing goes by words."""
        if self.strategy in ("none", "simple"):
            return np.zeros(len(text), bool)
        ids = tokens.ids[tokens.read]
        if self._is_continuing is not None:
            return self._is_continuing[ids]
        # Without a mark for that, a word begins at a blank or behind one, as all texts do: the first by index -1.
        blank: npt.NDArray[np.bool_] = np.frombuffer(
            " ".join([*tokens.texts, ""]).encode("utf-32-le"), np.uint32
        ) == ord(" ")
        lengths = np.asarray([len(t) + 1 for t in tokens.texts])
        at = (lengths.cumsum() - lengths)[text] + start
        unknown = ids == self.tokenizer.unk_token_id
        inside: npt.NDArray[np.bool_] = ~blank[at - 1] & ~blank[at] & ~unknown
        return inside


def _continuing(backend: Any) -> npt.NDArray[np.bool_] | None:
    """For each id, whether its token goes on with a word, as WordPiece marks it; None where nothing is marked."""
    prefix = getattr(backend.model, "continuing_subword_prefix", None)
    if not prefix:
        return None
    vocabulary = backend.get_vocab()
    continuing = np.zeros(max(vocabulary.values()) + 1, bool)
    continuing[[i for token, i in vocabulary.items() if token.startswith(prefix)]] = True
    return continuing


def _begin(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where a value is not the one before it."""
    return np.concatenate([np.ones(min(1, len(values)), bool), values[1:] != values[:-1]])


def _means(values: npt.NDArray[Any], firsts: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Of groups, which begin where `firsts` says so, along the first dimension."""
    places = np.flatnonzero(firsts)
    sums = np.add.reduceat(values, places) if len(places) else values
    counts = np.diff([*places, len(values)]).astype(np.float32)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def _words(
    probabilities_TC: npt.NDArray[np.float32], firsts: npt.NDArray[np.bool_], strategy: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """(W,) label and score of each word, which begins where `firsts` says so."""
    if strategy == "average":
        scores_WC = _means(probabilities_TC, firsts)
    elif strategy == "max":
        best = probabilities_TC.max(-1)
        # Sorted by words and scores: the first of a word is its likeliest token.
        order = np.lexsort((np.arange(len(best)), -best, firsts.cumsum()))
        scores_WC = probabilities_TC[order[firsts]]
    else:
        scores_WC = probabilities_TC[firsts]
    label = scores_WC.argmax(-1)
    return label, np.take_along_axis(scores_WC, label[:, None], -1)[:, 0]
