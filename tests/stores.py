"""Token stores on disk, for tests of how they are made and read, and a disk that is full."""

import contextlib
import json
import resource
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fastbert.data import sources
from fastbert.data.building import Prepared
from fastbert.data.documents import Problems
from fastbert.data.markdown import markdown_documents
from fastbert.data.prepare import prepare
from fastbert.data.readers import Reader
from fastbert.data.sources import File, Source
from fastbert.data.store import Store
from fastbert.data.vocabulary import load_tokenizer

FABLES = Path(__file__).parents[1] / "fastbert/assets/fables.jsonl"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?-'\"()[]"


def fables() -> list[dict[str, str]]:
    return [json.loads(line) for line in FABLES.read_text(encoding="utf-8").splitlines()]


def write_vocabulary(path: Path, words: list[str] | None = None) -> Path:
    """A vocab.txt of some words, or of letters and a few common words."""
    if words is None:
        words = [*LETTERS, *(f"##{letter}" for letter in LETTERS[:36]), "the", "and", "fox", "lion", "said", "##ing"]
    path.write_text("".join(f"{word}\n" for word in [*SPECIAL, *words]), encoding="utf-8")
    return path


def make_store(files: list[Path], output: Path, vocabulary: Path, **options: Any) -> Prepared:
    """`prepare` with parts of some documents each; or skip."""
    pytest.importorskip("sentencex")
    options = {"reader": Reader(), "part_characters": 4000} | options
    prepared = prepare(files, output, lambda: load_tokenizer(str(vocabulary)), asked={}, **options)
    assert prepared is not None
    return prepared


def read_documents(given: Path | Source, **options: Any) -> tuple[list[list[str]], list[int], dict[str, list[str]]]:
    """Texts of each document, the line or row where each starts, and problems."""
    source = File.of(given) if isinstance(given, Path) else given
    problems = Problems()
    reader = Reader(**options)
    reader.check(source)
    found = []
    for document in reader.read(source, sources.names([source])[0], problems):
        found += list(markdown_documents(document, problems)) if document.kind == "markdown" else [document]
    return [document.texts for document in found], [document.line for document in found], problems.first


def content(store: Path) -> dict[str, bytes]:
    """All files of a store, hidden ones too, but not those that name its shards."""
    files = (file for file in store.rglob("*") if file.is_file() and not file.name.startswith("shard-"))
    return {str(file.relative_to(store)): file.read_bytes() for file in files}


@contextlib.contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file can get longer than that: what a disk without room looks like to who writes."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


def faulty_texts(folder: Path) -> list[Path]:
    """A file of each kind, with a fault in each."""
    lines = FABLES.read_text(encoding="utf-8").splitlines()
    (folder / "a.jsonl").write_text("\n".join([*lines[:30], "not JSON", *lines[30:], '{"text": ""}']))
    stories = "\n\n".join(fable["text"].replace(". ", ".\n") for fable in fables())
    (folder / "b.txt").write_bytes(stories.encode() + b"\n\n\xff\n\n\x01\n")
    chapters = "".join(f"## {fable['title']}\n\n*{fable['text']}*\n\n" for fable in fables())
    (folder / "c.md").write_text(chapters + "# Code\n\n    no text\n")
    return sorted(folder.iterdir())


def documents(store: Store) -> list[list[list[int]]]:
    """Ids of each sentence of each document."""
    found = []
    for part in store.parts:
        for first, end in pairwise(part.documents):
            bounds = part.sentences[first : end + 1]
            found.append([part.tokens[a:b].tolist() for a, b in pairwise(bounds)])
    return found


def decoded(store: Path) -> list[list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(store)
    found = documents(Store.open(store))
    return [[" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in document] for document in found]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path
