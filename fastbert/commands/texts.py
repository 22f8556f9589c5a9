"""Texts that a command is given."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastbert.terminal import note

if TYPE_CHECKING:
    from fastbert.inference.inputs import Rows

_MANY_UNKNOWN = 0.25


def read_texts(path: Path) -> list[str]:
    """All texts of a file, at once."""
    from fastbert.inference.inputs import Rows

    rows = Rows(path)
    say_who_is_waited_for(rows)
    texts = [row.texts[0] for row in rows]
    warn_of_rows(rows)
    return texts


def say_who_is_waited_for(rows: "Rows") -> None:
    if rows.name == "stdin" and sys.stdin.isatty():
        note("reading texts from the terminal, one a line; Ctrl-D ends them")


def warn_of_rows(rows: "Rows") -> None:
    for reason, count in sorted(rows.problems.counts.items()):
        note(f"warning: {count:,} x {reason}, first in {rows.problems.first[reason][0]}")


def warn_of_tokenizer(unknown: int, tokens: int, model: str) -> None:
    if unknown > _MANY_UNKNOWN * tokens:
        note(f"warning: {unknown:,} of {tokens:,} tokens are unknown to the tokenizer of {model}")
    vocabulary = Path(model) / "vocab.txt"
    settings = ("tokenizer.json", "tokenizer_config.json")
    if vocabulary.is_file() and not any((Path(model) / name).is_file() for name in settings):
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        if any(word != word.lower() and not word.startswith("[") for word in words):
            note(f"warning: {vocabulary} has capitals, but no tokenizer_config.json: transformers lower-cases the text")
