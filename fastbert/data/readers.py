"""Documents from files: text, JSON lines, Markdown, each also gzipped. What cannot be read is counted, never silent."""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from fastbert.errors import InputError

_TEXT_KEYS = ("text", "paragraphs")
_KEPT_PROBLEMS = 100


@dataclass(frozen=True)
class Document:
    """A document as it came: its paragraphs, or its sentences, or Markdown that has yet to be parsed."""

    kind: str  # "paragraphs", "sentences", "markdown"
    texts: list[str]

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))


@dataclass
class Problems:
    """What was left out, by reason, and where the first of it was."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def add(self, reason: str, where: str) -> None:
        self.counts[reason] += 1
        if len(self.first) < _KEPT_PROBLEMS:
            self.first.append(f"{where}: {reason}")

    def __str__(self) -> str:
        return ", ".join(f"{count:,} x {reason}" for reason, count in self.counts.most_common())


@dataclass(frozen=True)
class Reader:
    """Reads documents from files.

    Attributes:
        text_key: where a JSON line has its text, a string or a list of paragraphs; None for "text" or "paragraphs".
        sentence_per_line: lines of text files are sentences, not parts of a paragraph.
    """

    text_key: str | None = None
    sentence_per_line: bool = False

    def read(self, path: Path, problems: Problems, progress: Callable[[int], None] | None = None) -> Iterator[Document]:
        """The documents of a file, in order.

        Args:
            progress: called with the number of bytes of the file that have just been read.

        Raises:
            InputError: if the file's name says nothing that is known.  OSError: if it cannot be read.
        """
        read = self._format(path)
        lines = _lines(path, problems, progress)
        yield from read(lines, str(path), problems)

    def check(self, path: Path) -> None:
        """Raises: InputError, if there is no such file, or its name says nothing that is known."""
        self._format(path)
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'there is no such file'}")

    def _format(self, path: Path) -> Callable[[Iterator[tuple[int, str]], str, Problems], Iterator[Document]]:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        suffix = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
        formats = {
            ".txt": self._text,
            ".text": self._text,
            ".jsonl": self._json_lines,
            ".ndjson": self._json_lines,
            ".json": self._json_lines,
            ".md": self._markdown,
            ".markdown": self._markdown,
        }
        if suffix not in formats:
            raise InputError(f"{path}: its name must end with one of {', '.join(formats)}, or one of these and .gz")
        return formats[suffix]

    def _text(self, lines: Iterator[tuple[int, str]], name: str, problems: Problems) -> Iterator[Document]:
        """Documents lie between blank lines."""
        kind = "sentences" if self.sentence_per_line else "paragraphs"
        block: list[str] = []
        for _, line in lines:
            if stripped := line.strip():
                block.append(stripped)
            elif block:
                yield Document(kind, block if self.sentence_per_line else [" ".join(block)])
                block = []
        if block:
            yield Document(kind, block if self.sentence_per_line else [" ".join(block)])

    def _json_lines(self, lines: Iterator[tuple[int, str]], name: str, problems: Problems) -> Iterator[Document]:
        keys = _TEXT_KEYS if self.text_key is None else (self.text_key,)
        for number, line in lines:
            if not line.strip():
                continue
            where = f"{name}, line {number}"
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                problems.add("not JSON", where)
                continue
            text = next((content[key] for key in keys if key in content), None) if isinstance(content, dict) else None
            paragraphs = [text] if isinstance(text, str) else text
            if not isinstance(paragraphs, list) or not all(isinstance(p, str) for p in paragraphs):
                problems.add(f"no text at {' or '.join(map(repr, keys))}", where)
                continue
            paragraphs = [p for text in paragraphs for p in text.splitlines() if p.strip()]
            if paragraphs:
                yield Document("paragraphs", paragraphs)
            else:
                problems.add("an empty document", where)

    def _markdown(self, lines: Iterator[tuple[int, str]], name: str, problems: Problems) -> Iterator[Document]:
        """A new document at each `#` or `##` heading."""
        block: list[str] = []
        fence = ""
        for _, line in lines:
            marker = re.match(r" {0,3}(```+|~~~+)", line)
            if marker and not fence:
                fence = marker[1]
            elif marker and marker[1].startswith(fence):
                fence = ""
            elif not fence and re.match(r"##? ", line):
                if any(text.strip() for text in block[1:]):
                    yield Document("markdown", ["".join(block)])
                block = []
            if not block and not line.startswith("#"):
                block.append("")  # what stands before any heading
            block.append(line)
        if any(text.strip() for text in block[1:]):
            yield Document("markdown", ["".join(block)])


def _lines(path: Path, problems: Problems, progress: Callable[[int], None] | None) -> Iterator[tuple[int, str]]:
    """Numbered lines, ended by \\n alone; those that are no UTF-8 are left out."""
    number = 0
    with path.open("rb") as raw:
        zipped = path.suffix.lower() == ".gz"
        file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if zipped else raw
        before = 0
        while True:
            try:
                line = file.readline()
            except (EOFError, zlib.error, gzip.BadGzipFile):
                problems.add("a damaged or truncated gzip file", f"{path}, after line {number}")
                break
            if not line:
                break
            number += 1
            if progress is not None and (number % 256 == 0 or len(line) > 1 << 16):
                progress(raw.tell() - before)
                before = raw.tell()
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                problems.add("not UTF-8", f"{path}, line {number}")
                continue
            yield number, text.removesuffix("\n").removesuffix("\r") + "\n"
        if progress is not None:
            progress(raw.tell() - before)
    if number == 0:
        problems.add("an empty file", str(path))


def markdown_paragraphs(source: str) -> list[str]:
    """The text of paragraphs and list items, without markup, headings, code blocks, images and HTML."""
    from markdown_it import MarkdownIt

    paragraphs = []
    in_heading = False
    for token in MarkdownIt("commonmark").parse(source):
        if token.type in ("heading_open", "heading_close"):
            in_heading = token.type == "heading_open"
        elif token.type == "inline" and not in_heading:
            pieces = []
            for child in token.children or ():
                if child.type in ("text", "code_inline"):
                    pieces.append(child.content)
                elif child.type in ("softbreak", "hardbreak"):
                    pieces.append(" ")
            if text := "".join(pieces).strip():
                paragraphs.append(text)
    return paragraphs
