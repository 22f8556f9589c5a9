"""Rows of texts from a file or stdin, one for each that is there, in order, whatever is wrong with it."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from fastbert.data.documents import Problems
from fastbert.data.records import Records
from fastbert.inference.stream import Item

TEXT_KEYS = {"--text-key": "text"}
Texts = Callable[[Mapping[str, Any], str, Problems], tuple[Any, ...]]
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOT_UTF8 = "not UTF-8 (read with \ufffd for what is not)"


class Row(NamedTuple):
    """Attributes: id: what stands at the id key, or the number of the row, from 0.  texts: one for each key, or what
    `Rows` was told to make of them.
    """

    id: Any
    texts: tuple[Any, ...]

    @property
    def item(self) -> Item:
        """What an engine takes: a text, or several."""
        return cast(Item, self.texts[0]) if len(self.texts) == 1 else self.texts


class Rows:
    """The rows of a text file (a line each), of JSON lines, CSV, TSV or Parquet. Memory is that of some.

    An empty text is a row, too. What cannot be read in the midst is a row with an empty text, counted; what is not
    UTF-8 has U+FFFD there, and is counted.

    Args:
        path: "-" for stdin, or dataset:NAME:SPLIT.
        keys: columns with the texts, by the options that name them. A text file has one.
        id_key: the column with the ids.
        format: as in `Records`.
        texts: from a record, its place and where problems are counted to what an engine takes; of {} something, too.

    Attributes:
        noun: what a row is, in messages.
        name, size, number, read, problems: of `Records`.

    Raises:
        InputError: see `Records`.
    """

    def __init__(
        self,
        path: Path | str,
        keys: Mapping[str, str] = TEXT_KEYS,
        id_key: str | None = None,
        format: str | None = None,
        texts: Texts | None = None,
    ) -> None:
        self.keys, self.id_key = dict(keys), id_key
        self.noun = "row" if texts is not None else "text" if len(self.keys) == 1 else "pair"
        self._texts = self._of_keys if texts is None else texts
        self._records = Records(path, self.keys if id_key is None else {**self.keys, "--id-key": id_key}, format)
        self.name, self.size = self._records.name, self._records.size
        if self._records.can_be_read_again:
            next(iter(self))

    @property
    def number(self) -> int:
        return self._records.number

    @property
    def read(self) -> int:
        return self._records.read

    @property
    def problems(self) -> Problems:
        return self._records.problems

    @property
    def columns(self) -> dict[str, str]:
        """All that are read, by the options that name them."""
        return self._records.columns

    def __iter__(self) -> Iterator[Row]:
        for number, (place, record) in enumerate(self._records):
            yield self._row(number, record, self._records.where(place))

    def _row(self, number: int, record: Mapping[str, Any] | None, where: str) -> Row:
        if record is None:
            return Row(None if self.id_key else number, self._texts({}, where, Problems()))
        texts = self._texts(record, where, self.problems)
        if self.id_key is None:
            return Row(number, texts)
        name = record.get(self.id_key)
        if name is None:
            self.problems.add(f"no id at {self.id_key!r}", where)
        return Row(name, texts)

    def _of_keys(self, record: Mapping[str, Any], where: str, problems: Problems) -> tuple[str, ...]:
        return tuple(as_text(record, key, where, problems) for key in self.keys.values())


def as_text(record: Mapping[str, Any], key: str, where: str, problems: Problems) -> str:
    """The text at a key; what is none is empty, and a problem, as what is not UTF-8 is."""
    text = record.get(key)
    if not isinstance(text, str):
        problems.add(f"no text at {key!r} (taken as empty)", where)
        return ""
    return as_unicode(text, where, problems)


def as_unicode(text: str, where: str, problems: Problems) -> str:
    """With U+FFFD, and a problem, for what no encoding of Unicode can hold."""
    if not text.isascii() and _SURROGATE.search(text):
        problems.add(_NOT_UTF8, where)
        return _SURROGATE.sub("\ufffd", text)
    return text
