"""Documents from what is given. What cannot be read is counted, never silent."""

import codecs
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fastbert.data.datasets import Dataset
from fastbert.data.documents import Document, Problems
from fastbert.data.lines import Lines
from fastbert.data.markdown import markdown_pieces
from fastbert.data.sources import File, Source, Stdin
from fastbert.data.tables import Row, csv_rows, parquet_rows
from fastbert.errors import InputError
from fastbert.terminal import counted

_TEXT_KEYS = ("text", "paragraphs")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
DELIMITERS = {"csv": ",", "tsv": "\t"}
Progress = Callable[[int], None]
Unit: TypeAlias = Literal["line", "row"]


@dataclass(frozen=True)
class Reader:
    """Reads documents. Lines end with \\n, \\r\\n or \\r.

    - text: a blank line ends a document; its lines are one paragraph, or sentences.
    - JSON lines: each is an object, and a document; lines of its text are paragraphs. So are rows of CSV, TSV and
      Parquet files and of datasets.
    - Markdown: a heading of level 1 or 2 begins a document. Of its markup only the text of paragraphs and list items is
      kept: no headings, code blocks, tables, images, HTML or front matter.

    Attributes:
        text_key: where a row has its text, a string or a list of paragraphs; None for "text" or "paragraphs".
        sentence_per_line: the lines of text files are sentences.
        use_damaged: of a compressed file that is damaged or cut off, what can be read is used, and the rest a problem;
            otherwise the file cannot be read.
        strict: nothing is left out: the first problem is an error.
    """

    text_key: str | None = None
    sentence_per_line: bool = False
    use_damaged: bool = False
    strict: bool = False

    def read(
        self, source: Source, name: str, problems: Problems, progress: Progress | None = None
    ) -> Iterator[Document]:
        """The documents of a source, in order.

        Args:
            name: of the source, in messages.
            progress: called with the number of bytes of the source that have just been read.

        Raises:
            InputError: if it cannot be read; of a damaged file when all documents that it has have come.
        """
        known = problems.counts.total()
        progress = progress or (lambda count: None)
        if isinstance(source, File) and source.format is None:
            problems.add("a file of an unknown kind", name)
            return
        documents = 0
        for document in self._documents(source, name, problems, progress):
            documents += 1
            yield document
        if not documents and problems.counts.total() == known:
            problems.add("a file without text", name)

    def check(self, source: Source) -> None:
        """What can be seen before the text is read.

        Raises:
            InputError: if its columns are others, or it is no JSON lines.
        """
        if isinstance(source, Dataset):
            self._check_columns(source.name, source.columns)
        elif not isinstance(source, File):
            return
        elif source.format in (*DELIMITERS, "parquet"):
            next(self._documents(source, str(source.path), Problems(), lambda count: None), None)
        elif source.format == "jsonl":
            with readable(source), source.open() as file:
                start = next(Lines(file, source.compression).chunks(), b"")
            if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                raise InputError(
                    f"{source.path} is a JSON array, but JSON lines are wanted, an object a line: jq -c '.[]' makes"
                    " them of it"
                )

    def _documents(self, source: Source, name: str, problems: Problems, progress: Progress) -> Iterator[Document]:
        def check(columns: Sequence[str]) -> None:
            self._check_columns(str(source.path) if isinstance(source, File) else source.name, columns)

        if isinstance(source, Dataset):
            rows = _counting(source.rows(self._keys), progress)
            yield from self._of_rows(rows, name, "row", problems)
        elif isinstance(source, File) and source.format == "parquet":
            rows = parquet_rows(source.path, self._keys, check, progress)
            yield from self._of_rows(rows, name, "row", problems)
        else:
            yield from self._of_lines(source, name, problems, check, progress)

    def _of_lines(
        self,
        source: File | Stdin,
        name: str,
        problems: Problems,
        check: Callable[[Sequence[str]], None],
        progress: Progress,
    ) -> Iterator[Document]:
        documents = 0
        with readable(source), source.open() as file:
            lines = Lines(file, source.compression, progress)
            for document in self._of_format(source.format, lines, name, problems, check):
                documents += 1
                yield document
        if lines.damaged:
            read = counted(lines.number, "line") if lines.number else "nothing"
            if lines.number and source.format != "md":  # which reads many documents as one
                read += f" with {counted(documents, 'document')}"
            reason = f"damaged or truncated {source.compression} file"
            if not self.use_damaged:
                assert isinstance(source, File)
                raise InputError(
                    f"{source.path} is a {reason} ({read} can be read): fetch it again, or leave out the rest with"
                    " --use-damaged"
                )
            problems.add(f"the rest of a {reason}", f"{name} ({read} read)")

    def _of_format(
        self,
        format: str | None,
        lines: Lines,
        name: str,
        problems: Problems,
        check: Callable[[Sequence[str]], None],
    ) -> Iterator[Document]:
        if format == "txt":
            return self._text(decoded(lines, name, problems), name)
        if format == "md":
            return markdown_pieces(decoded(lines, name, problems), name, problems)
        if format == "jsonl":
            return self._json_lines(decoded(lines, name, problems), name, problems)
        # All lines, for a cell may have several; a row whose text is no UTF-8 is left out.
        every = decoded(lines, name, problems, "surrogateescape")
        rows = csv_rows(every, DELIMITERS[str(format)], name, problems, check)
        return self._of_rows(((line, row) for line, row in rows if row), name, "line", problems)

    def _text(self, lines: Iterator[tuple[int, str]], name: str) -> Iterator[Document]:
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
        for number, line in lines:
            if not line.strip():
                continue
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                if line.endswith("\n"):  # what a damaged file ends with is a problem already
                    problems.add("not JSON", _where(name, number))
                continue
            if not isinstance(content, dict):
                problems.add("not a JSON object", _where(name, number))
                continue
            no_unicode = "half a surrogate pair" if "\\u" in line else None  # UTF-8 says it in no other way
            if document := self._of_row(content, name, number, "line", problems, no_unicode):
                yield document

    def _of_rows(self, rows: Iterable[Row], name: str, unit: Unit, problems: Problems) -> Iterator[Document]:
        for number, row in rows:
            if document := self._of_row(row, name, number, unit, problems, "not UTF-8"):
                yield document

    def _of_row(
        self, row: Mapping[str, Any], name: str, number: int, unit: Unit, problems: Problems, no_unicode: str | None
    ) -> Document | None:
        """Args: no_unicode: what text that has surrogates is; None if it has none."""
        found = [row.get(key) for key in self._keys]
        text = next((value for value in found if value is not None), None)
        texts = [text] if isinstance(text, str) else text
        reason = None
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            reason = f"no text at {self._named_keys}"
        else:
            paragraphs = [line for text in texts for line in text.splitlines() if line.strip()]
            if not paragraphs:
                reason = "an empty document"
            elif no_unicode and not _is_unicode(paragraphs):
                reason = no_unicode
        if reason is None:
            return Document("paragraphs", paragraphs, name, number, unit)
        problems.add(reason, f"{name}, {unit} {number}")
        return None

    @property
    def _keys(self) -> Sequence[str]:
        return _TEXT_KEYS if self.text_key is None else (self.text_key,)

    @property
    def _named_keys(self) -> str:
        return " or ".join(map(repr, self._keys))

    def _check_columns(self, source: str, columns: Sequence[str]) -> None:
        if not any(key in columns for key in self._keys):
            raise InputError(
                f"{source} has no column {self._named_keys}, but {', '.join(map(repr, columns))}: --text-key names the"
                " one with the text"
            )


@contextlib.contextmanager
def readable(source: File | Stdin) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        name = source.path if isinstance(source, File) else source.name
        raise InputError(f"cannot read {name}: {error.strerror or error}") from error


def _counting(rows: Iterable[Row], progress: Progress) -> Iterator[Row]:
    """Rows of which nobody knows how many bytes they were."""
    for number, row in rows:
        progress(sum(len(value) for value in row.values() if isinstance(value, str)))
        yield number, row


def decoded(lines: Lines, name: str, problems: Problems, errors: str = "strict") -> Iterator[tuple[int, str]]:
    """Numbered lines with \\n, without it the part of one that a damaged file ends with; none that is not UTF-8.

    Args: errors: as `bytes.decode` has it.
    """
    for line in lines:
        if lines.number == 1 and line.startswith(_UTF16):
            problems.add("a file in UTF-16", name)
            break
        decoder = codecs.getincrementaldecoder("utf-8-sig" if lines.number == 1 else "utf-8")(errors)
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
