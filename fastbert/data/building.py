"""The parts of a token store, by several processes, and its manifest.

A part is a run of consecutive documents. Where one ends depends on the text alone, so its bytes are the same for any
number of processes and shards, and a rerun after a kill needs only those that are not there. Every shard reads all of
the text, which is a fraction of the work, and tokenises its parts. What is held out of a part is written with it, as
the part of that name of another store.
"""

import contextlib
import math
import signal
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from fastbert.data import store
from fastbert.data.documents import Document, Problems
from fastbert.data.drafts import Drafts
from fastbert.data.parts import begin_worker, write_part
from fastbert.data.readers import Reader
from fastbert.data.sources import Source, Stdin
from fastbert.errors import InputError
from fastbert.terminal import counted

Progress = Callable[[int], None]

_FEWEST = 2  # documents, held out and not: a pair of sentences may be of two
_LIKELY = 5.0  # that are expected to be held out: then it is two at least in 96 of 100 corpora


@dataclass(frozen=True)
class Prepared:
    """What a run has done.

    Attributes:
        parts: of the store.  written, found: of this shard, by this run, and before it.
        missing: parts that other shards have yet to write.
        documents, sentences, tokens, unknown: in this shard's parts, without what is held out.
        held_out_documents, held_out_tokens: of this shard's parts.
        written_tokens: by this run, with what is held out.
        problems: what was left out, of the files by this run's reading, of the parts by this shard's tokenising.
    """

    parts: int
    written: int
    found: int
    missing: int
    documents: int
    sentences: int
    tokens: int
    unknown: int
    held_out_documents: int
    held_out_tokens: int
    written_tokens: int
    problems: Problems


@dataclass(frozen=True)
class Build:
    """What a run is to do.

    Attributes:
        tokenizer: what the manifest says of it.
        drafts: of the store; and of what is held out.
    """

    sources: Sequence[Source]
    names: Sequence[str]
    tokenizer: dict[str, Any]
    reader: Reader
    language: str
    shard: tuple[int, int]
    part_characters: int
    held_out: float | None
    drafts: Sequence[Drafts]

    def work(self, workers: int, progress: Progress | None) -> Prepared:
        """Write what is missing, and the manifest if nothing is then.

        Raises:
            InputError: if a source cannot be read, or nothing is left of the text.
        """
        problems = Problems(strict=self.reader.strict)
        checksums: list[int] = []
        done: dict[int, list[dict[str, Any]]] = {}
        written: set[int] = set()
        running: dict[Future[list[dict[str, Any]]], int] = {}
        read: dict[int, int] = {}
        advance = progress or (lambda count: None)

        def collect(atmost: int) -> None:
            while len(running) > atmost:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    done[number] = future.result()
                    self._check_strict(done[number])
                    advance(read.pop(number))

        folders = [str(drafts.folder) for drafts in self.drafts]
        arguments = (folders, self.drafts[0].key, self.language, self.tokenizer["special"], self.held_out)
        pool = ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, arguments)
        try:
            for number, (documents, size) in enumerate(self._parts(problems)):
                checksums.append(_checksum(documents))
                if number % self.shard[1] != self.shard[0] - 1:
                    advance(size)
                    continue
                expected = self._expected(checksums[number])
                there = self._whole(number, expected)
                if there is not None:
                    self._check_strict(there)
                    done[number] = there
                    advance(size)
                    continue
                self._check_stdin(number)
                collect(workers + 1)
                with _interrupts_wait():
                    running[pool.submit(write_part, _name(number), documents, expected)] = number
                read[number] = size
                written.add(number)
            self._check_stdin(len(checksums))
            collect(0)
        except BrokenProcessPool as error:
            raise InputError(
                "a process that tokenises was killed, perhaps for want of memory: run the same command again,"
                " or with fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        if not checksums:
            raise self._never(f"nothing is left of the text: {str(problems) or 'the files hold no document'}")
        entries, *held_out = zip(*(done[number] for number in sorted(done)), strict=True) if done else ((),)
        totals = _totals(entries)
        held_out_totals = _totals(held_out[0] if held_out else ())
        i, n = self.shard
        self.drafts[0].json(f"shard-{i:05d}-of-{n:05d}.json", {"parts": [entry["name"] for entry in entries], **totals})
        missing = self._finish(checksums, problems)
        for entry in entries:
            problems.update(entry["left_out"], entry["problems"])
        return Prepared(
            parts=len(checksums),
            written=len(written),
            found=len(done) - len(written),
            missing=missing,
            **totals,
            held_out_documents=held_out_totals["documents"],
            held_out_tokens=held_out_totals["tokens"],
            written_tokens=sum(entry["lengths"]["tokens"] for number in written for entry in done[number]),
            problems=problems,
        )

    def _parts(self, problems: Problems) -> Iterator[tuple[list[Document], int]]:
        """The documents of each part, and how many bytes of the files were read for it."""
        documents: list[Document] = []
        size = read = 0

        def count(step: int) -> None:
            nonlocal read
            read += step

        for source, name in zip(self.sources, self.names, strict=True):
            for document in self.reader.read(source, name, problems, count):
                documents.append(document)
                size += document.size
                if size >= self.part_characters:
                    yield documents, read
                    documents, size, read = [], 0, 0
        if documents:
            yield documents, read

    def _expected(self, checksum: int) -> dict[str, Any]:
        """What a part.json has to say for the part to be of this text and this tokenizer."""
        return {"format": store.FORMAT, "text_crc32": checksum, "tokenizer": self.tokenizer["sha256"][store.TOKENIZER]}

    def _whole(self, number: int, expected: dict[str, Any]) -> list[dict[str, Any]] | None:
        """The part.json of this part in each store; None if one is not there, not whole, or of another text."""
        entries = [store.whole_part(drafts.folder / _name(number), expected) for drafts in self.drafts]
        return None if None in entries else [entry for entry in entries if entry is not None]

    def _check_strict(self, entries: Sequence[dict[str, Any]]) -> None:
        if self.reader.strict:
            for entry in entries:
                Problems(strict=True).update(entry["left_out"], entry["problems"])

    def _check_stdin(self, number: int) -> None:
        """Of files the plan has the sizes; that stdin is another only its text says.

        Args:
            number: of a part that should not be there.
        """
        folder = self.drafts[0].folder
        stdin = any(isinstance(source, Stdin) for source in self.sources)
        if stdin and store.whole_part(folder / _name(number)) is not None:
            raise InputError(f"{folder} was begun with another text on stdin: give it that, or take another folder")

    def _finish(self, checksums: Sequence[int], problems: Problems) -> int:
        """Write the manifests, if all parts are there, whole. Returns how many are not."""
        folders = [drafts.folder for drafts in self.drafts]
        missing = sum(
            not all((folder / _name(number) / store.PART).is_file() for folder in folders)
            for number in range(len(checksums))
        )
        if missing:
            return missing
        told = [Problems(problems.counts.copy(), {reason: list(places) for reason, places in problems.first.items()})]
        told += [Problems() for _ in folders[1:]]
        manifests = [_Manifest(folder, self.tokenizer, said) for folder, said in zip(folders, told, strict=True)]
        for number, checksum in enumerate(checksums):
            entries = self._whole(number, self._expected(checksum))
            if entries is None:
                missing += 1
                continue
            for manifest, entry in zip(manifests, entries, strict=True):
                manifest.add(entry)
        if missing:
            return missing
        self._check_sides(manifests)
        for drafts, manifest in reversed(list(zip(self.drafts, manifests, strict=True))):
            drafts.json(store.MANIFEST, manifest.content())
        return 0

    def _check_sides(self, manifests: Sequence["_Manifest"]) -> None:
        documents = [manifest.documents for manifest in manifests]
        every = sum(documents)
        if every == 0:
            raise self._never(f"nothing is left of the text: {manifests[0].left_out}")
        if self.held_out is not None and min(documents) < _FEWEST:
            few = documents[1] < _FEWEST
            better = _LIKELY / every if few else 1 - _LIKELY / every
            number = "all" if documents[0] == 0 else documents[1] or "none"
            wrong = f"of {counted(every, 'document')} {100 * self.held_out:g}% holds out {number}"
            if every >= 2 * _LIKELY and (self.held_out < better) == few:
                raise self._never(f"{wrong}: {100 * better:.2g}% would most likely do")
            raise self._never(f"{wrong}: a pair of sentences takes {_FEWEST}, held out and not")

    def _never(self, message: str) -> InputError:
        """Of what no run with these settings can finish: the folder is left to others, but for what was finished."""
        folder = self.drafts[0].folder
        if not (folder / store.MANIFEST).exists():
            store.remove(folder)
        return InputError(message)


class _Manifest:
    """What a store's manifest says, from its parts."""

    def __init__(self, folder: Path, tokenizer: dict[str, Any], left_out: Problems) -> None:
        self.documents = 0
        self.left_out = left_out
        self._folder = folder
        self._tokenizer = tokenizer
        self._counts = np.zeros(tokenizer["vocab_size"], np.int64)
        self._parts: list[dict[str, Any]] = []

    def add(self, entry: dict[str, Any]) -> None:
        self.left_out.update(entry["left_out"], entry["problems"])
        if entry["lengths"]["tokens"]:
            tokens = store.map_part(self._folder / entry["name"], entry, verify=False).tokens
            self._counts += np.bincount(tokens, minlength=len(self._counts))
            self._parts.append({key: entry[key] for key in ("name", "lengths", "dtypes", "crc32")})
            self.documents += entry["lengths"]["documents"] - 1

    def content(self) -> dict[str, Any]:
        tokens = int(self._counts.sum())
        shares = self._counts[self._counts > 0] / tokens
        return {
            "format": store.FORMAT,
            "totals": {
                "documents": self.documents,
                "sentences": sum(part["lengths"]["sentences"] - 1 for part in self._parts),
                "tokens": tokens,
                "unknown": int(self._counts[self._tokenizer["special"]["unk"]]),
            },
            "entropy": math.fsum((-shares * np.log(shares)).tolist()),
            "left_out": dict(sorted(self.left_out.counts.items())),
            "problems": dict(sorted(self.left_out.first.items())),
            "tokenizer": self._tokenizer,
            "parts": self._parts,
        }


def _totals(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "documents": sum(entry["lengths"]["documents"] - 1 for entry in entries),
        "sentences": sum(entry["lengths"]["sentences"] - 1 for entry in entries),
        "tokens": sum(entry["lengths"]["tokens"] for entry in entries),
        "unknown": sum(entry["unknown"] for entry in entries),
    }


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits, also in a process that begins in here, until that one is ready for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _name(part: int) -> str:
    return f"part-{part:06d}"


def _checksum(documents: Sequence[Document]) -> int:
    value = 0
    for document in documents:
        value = zlib.crc32(b"\1", value)
        for text in document.texts:
            value = zlib.crc32(b"\0" + text.encode(), value)
    return value
