"""The token store: a folder that `fastbert prepare` writes and pretraining maps into memory.

    manifest.json               written last, when every part is there
    plan.json                   what was asked for
    tokenizer.json, ...         loads with AutoTokenizer.from_pretrained
    shard-00003-of-00064.json   a shard that has written all of its parts
    part-000017/                some consecutive documents
        tokens.npy              (tokens,) uint16 or uint32, without special tokens
        sentences.npy           (sentences + 1,) uint32, where each starts among the part's tokens, and their number
        documents.npy           (documents + 1,) uint32, which sentence each starts with, and their number
        part.json               sizes, checksums, what was left out
    held-out/                   a store like this one, of documents that are not in this one: for evaluation

Every file of it, and the part's folder itself, appears whole or not at all: it is made under a hidden name.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.data.drafts import Drafts
from fastbert.errors import InputError

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
PART = "part.json"
HELD_OUT = "held-out"
ARRAYS = ("tokens", "sentences", "documents")
_HEADER = 128
_OTHER_FILES = 256
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)\.json")


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
            raise InputError(_why_unfinished(path))
        if manifest.get("format") != FORMAT:
            raise InputError(
                f"{path / MANIFEST}: format {manifest.get('format')} is not {FORMAT}: another version wrote it"
            )
        try:
            return cls._of(path, manifest, verify)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path / MANIFEST} is damaged: {error}") from error

    @classmethod
    def _of(cls, path: Path, manifest: dict[str, Any], verify: bool) -> "Store":
        tokenizer = manifest["tokenizer"]
        for name, checksum in tokenizer["sha256"].items():
            if not (path / name).is_file():
                raise InputError(f"{path / name} is missing")
            if sha256(path / name) != checksum:
                raise InputError(f"{path / name} is not the one that the store was made with")
        entries = manifest["parts"]
        _allow_open_files(path, len(entries) * len(ARRAYS))
        with ThreadPoolExecutor() as threads:
            parts = list(threads.map(lambda entry: map_part(path / entry["name"], entry, verify), entries))
        counts = {name: sum(entry["lengths"][name] for entry in entries) for name in ARRAYS}
        counts |= {name: counts[name] - len(parts) for name in ("sentences", "documents")}
        if counts != {name: manifest["totals"][name] for name in ARRAYS}:
            raise InputError(f"{path / MANIFEST} is damaged: its totals are not those of its parts")
        ids = {name: value for name, value in tokenizer["special"].items() if name != "all"}
        special = SpecialTokens(**ids, all=tuple(tokenizer["special"]["all"]))
        return cls(
            path=path,
            vocab_size=tokenizer["vocab_size"],
            special=special,
            continuations=_continuations(path / TOKENIZER, tokenizer["vocab_size"], special.all),
            parts=parts,
            **counts,
            entropy=manifest["entropy"],
            fingerprint=hashlib.sha256(
                json.dumps([tokenizer["sha256"][TOKENIZER], [entry["crc32"] for entry in entries]]).encode()
            ).hexdigest(),
        )


def _why_unfinished(path: Path) -> str:
    if not path.is_dir():
        return f"{path}: there is no such folder"
    if (path / MANIFEST).exists():
        return f"{path / MANIFEST} is damaged: it is no JSON object"
    if not (path / PLAN).exists():
        return f"{path} is no token store: it has no {MANIFEST}"
    done: dict[int, set[int]] = {}
    for file in path.iterdir():
        if match := _SHARD.fullmatch(file.name):
            done.setdefault(int(match[2]), set()).add(int(match[1]))
    of = max(done, key=lambda n: len(done[n]) / n, default=1)
    missing = [f"{i}/{of}" for i in range(1, of + 1) if i not in done.get(of, ())]
    what = "its `fastbert prepare`"
    if of > 1 and missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        what += f" with --shard {', '.join(missing[:5])}{more}"
    return f"{path} is not finished: run {what} again"


def _continuations(tokenizer: Path, vocab_size: int, special: Collection[int]) -> npt.NDArray[np.bool_]:
    """(vocab_size,): which tokens go on with a word."""
    model = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's: (piece, its log probability)
        vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    if model.get("type", "WordPiece") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        found = [i for token, i in vocabulary.items() if token.startswith(prefix)]
    else:  # a piece that begins a word has its space
        found = [i for token, i in vocabulary.items() if not token.startswith(("Ġ", "▁"))]
    continues = np.zeros(vocab_size, np.bool_)
    continues[found] = True
    continues[list(special)] = False
    return continues


def header(dtype: str, length: int) -> bytes:
    """What an .npy file of a 1-D array begins with: the same bytes whichever NumPy wrote it."""
    text = f"{{'descr': '<{np.dtype(dtype).str[1:]}', 'fortran_order': False, 'shape': ({length},), }}"
    return b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text.ljust(_HEADER - 11).encode() + b"\n"


def map_part(folder: Path, entry: Mapping[str, Any], verify: bool) -> Part:
    """Map a part, as its part.json or the manifest says it is.

    Raises:
        InputError: naming the file that is not so.
    """
    arrays = {}
    for name in ARRAYS:
        file = folder / f"{name}.npy"
        arrays[name] = _map_array(file, entry["dtypes"][name], entry["lengths"][name])
        if verify and crc32(file) != entry["crc32"][name]:
            raise InputError(f"{file} is damaged: its checksum is not what it should be")
    part = Part(**arrays)
    for name, offsets, end in (
        ("documents", part.documents, len(part.sentences) - 1),
        ("sentences", part.sentences, len(part.tokens)),
    ):
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != end:
            raise InputError(f"{folder / name}.npy is damaged: it does not end where the part does")
    return part


def _map_array(file: Path, dtype: str, length: int) -> npt.NDArray[Any]:
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != _HEADER + length * np.dtype(dtype).itemsize or opened.read(_HEADER) != header(dtype, length):
                raise InputError(f"{file} is damaged: it has not the size that it should have")
            return np.memmap(opened, dtype, "r", _HEADER, (length,))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{file} is missing") from error


def _allow_open_files(store: Path, files: int) -> None:
    """A memory map keeps its file open, and a large corpus has more files than a process may open at first."""
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    needed = files + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"{store} has {files:,} files, but a process may open {hard:,} here: raise that, see ulimit -Hn"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def whole_part(folder: Path, expected: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What a part's part.json says; None if it is not there, does not say what is expected, or is damaged."""
    content = read_json(folder / PART)
    if content is None or any(content.get(key) != value for key, value in (expected or {}).items()):
        return None
    try:
        map_part(folder, content, verify=True)
    except (InputError, KeyError, TypeError):
        return None
    return content


def remove(folder: Path) -> None:
    """Take away what a store has in its folder, the plan last, and the folder if nothing else is in there."""
    if (folder / HELD_OUT).is_dir():
        remove(folder / HELD_OUT)
    for part in folder.glob("part-*"):
        shutil.rmtree(part, ignore_errors=True)
    shards = [file for file in folder.iterdir() if _SHARD.fullmatch(file.name)]
    for file in (*shards, folder / MANIFEST, *(folder / name for name in TOKENIZER_FILES), folder / PLAN):
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty
        folder.rmdir()


def write_json(path: Path, content: object) -> None:
    """Write a file that appears at once, with all of its content."""
    Drafts(path.parent, str(os.getpid())).json(path.name, content)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is no such file, or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
