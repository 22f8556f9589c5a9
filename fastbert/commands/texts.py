"""Texts that a command is given, one a line."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert.data.compression import kind_of
from fastbert.data.lines import Lines
from fastbert.errors import InputError
from fastbert.terminal import note

if TYPE_CHECKING:
    from fastbert.inference.tokens import Tokens

_MANY_UNKNOWN = 0.25


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


def warn_of_tokenizer(tokens: "Tokens", model: str) -> None:
    if tokens.unknown > _MANY_UNKNOWN * len(tokens.ids):
        note(f"warning: {tokens.unknown:,} of {len(tokens.ids):,} tokens are unknown to the tokenizer of {model}")
    vocabulary = Path(model) / "vocab.txt"
    settings = ("tokenizer.json", "tokenizer_config.json")
    if vocabulary.is_file() and not any((Path(model) / name).is_file() for name in settings):
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        if any(word != word.lower() and not word.startswith("[") for word in words):
            note(f"warning: {vocabulary} has capitals, but no tokenizer_config.json: transformers lower-cases the text")
