"""Rows of texts from a file or stdin, one for each that is there, in order, whatever is wrong with it."""

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastbert.data.datasets import Dataset
from fastbert.data.documents import Problems
from fastbert.data.lines import Lines
from fastbert.data.readers import DELIMITERS, decoded, readable
from fastbert.data.sources import FORMATS, STDIN, File, Source, Stdin, find
from fastbert.data.tables import csv_rows, parquet_rows
from fastbert.errors import InputError
from fastbert.inference.stream import Item

TEXT_KEYS = {"--text-key": "text"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_UTF8 = "not UTF-8 (read with \ufffd for what is not)"
Record = tuple[int, Mapping[str, Any] | None]


class Row(NamedTuple):
    """Attributes: id: what stands at the id key, or the number of the row, from 0.  texts: one for each key."""

    id: Any
    texts: tuple[str, ...]

    @property
    def item(self) -> Item:
        """What an engine takes: a text, or several."""
        return self.texts[0] if len(self.texts) == 1 else self.texts


class Rows:
    """The rows of a text file (a line each), of JSON lines, CSV, TSV or Parquet. Memory is that of some.

    An empty text is a row, too. What cannot be read in the midst is a row with an empty text, counted; what is not
    UTF-8 has U+FFFD there, and is counted. Of JSON lines and CSV, blank lines are no rows.

    Args:
        path: "-" for stdin, or dataset:NAME:SPLIT.
        keys: columns with the texts, by the options that name them. A text file has one.
        id_key: the column with the ids.
        format: of stdin, and of a file whose name does not say it; of stdin text where it is None.

    Attributes:
        name: of the file, in messages.
        size: bytes of the file; None where nobody knows.
        number, read: how many rows and bytes have been read.
        problems: what has been counted.

    Raises:
        InputError: if there is no such file, its first row lacks a column, or, when all rows before have come, it is
            damaged or has no row.
    """

    def __init__(
        self,
        path: Path | str,
        keys: Mapping[str, str] = TEXT_KEYS,
        id_key: str | None = None,
        format: str | None = None,
    ) -> None:
        self.keys, self.id_key = dict(keys), id_key
        self.number = self.read = 0
        self.problems = Problems()
        self._source = _source(path, format)
        self.name = "stdin" if str(path) == STDIN else str(path)
        self.size = self._source.size if isinstance(self._source, File) else None
        if self._is_text and (len(self.keys) > 1 or id_key is not None):
            raise InputError(f"{self.name} has a text a line, and no columns: give JSON lines, CSV, TSV or Parquet")
        if not isinstance(self._source, Stdin):  # which can be read once
            next(iter(self))

    def __iter__(self) -> Iterator[Row]:
        self.number = self.read = 0
        self.problems = Problems()
        for place, record in self._records():
            where = f"{self.name}, {'row' if self._is_table else 'line'} {place}"
            row = self._row(record, where)
            self.number += 1
            yield row
        if not self.number:
            raise InputError(f"{self.name} is empty")

    @property
    def columns(self) -> dict[str, str]:
        """All that are read, by the options that name them."""
        return self.keys if self.id_key is None else {**self.keys, "--id-key": self.id_key}

    @property
    def _is_text(self) -> bool:
        return not self._is_table and getattr(self._source, "format", None) in ("txt", "md")

    @property
    def _is_table(self) -> bool:
        return isinstance(self._source, Dataset) or self._source.format == "parquet"

    def _row(self, record: Mapping[str, Any] | None, where: str) -> Row:
        if record is None:
            return Row(None if self.id_key else self.number, ("",) * len(self.keys))
        texts = tuple(self._text(record, key, where) for key in self.keys.values())
        if self.id_key is None:
            return Row(self.number, texts)
        name = record.get(self.id_key)
        if name is None:
            self.problems.add(f"no id at {self.id_key!r}", where)
        return Row(name, texts)

    def _text(self, record: Mapping[str, Any], key: str, where: str) -> str:
        text = record.get(key)
        if not isinstance(text, str):
            self.problems.add(f"no text at {key!r} (taken as empty)", where)
            return ""
        if not text.isascii() and _SURROGATE.search(text):
            self.problems.add(_NOT_UTF8, where)
            return _SURROGATE.sub("\ufffd", text)
        return text

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
            (key,) = self.keys.values()
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
