"""A part of a token store from its documents: what a process that tokenises does."""

import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from itertools import chain
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fastbert.data import store
from fastbert.data.drafts import Drafts
from fastbert.data.readers import Document, Problems, markdown_documents
from fastbert.data.sentences import split

_SENTENCES_A_CALL = 2048

_drafts: Drafts
_language: str
_special: dict[str, Any]
_tokenizer: Tokenizer


def begin_worker(output: str, key: str, language: str, special: dict[str, Any]) -> None:
    global _drafts, _language, _special, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: the parent has one
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _drafts, _language, _special = Drafts(Path(output), key), language, special
    _tokenizer = Tokenizer.from_file(str(_drafts.folder / store.TOKENIZER))
    _tokenizer.no_truncation()
    _tokenizer.no_padding()
    _tokenizer.encode_special_tokens = True  # "[MASK]" in a text is three tokens


def _end_with(sentinel: int) -> None:
    """A worker whose parent was killed ends, too."""
    connection.wait([sentinel])
    os._exit(1)


def write_part(name: str, documents: Sequence[Document], expected: dict[str, Any]) -> dict[str, Any]:
    """Tokenise a part, and write it. Returns its part.json."""
    problems = Problems()
    sentences: list[str] = []
    ends: list[int] = []
    places: list[str] = []
    for document in documents:
        for place, texts in flatten(document, problems):
            if document.kind == "sentences":
                sentences += texts
            else:
                sentences += [sentence for text in texts for sentence in split(text, _language)]
            ends.append(len(sentences))
            places.append(place)
    tokens, lengths = _encode(sentences, problems)
    whole = lengths > 0
    sentences_before = np.concatenate([[0], np.cumsum(whole)])[[0, *ends]]
    for place, count in zip(places, np.diff(sentences_before), strict=True):
        if count == 0:
            problems.add("a document without a token", place)
    arrays = {
        "tokens": tokens,
        "sentences": np.concatenate([[0], np.cumsum(lengths[whole])]).astype(np.uint32),
        "documents": np.unique(sentences_before).astype(np.uint32),
    }
    with _drafts.directory(name) as folder:
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
            "unknown": int((tokens == _special["unk"]).sum()),
            "left_out": dict(sorted(problems.counts.items())),
            "problems": dict(sorted(problems.first.items())),
        }
        (folder / store.PART).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return content


def flatten(document: Document, problems: Problems) -> Iterator[tuple[str, list[str]]]:
    """Where each document starts, and its texts."""
    found = markdown_documents(document, problems) if document.kind == "markdown" else [document]
    for each in found:
        yield f"{each.file}, line {each.line}", each.texts


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
