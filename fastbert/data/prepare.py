"""From text files to a token store: documents, sentences, tokens, in parts that several processes write.

A part is a run of consecutive documents. Where one ends depends on the text alone, so its bytes are the same for any
number of processes and shards, and a rerun after a kill needs only those that are not there. Every shard reads all of
the text, which is a fraction of the work, and tokenises its parts.
"""

import contextlib
import json
import math
import os
import signal
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data import store, vocabulary
from fastbert.data.drafts import Drafts
from fastbert.data.parts import begin_worker, flatten, write_part
from fastbert.data.readers import Document, Problems, Reader
from fastbert.data.sentences import check_language
from fastbert.errors import InputError

PART_CHARACTERS = 8 << 20
_SPECIAL = ("pad", "unk", "cls", "sep", "mask")
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Prepared:
    """What a run has done.

    Attributes:
        parts: of the store.  written, found: of this shard, by this run, and before it.
        missing: parts that other shards have yet to write.
        documents, sentences, tokens, unknown: in this shard's parts.  written_tokens: by this run.
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
    written_tokens: int
    problems: Problems


def prepare(
    files: Sequence[Path],
    output: Path,
    tokenizer: Callable[[], Any],
    *,
    asked: dict[str, Any],
    reader: Reader,
    language: str = "en",
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    part_characters: int = PART_CHARACTERS,
    only_tokenizer: bool = False,
    progress: Progress | None = None,
) -> Prepared | None:
    """Write a token store, or a shard of it, or what is missing of that.

    Args:
        tokenizer: makes a transformers tokenizer; called only where the store has none yet.
        asked: what the tokenizer is made from, for the plan: with anything else, the store cannot be gone on with.
        language: of the text, for its sentences: a code like en or zh.
        shard: the i-th of n, from 1: every n-th part.
        workers: processes that tokenise. As many parts, and three more, lie in memory.
        part_characters: a part ends with the document that fills it.
        only_tokenizer: write that, and return None.
        progress: called with the number of bytes of the files that have just become tokens, or were so before.

    Raises:
        InputError: if a file cannot be read, the folder cannot be written or holds something else, or nothing is left
            of the text.
    """
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"there is no shard {shard[0]}/{shard[1]}")
    check_language(language)
    if not files:
        raise InputError("there are no files to read")
    for file in files:
        reader.check(file)
    names = _names(files)
    plan = {
        "format": store.FORMAT,
        "files": [[name, file.stat().st_size] for name, file in zip(names, files, strict=True)],
        "tokenizer": asked,
        # With use_damaged a run goes on where it stopped without.
        "reader": {key: value for key, value in asdict(reader).items() if key != "use_damaged"},
        "language": language,
        "part_characters": part_characters,
    }
    drafts = Drafts(output, f"{shard[0]}-of-{shard[1]}")
    try:
        _check_plan(output, plan)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{twice[0]} is given twice: its documents would be there twice")
        output.mkdir(parents=True, exist_ok=True)
        drafts.clear()
        if not (output / store.TOKENIZER).exists():
            made = tokenizer()
            drafts.json(store.PLAN, plan)
            _save(made, drafts)
        description = _describe(output)
        if only_tokenizer:
            return None
        return _Run(files, names, description, reader, language, shard, part_characters, drafts).work(workers, progress)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or output}: {error.strerror or error}") from error


def train_vocabulary(
    files: Sequence[Path], reader: Reader, size: int, *, cased: bool, progress: Progress | None = None
) -> Any:
    """A BERT tokenizer with a WordPiece vocabulary of these files, the same for the same files.

    Args:
        progress: called with the number of bytes that have just been read; they are read twice.

    Raises:
        InputError: if the text does not give so many tokens.
    """
    names = _names(files)

    def texts() -> Iterator[str]:
        problems = Problems()  # preparing reports them
        for file, name in zip(files, names, strict=True):
            for document in reader.read(file, name, problems, progress):
                for _, texts in flatten(document, problems):
                    yield from texts

    return vocabulary.train(texts, size, cased=cased)


@dataclass(frozen=True)
class _Run:
    files: Sequence[Path]
    names: Sequence[str]
    tokenizer: dict[str, Any]
    reader: Reader
    language: str
    shard: tuple[int, int]
    part_characters: int
    drafts: Drafts

    def work(self, workers: int, progress: Progress | None) -> Prepared:
        problems = Problems()
        checksums: list[int] = []
        done: dict[int, dict[str, Any]] = {}
        written: set[int] = set()
        running: dict[Future[dict[str, Any]], int] = {}
        read: dict[int, int] = {}
        advance = progress or (lambda count: None)

        def collect(atmost: int) -> None:
            while len(running) > atmost:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    done[number] = future.result()
                    advance(read.pop(number))

        arguments = (str(self.drafts.folder), self.drafts.key, self.language, self.tokenizer["special"])
        pool = ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, arguments)
        try:
            for number, (documents, size) in enumerate(self._parts(problems)):
                checksums.append(_checksum(documents))
                if number % self.shard[1] != self.shard[0] - 1:
                    advance(size)
                    continue
                expected = self._expected(checksums[number])
                there = store.whole_part(self.drafts.folder / _name(number), expected)
                if there is not None:
                    done[number] = there
                    advance(size)
                    continue
                collect(workers + 1)
                with _interrupts_wait():
                    running[pool.submit(write_part, _name(number), documents, expected)] = number
                read[number] = size
                written.add(number)
            collect(0)
        except BrokenProcessPool as error:
            raise InputError(
                "a process that tokenises was killed, perhaps for want of memory: run the same command again,"
                " or with fewer workers"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
        if not checksums:
            raise InputError("nothing is left of the text: " + (str(problems) or "the files hold no document"))
        entries = [done[number] for number in sorted(done)]
        totals = {
            "documents": sum(entry["lengths"]["documents"] - 1 for entry in entries),
            "sentences": sum(entry["lengths"]["sentences"] - 1 for entry in entries),
            "tokens": sum(entry["lengths"]["tokens"] for entry in entries),
            "unknown": sum(entry["unknown"] for entry in entries),
        }
        i, n = self.shard
        self.drafts.json(f"shard-{i:05d}-of-{n:05d}.json", {"parts": [entry["name"] for entry in entries], **totals})
        missing = self._finish(checksums, problems)
        for entry in entries:
            problems.update(entry["left_out"], entry["problems"])
        return Prepared(
            parts=len(checksums),
            written=len(written),
            found=len(done) - len(written),
            missing=missing,
            **totals,
            written_tokens=sum(done[number]["lengths"]["tokens"] for number in written),
            problems=problems,
        )

    def _parts(self, problems: Problems) -> Iterator[tuple[list[Document], int]]:
        """The documents of each part, and how many bytes of the files were read for it."""
        documents: list[Document] = []
        size = read = 0

        def count(step: int) -> None:
            nonlocal read
            read += step

        for file, name in zip(self.files, self.names, strict=True):
            for document in self.reader.read(file, name, problems, count):
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

    def _finish(self, checksums: Sequence[int], problems: Problems) -> int:
        """Write the manifest, if all parts are there, whole. Returns how many are not."""
        folders = [self.drafts.folder / _name(number) for number in range(len(checksums))]
        missing = sum(not (folder / store.PART).is_file() for folder in folders)
        if missing:
            return missing
        found = (
            store.whole_part(folder, self._expected(checksum))
            for folder, checksum in zip(folders, checksums, strict=True)
        )
        left_out = Problems(problems.counts.copy(), {reason: list(places) for reason, places in problems.first.items()})
        counts = np.zeros(self.tokenizer["vocab_size"], np.int64)
        parts = []
        for folder, entry in zip(folders, found, strict=True):
            if entry is None:
                missing += 1
                continue
            left_out.update(entry["left_out"], entry["problems"])
            if entry["lengths"]["tokens"]:
                counts += np.bincount(store.map_part(folder, entry, verify=False).tokens, minlength=len(counts))
                parts.append({key: entry[key] for key in ("name", "lengths", "dtypes", "crc32")})
        if missing:
            return missing
        if not parts:
            raise InputError(f"nothing is left of the text: {left_out}")
        tokens = int(counts.sum())
        shares = counts[counts > 0] / tokens
        self.drafts.json(
            store.MANIFEST,
            {
                "format": store.FORMAT,
                "totals": {
                    "documents": sum(part["lengths"]["documents"] - 1 for part in parts),
                    "sentences": sum(part["lengths"]["sentences"] - 1 for part in parts),
                    "tokens": tokens,
                    "unknown": int(counts[self.tokenizer["special"]["unk"]]),
                },
                "entropy": math.fsum((-shares * np.log(shares)).tolist()),
                "left_out": dict(sorted(left_out.counts.items())),
                "problems": dict(sorted(left_out.first.items())),
                "tokenizer": self.tokenizer,
                "parts": parts,
            },
        )
        return 0


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits, also in a process that begins in here, until that one is ready for it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _names(files: Sequence[Path]) -> list[str]:
    """The same on every machine that has the files, wherever that may be."""
    paths = [os.path.abspath(file) for file in files]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, folder) for path in paths]


def _name(part: int) -> str:
    return f"part-{part:06d}"


def _check_plan(output: Path, plan: dict[str, Any]) -> None:
    path = output / store.PLAN
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder")
    if not path.exists():
        if output.exists() and any(not file.name.startswith(".") for file in output.iterdir()):
            raise InputError(f"{output} is not empty, and holds no token store")
        return
    before = store.read_json(path)
    if before is None:
        raise InputError(f"{path} is damaged: remove {output}, and begin anew")
    plan = json.loads(json.dumps(plan))
    if different := [key for key in plan if before.get(key) != plan[key]]:
        raise InputError(
            f"{output} was begun with other settings ({', '.join(different)}): go on with those, or take another folder"
        )


def _save(tokenizer: Any, drafts: Drafts) -> None:
    with drafts.scratch("tokenizer") as folder:
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # what Rust raises has no kind
            raise InputError(f"cannot write {drafts.folder}: {error}") from error
        content = json.loads((folder / store.TOKENIZER).read_text(encoding="utf-8"))
        ids = tokenizer.get_vocab()
        words = sorted(ids, key=ids.__getitem__)
        if content["model"].get("type") == "WordPiece" and len(words) == max(ids.values()) + 1:
            (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8", newline="\n")
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == store.TOKENIZER, file.name)):
            drafts.publish(file, file.name)


def _describe(output: Path) -> dict[str, Any]:
    """What the manifest says of the tokenizer that is there."""
    path = output / store.TOKENIZER
    try:
        backend = Tokenizer.from_file(str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # what Rust raises has no kind
        raise InputError(f"{path} or tokenizer_config.json is damaged: remove {output}, and begin anew") from error
    special = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        special[name] = backend.token_to_id(text or "")
        if special[name] is None:
            raise InputError(f"{path} has no {name} token")
    every = {token["id"] for token in content.get("added_tokens", []) if token.get("special")} | set(special.values())
    files = [output / name for name in store.TOKENIZER_FILES]
    return {
        "sha256": {file.name: store.sha256(file) for file in files if file.is_file()},
        "vocab_size": max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        "special": {**special, "all": sorted(every)},
    }


def _checksum(documents: Sequence[Document]) -> int:
    value = 0
    for document in documents:
        value = zlib.crc32(b"\1", value)
        for text in document.texts:
            value = zlib.crc32(b"\0" + text.encode(), value)
    return value
