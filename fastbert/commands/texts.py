"""Texts that a command is given, one a line."""

import sys
from pathlib import Path

from fastbert.data.compression import kind_of
from fastbert.data.lines import Lines
from fastbert.errors import InputError
from fastbert.terminal import note


def read_texts(path: Path) -> list[str]:
    """The lines of a UTF-8 file, compressed if its name says so, or of stdin for -; \\n, \\r\\n or \\r end one."""
    if str(path) == "-":
        if sys.stdin.isatty():
            note("reading texts from the terminal, one a line; Ctrl-D ends them")
        return _decoded(Lines(sys.stdin.buffer), "stdin")
    with path.open("rb") as file:
        return _decoded(Lines(file, kind_of(path)), str(path), kind_of(path))


def _decoded(lines: Lines, name: str, compression: str | None = None) -> list[str]:
    texts = []
    for line in lines:
        if lines.damaged:
            break
        try:
            texts.append(line.decode("utf-8-sig" if lines.number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"{name}, line {lines.number}: not UTF-8") from error
    if lines.damaged:
        raise InputError(f"{name} is a damaged or truncated {compression} file, after line {len(texts):,}")
    if not texts:
        raise InputError(f"{name} is empty")
    return texts
