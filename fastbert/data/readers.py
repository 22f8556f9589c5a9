"""Documents from files: text, JSON lines, Markdown, each also gzipped. What cannot be read is counted, never silent."""

import codecs
import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastbert.data.lines import Lines, is_zipped
from fastbert.errors import InputError
from fastbert.terminal import counted

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_TEXT_KEYS = ("text", "paragraphs")
_KEPT_PER_REASON = 10
_MARKDOWN_CHARACTERS = 1 << 20
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Document:
    """A document as it came.

    Attributes:
        kind: what the texts are. "markdown" is source, of one document or of several.
        file, line: where it starts.
    """

    kind: Literal["paragraphs", "sentences", "markdown"]
    texts: list[str]
    file: str
    line: int

    @property
    def size(self) -> int:
        """Characters."""
        return sum(map(len, self.texts))


@dataclass
class Problems:
    """What was left out, by reason, and where the first of each reason was."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.update({reason: 1}, {reason: [where]})

    def update(self, counts: dict[str, int], first: dict[str, list[str]]) -> None:
        """Add those of what comes later in the text."""
        self.counts.update(counts)
        for reason, places in first.items():
            kept = self.first.setdefault(reason, [])
            kept += places[: _KEPT_PER_REASON - len(kept)]

    def __str__(self) -> str:
        return ", ".join(f"{count:,} x {reason}" for reason, count in sorted(self.counts.items()))


@dataclass(frozen=True)
class Reader:
    """Reads documents from files, whose lines end with \\n, \\r\\n or \\r.

    - `.txt`: a blank line ends a document; its lines are one paragraph, or sentences.
    - `.jsonl`, `.json`: each line is an object, and a document; lines of its text are paragraphs.
    - `.md`: a heading of level 1 or 2 begins a document. Of its markup only the text of paragraphs and list items is
      kept: no headings, code blocks, tables, images, HTML or front matter.

    Attributes:
        text_key: where a JSON line has its text, a string or a list of paragraphs; None for "text" or "paragraphs".
        sentence_per_line: the lines of text files are sentences.
        use_damaged: of a gzip file that is damaged or cut off, what can be read is used, and the rest a problem;
            otherwise the file cannot be read.
    """

    text_key: str | None = None
    sentence_per_line: bool = False
    use_damaged: bool = False

    def read(
        self, path: Path, name: str, problems: Problems, progress: Callable[[int], None] | None = None
    ) -> Iterator[Document]:
        """The documents of a file, in order.

        Args:
            name: of the file, in messages.
            progress: called with the number of bytes of the file that have just been read.

        Raises:
            InputError: if the file cannot be read; of a damaged one when all documents that it has have come.
        """
        known = problems.counts.total()
        documents = 0
        try:
            with path.open("rb") as file:
                lines = Lines(file, zipped=is_zipped(path), progress=progress)
                for document in self._format(path)(_decoded(lines, name, problems), name, problems):
                    documents += 1
                    yield document
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if lines.damaged:
            read = counted(lines.number, "line") if lines.number else "nothing"
            if lines.number and self._format(path) != self._markdown:  # which reads many documents as one
                read += f" with {counted(documents, 'document')}"
            if not self.use_damaged:
                raise InputError(
                    f"{path} is a damaged or truncated gzip file ({read} can be read): fetch it again, or leave out"
                    " the rest with --use-damaged"
                )
            problems.add("the rest of a damaged or truncated gzip file", f"{name} ({read} read)")
        if not documents and problems.counts.total() == known:
            problems.add("a file without text", name)

    def check(self, path: Path) -> None:
        """Raises: InputError, if there is no such file, its name says nothing that is known, or it is no JSON lines."""
        kind = self._format(path)
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'there is no such file'}")
        if kind != self._json_lines:
            return
        try:
            with path.open("rb") as file:
                start = next(Lines(file, zipped=is_zipped(path)).chunks(), b"")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise InputError(
                f"{path} is a JSON array, but JSON lines are wanted, an object a line: jq -c '.[]' makes them of it"
            )

    def _format(self, path: Path) -> Callable[[Iterator[tuple[int, str]], str, Problems], Iterator[Document]]:
        suffixes = [suffix.lower() for suffix in path.suffixes]
        suffix = suffixes[-2] if is_zipped(path) and len(suffixes) > 1 else (suffixes or [""])[-1]
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
        def document() -> Document:
            if self.sentence_per_line:
                return Document("sentences", block, name, start)
            return Document("paragraphs", [" ".join(block)], name, start)

        block: list[str] = []
        start = 0
        for number, line in lines:
            if stripped := line.strip():
                start = start if block else number
                block.append(stripped)
            elif block:
                yield document()
                block = []
        if block:
            yield document()

    def _json_lines(self, lines: Iterator[tuple[int, str]], name: str, problems: Problems) -> Iterator[Document]:
        keys = _TEXT_KEYS if self.text_key is None else (self.text_key,)
        for number, line in lines:
            if not line.strip():
                continue
            where = _where(name, number)
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                if line.endswith("\n"):  # what a damaged file ends with is a problem already
                    problems.add("not JSON", where)
                continue
            if not isinstance(content, dict):
                problems.add("not a JSON object", where)
                continue
            found = [content.get(key) for key in keys]
            text = next((value for value in found if value is not None), None)
            texts = [text] if isinstance(text, str) else text
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                problems.add(f"no text at {' or '.join(map(repr, keys))}", where)
                continue
            paragraphs = [line for text in texts for line in text.splitlines() if line.strip()]
            if not paragraphs:
                problems.add("an empty document", where)
            elif "\\u" in line and not _is_unicode(paragraphs):  # bytes that are UTF-8 cannot say such a thing
                problems.add("half a surrogate pair", where)
            else:
                yield Document("paragraphs", paragraphs, name, number)

    def _markdown(self, lines: Iterator[tuple[int, str]], name: str, problems: Problems) -> Iterator[Document]:
        """Whole files, for references to links may be defined anywhere; large ones in pieces, cut at headings."""
        block: list[str] = []
        start, size = 1, 0
        fence = ""
        front_matter = False
        for number, line in lines:
            if number == 1 and line.rstrip() == "---":
                front_matter = True
                continue
            if front_matter and number == 2 and not re.match(r"[\w-]+\s*:|#", line):
                front_matter = False  # that was a rule
            if front_matter:
                front_matter = line.rstrip() not in ("---", "...")
                continue
            if fence:
                fence = "" if re.match(rf" {{0,3}}{fence}{fence[0]}*\s*$", line) else fence
            elif marker := re.match(r" {0,3}(```+|~~~+)", line):
                fence = marker[1]
            elif size >= _MARKDOWN_CHARACTERS and re.match(r" {0,3}##?\s", line):
                yield Document("markdown", ["".join(block)], name, start)
                block, size = [], 0
            if not block:
                start = number
            # Lines that were left out keep their numbers.
            block += ["\n"] * (number - start - len(block))
            block.append(line)
            size += len(line)
        if front_matter:
            problems.add("front matter without an end", name)
        if any(not line.isspace() for line in block):
            yield Document("markdown", ["".join(block)], name, start)


def markdown_documents(document: Document, problems: Problems) -> Iterator[Document]:
    """The documents of a piece of Markdown, as paragraphs."""
    paragraphs: list[str] = []
    line = 0
    other = in_heading = in_table = False
    nothing = True

    def finished() -> Iterator[Document]:
        nonlocal nothing
        nothing = nothing and not paragraphs and not other
        if paragraphs:
            yield Document("paragraphs", paragraphs, document.file, document.line + line)
        elif other:
            problems.add("a section of code, tables or HTML only", _where(document.file, document.line + line))

    for token in _markdown().parse(document.texts[0]):
        if token.type == "heading_open":
            in_heading = True
            if token.level == 0 and token.tag in ("h1", "h2"):
                yield from finished()
                paragraphs, other, line = [], False, (token.map or [0])[0]
        elif token.type == "heading_close":
            in_heading = False
        elif token.type in ("table_open", "table_close"):
            in_table = token.type == "table_open"
            other = True
        elif token.type in ("fence", "code_block", "html_block"):
            other = True
        elif token.type == "inline" and not in_heading and not in_table:
            pieces = []
            for child in token.children or ():
                if child.type in ("text", "code_inline"):
                    pieces.append(child.content)
                elif child.type in ("softbreak", "hardbreak") or child.content.lower().startswith("<br"):
                    pieces.append(" ")
            if text := "".join(pieces).strip():
                paragraphs.append(text)
            else:
                other = True
    yield from finished()
    if nothing:
        problems.add("Markdown without text", _where(document.file, document.line))


@functools.cache
def _markdown() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable(["table", "strikethrough"])


def _decoded(lines: Lines, name: str, problems: Problems) -> Iterator[tuple[int, str]]:
    """Numbered lines with \\n, without it the part of one that a damaged file ends with; none that is not UTF-8."""
    for line in lines:
        if lines.number == 1 and line.startswith(_UTF16):
            problems.add("a file in UTF-16", name)
            break
        decoder = codecs.getincrementaldecoder("utf-8-sig" if lines.number == 1 else "utf-8")()
        try:
            text = decoder.decode(line, final=not lines.partial)
        except UnicodeDecodeError:
            problems.add("not UTF-8", _where(name, lines.number))
            continue
        if text or not lines.partial:
            yield lines.number, text if lines.partial else text + "\n"


def _where(name: str, line: int) -> str:
    return f"{name}, line {line}"


def _is_unicode(texts: list[str]) -> bool:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True
