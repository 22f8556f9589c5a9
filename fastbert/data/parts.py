"""A part of a token store from its documents: what a process that tokenises does."""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fastbert.data import store
from fastbert.data.documents import Document, Problems
from fastbert.data.drafts import Drafts
from fastbert.data.markdown import markdown_documents
from fastbert.data.sentences import split

_SENTENCES_A_CALL = 2048

_drafts: list[Drafts]
_held_out: float | None
_language: str
_special: dict[str, Any]
_tokenizer: Tokenizer


def begin_worker(
    folders: Sequence[str], key: str, language: str, special: dict[str, Any], held_out: float | None
) -> None:
    global _drafts, _held_out, _language, _special, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the parent has one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _drafts = [Drafts(Path(folder), key) for folder in folders]
    _held_out, _language, _special = held_out, language, special
    _tokenizer = Tokenizer.from_file(str(_drafts[0].folder / store.TOKENIZER))
    _tokenizer.no_truncation()
    _tokenizer.no_padding()
    _tokenizer.encode_special_tokens = True  # "[MASK]" in a text is three tokens


def _end_with(sentinel: int) -> None:
    """A worker whose parent was killed ends, too."""
    connection.wait([sentinel])
    os._exit(1)


@dataclass
class _Sentences:
    """Of the documents of one store: texts, and after how many of them and where each document is."""

    texts: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    places: list[str] = field(default_factory=list)


def write_part(name: str, documents: Sequence[Document], expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokenise a part, and write it, and what is held out of it. Returns the part.json of each store."""
    problems = Problems()
    sides = [_Sentences() for _ in _drafts]
    for document in documents:
        for place, texts in flatten(document, problems):
            side = sides[_held_out is not None and is_held_out(texts, _held_out)]
            if document.kind == "sentences":
                side.texts += texts
            else:
                side.texts += [sentence for text in texts for sentence in split(text, _language)]
            side.ends.append(len(side.texts))
            side.places.append(place)
    arrays = [_arrays(side, problems) for side in sides]
    # What is left out of the text is said once.
    told = [problems, *(Problems() for _ in sides[1:])]
    return [_write(*each, name, expected) for each in zip(_drafts, arrays, told, strict=True)]


def is_held_out(texts: Sequence[str], share: float) -> bool:
    """By what the document says, wherever its lines end: a copy of it is on the same side."""
    words = " ".join(word for text in texts for word in text.split())
    digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _arrays(side: _Sentences, problems: Problems) -> dict[str, npt.NDArray[Any]]:
    tokens, lengths = _encode(side.texts, problems)
    whole = lengths > 0
    sentences_before = np.concatenate([[0], np.cumsum(whole)])[[0, *side.ends]]
    for place, count in zip(side.places, np.diff(sentences_before), strict=True):
        if count == 0:
            problems.add("a document without a token", place)
    return {
        "tokens": tokens,
        "sentences": np.concatenate([[0], np.cumsum(lengths[whole])]).astype(np.uint32),
        "documents": np.unique(sentences_before).astype(np.uint32),
    }


def _write(
    drafts: Drafts, arrays: dict[str, npt.NDArray[Any]], problems: Problems, name: str, expected: dict[str, Any]
) -> dict[str, Any]:
    with drafts.directory(name) as folder:
        for kind, array in arrays.items():
            with (folder / f"{kind}.npy").open("wb") as file:
                file.write(store.header(array.dtype.name, len(array)))
                file.write(array.tobytes())
        content = {
            **expected,
            "name": name,
            "lengths": {kind: len(array) for kind, array in arrays.items()},
            "dtypes": {kind: array.dtype.name for kind, array in arrays.items()},
            "crc32": {kind: store.crc32(folder / f"{kind}.npy") for kind in arrays},
            "unknown": int((arrays["tokens"] == _special["unk"]).sum()),
            "left_out": dict(sorted(problems.counts.items())),
            "problems": dict(sorted(problems.first.items())),
        }
        (folder / store.PART).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return content


def flatten(document: Document, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """Where each document starts, and its texts."""
    found = markdown_documents(document, problems) if document.kind == "markdown" else [document]
    for each in found:
        yield each.where, each.texts


def _encode(sentences: Sequence[str], problems: Problems) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """The tokens of all sentences, one after the other, and how many each has."""
    size = _tokenizer.get_vocab_size(with_added_tokens=True)
    dtype = np.uint16 if size <= 1 << 16 else np.uint32
    tokens, lengths = [np.zeros(0, dtype)], [np.zeros(0, np.int64)]
    for start in range(0, len(sentences), _SENTENCES_A_CALL):
        encoded = _tokenizer.encode_batch_fast(sentences[start : start + _SENTENCES_A_CALL], add_special_tokens=False)
        ids = [encoding.ids for encoding in encoded]
        tokens.append(np.fromiter(chain.from_iterable(ids), dtype))
        lengths.append(np.array([len(sentence) for sentence in ids]))
    joined, counts = np.concatenate(tokens), np.concatenate(lengths)
    # A SentencePiece model may know the names of its special tokens as pieces.
    special = np.isin(joined, [token for token in _special["all"] if token != _special["unk"]])
    if special.any():
        problems.update({"a special token's name in the text": int(special.sum())}, {})
        counts = np.bincount(np.repeat(np.arange(len(counts)), counts)[~special], minlength=len(counts))
        joined = joined[~special]
    return joined, counts
