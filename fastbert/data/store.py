"""The token store: a folder that `fastbert prepare` writes and pretraining maps into memory.

    manifest.json               written last, when every part is there
    tokenizer.json, ...         loads with AutoTokenizer.from_pretrained
    part-000017/                some consecutive documents
        tokens.npy              (tokens,) uint16 or uint32, without special tokens
        sentences.npy           (sentences + 1,) uint32, where each starts among the part's tokens, and their number
        documents.npy           (documents + 1,) uint32, which sentence each starts with, and their number
        part.json               counts, checksums, what was left out

Every file of it, and the part's folder itself, appears whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
ARRAYS = ("tokens", "sentences", "documents")


@dataclass(frozen=True)
class SpecialTokens:
    """Ids. `all` holds these and every other that is special."""

    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    all: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Part:
    """Some documents, as read-only memory maps: see the head of this file."""

    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
    sentences: npt.NDArray[np.uint32]
    documents: npt.NDArray[np.uint32]


@dataclass(frozen=True, eq=False)
class Store:
    """A corpus, ready for pretraining.

    Attributes:
        continuations: (vocab_size,) True where a token continues a word.
        documents, sentences, tokens: how many there are.
        entropy: of the unigram distribution of its tokens, in nats: what a model has to get below to have learnt more
            than frequencies.
        fingerprint: the same for the same tokens and the same tokenizer.
    """

    path: Path
    vocab_size: int
    special: SpecialTokens
    continuations: npt.NDArray[np.bool_]
    parts: Sequence[Part]
    documents: int
    sentences: int
    tokens: int
    entropy: float
    fingerprint: str

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> "Store":
        """Map a finished store.

        Args:
            verify: compare checksums, which reads all of it once; sizes are always compared.

        Raises:
            InputError: naming the file, if there is none, it is not finished, or something in it is damaged.
        """
        path = Path(path)
        manifest = read_json(path / MANIFEST)
        if manifest is None:
            if not path.is_dir():
                raise InputError(f"{path}: there is no such folder")
            missing = "it is not finished: run its `fastbert prepare` again" if (path / "plan.json").exists() else ""
            raise InputError(
                f"{path} is no token store{': ' if missing else ''}{missing or ', it has no manifest.json'}"
            )
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{path / MANIFEST}: format {manifest.get('format')} is not {FORMAT}: another version wrote it"
            )
        try:
            return cls._of(path, manifest, verify)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path / MANIFEST} is damaged: {error}") from error

    @classmethod
    def _of(cls, path: Path, manifest: dict[str, Any], verify: bool) -> "Store":
        tokenizer = manifest["tokenizer"]
        if not (path / TOKENIZER).is_file() or sha256(path / TOKENIZER) != tokenizer["sha256"]:
            raise InputError(f"{path / TOKENIZER} is not the tokenizer that the store was made with")
        parts = [_map_part(path / entry["name"], entry, verify) for entry in manifest["parts"]]
        continuations = np.zeros(tokenizer["vocab_size"], np.bool_)
        continuations[tokenizer["continuations"]] = True
        special = {name: ids for name, ids in tokenizer["special"].items() if name != "all"}
        totals = manifest["totals"]
        return cls(
            path=path,
            vocab_size=tokenizer["vocab_size"],
            special=SpecialTokens(**special, all=tuple(tokenizer["special"]["all"])),
            continuations=continuations,
            parts=parts,
            documents=totals["documents"],
            sentences=totals["sentences"],
            tokens=totals["tokens"],
            entropy=manifest["entropy"],
            fingerprint=hashlib.sha256(
                json.dumps([tokenizer["sha256"], [entry["crc32"] for entry in manifest["parts"]]]).encode()
            ).hexdigest(),
        )


def _map_part(folder: Path, entry: Mapping[str, Any], verify: bool) -> Part:
    arrays = {}
    for name in ARRAYS:
        file = folder / f"{name}.npy"
        try:
            array = np.load(file, mmap_mode="r")
        except FileNotFoundError as error:
            raise InputError(f"{file} is missing") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is damaged: it is shorter than it says, or no NumPy array") from error
        if array.ndim != 1 or len(array) != entry["lengths"][name] or array.dtype != entry["dtypes"][name]:
            raise InputError(f"{file} is damaged: it has not the size that {MANIFEST} says")
        if verify and crc32(file) != entry["crc32"][name]:
            raise InputError(f"{file} is damaged: its checksum is not the one in {MANIFEST}")
        arrays[name] = array
    return Part(**arrays)


def write_part(
    store: Path,
    name: str,
    tokens: npt.NDArray[Any],
    sentences: Sequence[int],
    documents: Sequence[int],
    left_out: Counter[str],
) -> None:
    """Write a part's folder, under another name until it is whole."""
    draft = store / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        arrays = {
            "tokens": tokens,
            "sentences": np.asarray(sentences, np.uint32),
            "documents": np.asarray(documents, np.uint32),
        }
        for kind, array in arrays.items():
            with (draft / f"{kind}.npy").open("wb") as file:
                np.save(file, array)
                _flush(file.fileno(), file)
        ids, counts = np.unique(tokens, return_counts=True)
        content = {
            "name": name,
            "lengths": {kind: len(array) for kind, array in arrays.items()},
            "dtypes": {kind: array.dtype.name for kind, array in arrays.items()},
            "crc32": {kind: crc32(draft / f"{kind}.npy") for kind in arrays},
            "left_out": dict(sorted(left_out.items())),
            "token_counts": [ids.tolist(), counts.tolist()],
        }
        write_json(draft / "part.json", content, indent=None)
        os.rename(draft, store / name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _flush_folder(store)


def whole_part(folder: Path) -> dict[str, Any] | None:
    """What a part's part.json says, if its files are what that says; None if there is none, or it is damaged."""
    content = read_json(folder / "part.json")
    if content is None:
        return None
    try:
        _map_part(folder, content, verify=True)
    except (InputError, KeyError, TypeError):
        return None
    return content


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write a file that appears at once, with all of its content."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=indent)
            file.write("\n")
            _flush(file.fileno(), file)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    _flush_folder(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def remove(folder: Path) -> None:
    """A folder of ours, if it is there. Its name goes first, so that it is never there in part."""
    doomed = folder.with_name(f".{folder.name.lstrip('.')}.{os.getpid()}.old.tmp")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flush(descriptor: int, file: Any) -> None:
    file.flush()
    os.fsync(descriptor)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
