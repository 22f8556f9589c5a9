"""Where texts come from, as the command line says it: files, folders, stdin, datasets."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from fastbert.data import datasets, store
from fastbert.data.compression import KINDS, kind_of
from fastbert.data.datasets import Dataset
from fastbert.errors import InputError

STDIN = "-"
FORMATS = ("txt", "jsonl", "md", "csv", "tsv")  # of lines
_ENDINGS = {
    ".txt": "txt",
    ".text": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".md": "md",
    ".markdown": "md",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class File:
    """A file.

    Attributes:
        format: what is in it: one of FORMATS or "parquet"; None if nobody knows.
        compression: what unpacks it.
        told: its name does not say the format; somebody did.
    """

    path: Path
    format: str | None
    compression: str | None
    told: bool

    @classmethod
    def of(cls, path: Path, format: str | None = None) -> "File":
        """What its name says; `format` where that says nothing."""
        compression = kind_of(path)
        known = _ENDINGS.get((Path(path.stem) if compression else path).suffix.lower())
        if known == "parquet" and compression:
            known = None
        return cls(path, known or format, compression, known is None)

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    @property
    def identity(self) -> list[Any]:
        """What tells it from another file of its name."""
        return [self.size, self.format] if self.told else [self.size]

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        with self.path.open("rb") as file:
            yield file


class Stdin:
    """What a command is given. Of a pipe it can be read once."""

    name = "<stdin>"
    size = compression = None

    def __init__(self, format: str, stream: BinaryIO) -> None:
        self.format = format
        self._stream = stream
        self._start = stream.tell() if stream.seekable() else None
        self._begun = False

    @property
    def identity(self) -> list[Any]:
        """Its text is compared when it comes."""
        return [self.format]

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if self._start is not None:
            self._stream.seek(self._start)
        elif self._begun:
            raise InputError("stdin is a pipe, which can be read only once")
        self._begun = True
        yield self._stream

    def keep(self) -> None:
        """Make it readable more than once: a pipe's text goes to a temporary file."""
        if self._start is None:
            file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  it lives as long as this
            with self.open() as stream:
                shutil.copyfileobj(stream, file)
            self._stream, self._start = file, 0


Source: TypeAlias = File | Stdin | Dataset


def find(given: Sequence[Path | str | Source], format: str | None = None) -> list[Source]:
    """The sources that these name, in order; of a folder all its files, sorted, and those of its folders.

    Files of a folder whose kind is not known are among them, hidden ones and token stores are not.

    Args:
        format: of stdin, and of files whose names do not say it.

    Raises:
        InputError: if there is no such source, or nothing says what is in it.
    """
    found: list[Source] = []
    for each in given:
        if isinstance(each, File | Stdin | Dataset):
            found.append(each)
        elif str(each) == STDIN:
            if format is None:
                raise InputError(f"what stdin holds must be said: --format {' or '.join(FORMATS)}")
            found.append(Stdin(format, sys.stdin.buffer))
        elif str(each).startswith(datasets.PREFIX):
            found.append(Dataset.parse(str(each)))
        elif Path(each).is_dir():
            found += _in_folder(Path(each))
        else:
            found.append(_named(Path(each), format))
    if sum(isinstance(source, Stdin) for source in found) > 1:
        raise InputError("stdin is given twice")
    return found


def names(sources: Sequence[Source]) -> list[str]:
    """The same on every machine that has them, wherever that may be."""
    paths = [os.path.abspath(source.path) for source in sources if isinstance(source, File)]
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [
        os.path.relpath(os.path.abspath(source.path), folder) if isinstance(source, File) else source.name
        for source in sources
    ]


def _named(path: Path, format: str | None) -> File:
    if not path.is_file():
        raise InputError(f"{path}: {'not a file' if path.exists() else 'there is no such file'}")
    file = File.of(path, format)
    if file.format is None:
        raise InputError(
            f"{path}: its name must end with one of {', '.join(_ENDINGS)}, or one of these but Parquet and one of"
            f" {', '.join(KINDS)}; or --format must say what it is"
        )
    return file


def _in_folder(folder: Path) -> list[File]:
    paths: list[Path] = []
    seen: set[str] = set()
    if datasets.is_saved(folder):
        raise InputError(f"{folder} is a saved dataset: give {datasets.PREFIX}{folder}")
    if (folder / store.PLAN).exists():
        raise InputError(f"{folder} is a token store, and no text")
    for inner, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(inner)
        if real in seen:  # a link upwards
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [
            name for name in folders if not name.startswith(".") and not Path(inner, name, store.PLAN).exists()
        ]
        paths += [Path(inner, name) for name in files if not name.startswith(".")]
    found = [File.of(path) for path in sorted(paths, key=lambda path: path.relative_to(folder).parts)]
    if not any(file.format for file in found):
        raise InputError(f"{folder} has no file whose name ends with one of {', '.join(_ENDINGS)}")
    return found
