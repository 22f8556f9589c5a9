"""Texts and pairs of texts to ids: by the tokenizers library directly, with what transformers' call does around it."""

import contextlib
import copy
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastbert.errors import InputError

Item = str | Sequence[str]  # a text, or a pair


def takes_types(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether token types go from this tokenizer to this model; RoBERTa's tokenizer makes none, DistilBERT has none."""
    known = inspect.signature(model.forward).parameters
    return "token_type_ids" in tokenizer.model_input_names and "token_type_ids" in known


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """A copy of a tokenizer's Rust backend, without truncation and padding; None where it does not decide alone.

    A copy, for its settings are those of whoever asked last: threads, and calls of the tokenizer itself, would cut each
    other's texts.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    for method in ("__call__", "_encode_plus"):  # a tokenizer may do something of its own there
        if getattr(type(tokenizer), method) is not getattr(PreTrainedTokenizerFast, method):
            return None
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


@dataclass(frozen=True, eq=False)
class Encoded:
    """Some items end to end: (T,) ids and token types, (B,) lengths, and how many items were cut."""

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.int8] | None
    lengths: npt.NDArray[np.int64]
    cut: int


class Encoder:
    """A tokenizer that cuts at `max_length`, the longer text of a pair first; threads may share it.

    Args:
        max_length: tokens, special ones included.
        types: whether token types are wanted.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, types: bool) -> None:
        self.max_length = max_length
        self._tokenizer, self._types, self._backend = tokenizer, types, backend_of(tokenizer)
        self._types_of_texts = False  # whether single texts too have types that are not all 0
        if self._backend is not None:
            self._types_of_texts = types and any(self._backend.encode("a").type_ids)
            self._backend.enable_truncation(max_length, direction=tokenizer.truncation_side)

    def __call__(self, items: Sequence[Item]) -> Encoded:
        """Ids as transformers gives them. Raises: TypeError, if an item is no text and no pair."""
        if self._backend is None:
            return self._by_transformers(items)
        if len(items) == 1:  # a batch would wake up the library's threads: 0.1 ms
            encodings = [self._backend.encode(*((items[0],) if isinstance(items[0], str) else items[0]))]
        else:
            encodings = self._backend.encode_batch_fast(items)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        types = None
        if self._types and (self._types_of_texts or not all(isinstance(item, str) for item in items)):
            types = flat((e.type_ids for e in encodings), np.int8)
        cut = sum(bool(encodings[i].overflowing) for i in np.flatnonzero(lengths == self.max_length))
        return Encoded(flat((e.ids for e in encodings), np.int32), types, lengths, cut)

    def _by_transformers(self, items: Sequence[Item]) -> Encoded:
        def call(item: Item, **options: Any) -> Any:
            texts = [[text] for text in ((item,) if isinstance(item, str) else item)]
            return self._tokenizer(*texts, return_attention_mask=False, verbose=False, **options)

        rows = [
            call(item, truncation=True, max_length=self.max_length, return_token_type_ids=self._types) for item in items
        ]
        ids = [row["input_ids"][0] for row in rows]
        at_end = (item for item, row in zip(items, ids, strict=True) if len(row) == self.max_length)
        cut = sum(len(call(item, truncation=False)["input_ids"][0]) > self.max_length for item in at_end)
        types = flat((row["token_type_ids"][0] for row in rows), np.int8) if self._types else None
        return Encoded(flat(ids, np.int32), types, np.asarray([*map(len, ids)], np.int64), cut)


def flat(rows: Iterable[Iterable[Any]], dtype: Any) -> npt.NDArray[Any]:
    """Rows end to end."""
    return np.fromiter(chain.from_iterable(rows), dtype)


def joined(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    """Arrays end to end, perhaps none."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def is_text(item: Any) -> bool:
    return isinstance(item, str)


def is_words(item: Any) -> bool:
    return isinstance(item, tuple | list) and all(isinstance(word, str) for word in item)


def is_pair(item: Any) -> bool:
    return is_words(item) and len(item) == 2


def checked(items: Iterable[Any], kinds: dict[str, Callable[[Any], bool]]) -> list[Any]:
    """Items as a list.

    Args:
        kinds: what an item may be: its name, and whether something is one.

    Raises:
        InputError: naming the first that is none; if `items` is a single string, or nothing to go through.
    """
    names = " or a ".join(kinds)
    if isinstance(items, str) or not isinstance(items, Iterable):
        given = "one string" if isinstance(items, str) else reprlib.repr(items)
        raise InputError(f"{given} is given where a list is needed, each item of it a {names}")
    listed = list(items)
    for i, item in enumerate(listed):
        if not any(is_one(item) for is_one in kinds.values()):
            raise InputError(f"item {i} must be a {names}, but is {reprlib.repr(item)}")
    return listed


@contextlib.contextmanager
def naming_surrogates(items: Sequence[Item], start: int = 0) -> Iterator[None]:
    """Raises: InputError, naming the item, counted from `start`, that no encoding of Unicode can hold."""
    try:
        yield
    except (TypeError, UnicodeEncodeError):  # the tokenizers library says no more than that a type is wrong
        for i, item in enumerate(items, start):
            try:
                "".join(item).encode()
            except UnicodeEncodeError as error:
                raise InputError(f"item {i} is no valid Unicode: it has half of a surrogate pair") from error
        raise
