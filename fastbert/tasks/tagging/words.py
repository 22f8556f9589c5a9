"""Sentences of words to the tokens that a model for token classification reads.

Dimension key:  T tokens of all windows   N words of all sentences   M words that have tokens   W windows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.inference.encoding import flat, naming_surrogates
from fastbert.inference.windows import Bodies, Windower, Windows
from fastbert.tasks.features import Tokenizing

_CHUNK = 1024  # sentences tokenised at once


@dataclass(frozen=True, eq=False)
class Words:
    """Tokenised sentences, in windows where they are longer than the model takes.

    A word has its label, and its prediction, at its first token, in the one window where that is read.

    Attributes:
        tokens: windows; offsets are in words: (word, word + 1) of a word's first token, (word, word) of its others.
        lengths: words of each sentence.
    """

    tokens: Windows
    lengths: npt.NDArray[np.int64]

    @property
    def at(self) -> npt.NDArray[np.int64]:
        """(M,) where each word that has tokens is read, in order."""
        return firsts(self.tokens)

    @property
    def numbers(self) -> npt.NDArray[np.int64]:
        """(M,) which of the N words these are."""
        starts = self.lengths.cumsum() - self.lengths
        at = self.at
        numbers: npt.NDArray[np.int64] = starts[sentence_of(self.tokens)[at]] + self.tokens.offsets[at, 0]
        return numbers


def encode(sentences: Sequence[Sequence[str]], tokenizing: Tokenizing) -> Words:
    """Raises: InputError, if the tokenizer does not know which word a token is of."""
    windower = Windower(tokenizing.tokenizer, pairs=False, types=tokenizing.types, needed_by="a task of words")
    ids, offsets, counts = [], [], []
    for start in range(0, len(sentences), _CHUNK):
        some = [list(words) for words in sentences[start : start + _CHUNK]]
        with naming_surrogates(some, start):
            encodings = windower.backend.encode_batch(some, is_pretokenized=True, add_special_tokens=False)
        ids.append(flat((e.ids for e in encodings), np.int32))
        counts += [len(e.ids) for e in encodings]
        for encoding in encodings:
            offsets.append(_in_words(encoding))
    every = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    bodies = Bodies(every, np.concatenate([*offsets, np.zeros((0, 2), np.int32)]), np.asarray(counts, np.int64))
    unknown = tokenizing.tokenizer.unk_token_id
    tokens = windower.windows(
        [""] * len(sentences),
        bodies,
        tokenizing.max_length,
        tokenizing.doc_stride,
        unknown=0 if unknown is None else int((every == unknown).sum()),
    )
    return Words(tokens, np.asarray([len(words) for words in sentences], np.int64))


def tokenizer_of_words(loaded: Any) -> Any:
    """Byte-level ones begin every word with a blank, as they do inside a text."""
    backend = getattr(loaded, "backend_tokenizer", None)
    first: Any = getattr(backend, "pre_tokenizer", None)
    if hasattr(first, "add_prefix_space") and not first.add_prefix_space:
        first.add_prefix_space = loaded.add_prefix_space = True
        loaded.init_kwargs["add_prefix_space"] = True
    return loaded


def sentence_of(tokens: Windows) -> npt.NDArray[np.int64]:
    """(T,) which sentence a token is of."""
    return np.repeat(tokens.text_of, tokens.lengths)


def firsts(tokens: Windows) -> npt.NDArray[np.int64]:
    """(M,) places of the tokens that are read and are a word's first."""
    return np.flatnonzero(tokens.read & (tokens.offsets[:, 1] > tokens.offsets[:, 0]))


def _in_words(encoding: Any) -> npt.NDArray[np.int32]:
    word = np.asarray(encoding.word_ids, np.int32)
    begins = np.concatenate([np.ones(min(1, len(word)), bool), word[1:] != word[:-1]])
    return np.stack([word, word + begins], 1).astype(np.int32)
