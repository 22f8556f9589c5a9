"""Files with a word a line, its tag in another column, and a blank line behind a sentence: as CoNLL has them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fastbert.data.documents import Problems
from fastbert.data.lines import Lines
from fastbert.data.readers import decoded, readable
from fastbert.data.sources import File, find
from fastbert.errors import InputError
from fastbert.terminal import counted

DOCUMENT = "-DOCSTART-"  # a line between documents
_BLANKS = re.compile(" +")  # other white space may be a word


@dataclass(frozen=True)
class Line:
    """A line of a file. Attributes: cells: its columns; none of a blank line.  is_comment: whether it is left out."""

    number: int
    text: str
    cells: list[str]
    is_comment: bool = False

    @property
    def is_word(self) -> bool:
        """Whether it is no blank line, comment, or line between documents."""
        return bool(self.cells) and not self.is_comment and DOCUMENT not in self.cells


@dataclass(frozen=True)
class ColumnFile:
    """Columns with tabs between, or blanks. A line that begins with # and has other columns than the rest is a comment.

    Attributes:
        text, label: which columns words and tags are in, from 1; None for the first and the last.
    """

    path: Path
    text: str | None = None
    label: str | None = None

    def sentences(self, problems: Problems) -> Iterator[tuple[list[str], list[str] | None, str]]:
        """Words, tags, and the place of each sentence; no tags where the words stand in the last column.

        Raises:
            InputError: if the file cannot be read, has no sentence, or lacks a column.
        """
        word, tag = self._column("--text", self.text, 0), self._column("--label", self.label, -1)
        words: list[str] = []
        tags: list[str] = []
        start = sentences = 0
        for line in [*self.lines(), Line(0, "", [])]:
            if line.is_comment:
                problems.add("a comment (left out)", f"{self.path}, line {line.number}")
            elif line.is_word:
                width = len(line.cells)
                if max(word, tag) >= width:
                    raise InputError(
                        f"{self.path}, line {line.number}: there is no column {max(word, tag) + 1}, but"
                        f" {counted(width, 'column')}"
                    )
                start = start if words else line.number
                words.append(line.cells[word])
                tags.append(line.cells[tag])
                labelled = word != tag % width
            elif words:
                sentences += 1
                yield words, tags if labelled else None, f"{self.path}, line {start}"
                words, tags = [], []
        if not sentences:
            raise InputError(f"{self.path} has no sentence")

    def lines(self) -> list[Line]:
        """All of them.

        Raises:
            InputError: if the file cannot be read, or a line has another number of columns.
        """
        read = [Line(number, text, _cells(text)) for number, text in self._texts()]
        words = [line for line in read if line.is_word]
        first = next((line for line in words if not line.text.startswith("#")), None) or next(iter(words), None)
        lines = []
        for line in read:
            if first is not None and line.is_word and len(line.cells) != len(first.cells):
                if not line.text.startswith("#"):
                    raise InputError(
                        f"{self.path}, line {line.number}: {counted(len(line.cells), 'column')}, but"
                        f" {len(first.cells)} in line {first.number}"
                    )
                line = replace(line, is_comment=True)
            lines.append(line)
        return lines

    def _texts(self) -> Iterator[tuple[int, str]]:
        (source,) = find([self.path], "txt")
        assert isinstance(source, File)
        unreadable = Problems()
        with readable(source), source.open() as file:
            lines = Lines(file, source.compression)
            for number, text in decoded(lines, str(self.path), unreadable):
                yield number, text.removesuffix("\n")
        if lines.damaged:
            raise InputError(f"{self.path} is a damaged or truncated {source.compression} file")
        for reason, places in unreadable.first.items():
            raise InputError(f"{places[0]}: {reason}, but UTF-8 is wanted")

    def _column(self, option: str, given: str | None, default: int) -> int:
        if given is None:
            return default
        if not given.isdecimal() or int(given) < 1:
            raise InputError(f"{option} must be the number of a column of {self.path}, from 1, but is {given!r}")
        return int(given) - 1


def _cells(text: str) -> list[str]:
    if not text.strip(" \t"):
        return []
    return text.split("\t") if "\t" in text else _BLANKS.split(text.strip(" "))
