"""Records of a file, stdin or a dataset, in order: columns by name, whatever their values are."""

import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastbert.data.datasets import Dataset
from fastbert.data.documents import Problems
from fastbert.data.lines import Lines
from fastbert.data.readers import DELIMITERS, decoded, readable
from fastbert.data.sources import FORMATS, STDIN, File, Source, Stdin, find
from fastbert.data.tables import csv_rows, parquet_rows
from fastbert.errors import InputError

Record = tuple[int, Mapping[str, Any] | None]


class Records:
    """Iterate for (place, record): the line or row where it begins, and its columns; None for one that is unreadable.

    Of JSON lines, CSV, TSV, Parquet and datasets; a text file has a record a line, of one column. Memory is that of
    some. Of JSON lines and CSV, blank lines are no records. What is not UTF-8 has a surrogate for each byte.

    Args:
        path: "-" for stdin, or dataset:NAME:SPLIT.
        columns: that are read, by the options that name them, and must be there. A text file has one.
        format: of stdin, and of a file whose name does not say it; of stdin text where it is None.

    Attributes:
        name: of the file, in messages.
        size: bytes of the file; None where nobody knows.
        number, read: how many records and bytes have been read.
        problems: what has been counted.

    Raises:
        InputError: if there is no such file, its first record lacks a column, or, when all records before have come, it
            is damaged or has none.
    """

    def __init__(self, path: Path | str, columns: Mapping[str, str], format: str | None = None) -> None:
        self.columns = dict(columns)
        self.number = self.read = 0
        self.problems = Problems()
        self._source = _source(path, format)
        self.name = "stdin" if str(path) == STDIN else str(path)
        self.size = self._source.size if isinstance(self._source, File) else None
        if self.is_text and len(self.columns) > 1:
            raise InputError(f"{self.name} has a text a line, and no columns: give JSON lines, CSV, TSV or Parquet")

    @property
    def is_text(self) -> bool:
        """Whether it has lines, and no columns."""
        return not self._is_table and getattr(self._source, "format", None) in ("txt", "md")

    @property
    def can_be_read_again(self) -> bool:
        return not isinstance(self._source, Stdin)

    @property
    def unit(self) -> str:
        """What a place counts."""
        return "row" if self._is_table else "line"

    @property
    def _is_table(self) -> bool:
        return isinstance(self._source, Dataset) or self._source.format == "parquet"

    def where(self, place: int) -> str:
        """A place, in messages."""
        return f"{self.name}, {self.unit} {place}"

    def __iter__(self) -> Iterator[Record]:
        self.number = self.read = 0
        self.problems = Problems()
        for place, record in self._records():
            self.number += 1
            yield place, record
        if not self.number:
            raise InputError(f"{self.name} is empty")

    def _records(self) -> Iterator[Record]:
        source = self._source
        columns = list(self.columns.values())
        if isinstance(source, Dataset):
            self._check(source.columns)
            yield from source.rows(columns)
        elif isinstance(source, File) and source.format == "parquet":
            yield from parquet_rows(source.path, columns, self._check, self._advance)
        else:
            with readable(source), source.open() as file:
                lines = Lines(file, source.compression, self._advance)
                yield from self._of_lines(lines, str(source.format))
            if lines.damaged:
                raise InputError(
                    f"{self.name} is a damaged or truncated {source.compression} file, after line {self.number:,}"
                )

    def _of_lines(self, lines: Lines, format: str) -> Iterator[Record]:
        texts = self._decoded(lines)
        if format in DELIMITERS:
            for place, row in csv_rows(texts, DELIMITERS[format], self.name, self.problems, self._check):
                yield place, row or None
        elif format == "jsonl":
            for place, line in texts:
                if line.strip() and not lines.partial:
                    yield place, self._json(line, f"{self.name}, line {place}")
        else:
            (key,) = self.columns.values()
            for place, line in texts:
                if not lines.partial:
                    yield place, {key: line.removesuffix("\n")}

    def _decoded(self, lines: Lines) -> Iterator[tuple[int, str]]:
        """With a surrogate for each byte that is not UTF-8."""
        found = Problems()
        yield from decoded(lines, self.name, found, "surrogateescape")
        if found.counts:
            raise InputError(f"{self.name} is {next(iter(found.counts))}, but UTF-8 is wanted")

    def _json(self, line: str, where: str) -> Mapping[str, Any] | None:
        reason = "not a JSON object"
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content, reason = None, "not JSON"
        if not isinstance(content, dict):
            if not self.number:
                raise InputError(f"{where}: {reason}; JSON lines are an object a line")
            self.problems.add(f"{reason} (taken as empty)", where)
            return None
        if not self.number:
            self._check(list(content))
        return content

    def _check(self, columns: Sequence[str]) -> None:
        """Of the whole file, or, where rows name their own, of the first."""
        for option, key in self.columns.items():
            if key not in columns:
                raise InputError(
                    f"{self.name} has no column {key!r}, but {', '.join(map(repr, columns))}: {option} names another"
                )

    def _advance(self, count: int) -> None:
        self.read += count


def _source(path: Path | str, format: str | None) -> Source:
    if format is not None and format not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)}, but is {format}")
    if str(path) == STDIN:
        return Stdin(format or "txt", _stdin())
    if Path(path).is_dir():
        raise InputError(f"{path}: Is a directory")
    if Path(path).is_fifo() or Path(path).is_char_device():  # what a shell makes of <(...)
        return Stdin(format or "txt", Path(path).open("rb"))
    (source,) = find([path], format)
    return source


def _stdin() -> BinaryIO:
    """Not Python's own: a thread that still waits in that one is a fatal error when the process ends."""
    try:
        return open(os.dup(sys.stdin.fileno()), "rb")
    except io.UnsupportedOperation:  # of a notebook, or of a test
        return sys.stdin.buffer
