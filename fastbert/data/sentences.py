"""Sentences of paragraphs."""

import re
from collections.abc import Iterator

from fastbert.errors import InputError, require

_WINDOW = 1 << 13


def check_language(language: str) -> None:
    """Raises: InputError, if that is no code of a language, or sentencex is missing."""
    if not re.fullmatch(r"[a-z]{2,3}(-[a-z]+)*", language):
        raise InputError(f"the language must be a code like en or zh, but is {language}")
    require("sentencex", to="prepare text")


def split(paragraph: str, language: str = "en") -> Iterator[str]:
    """The sentences of a paragraph, without the space around them, none of them blank."""
    for sentence in _segments(paragraph, language):
        if stripped := sentence.strip():
            yield stripped


def _segments(text: str, language: str) -> Iterator[str]:
    """Long paragraphs go through sentencex in windows, for its time grows with the square of their sentences.

    Of a window its first half counts: in the second, a quotation may lack its end. One unpaired quotation mark also
    spoils less of the text so.
    """
    import sentencex

    start, window = 0, _WINDOW
    while len(text) - start > window:
        end = start
        for segment in sentencex.segment(language, text[start : start + window]):
            if end + len(segment) - start > window // 2:
                break
            yield segment
            end += len(segment)
        window = _WINDOW if end > start else 2 * window
        start = end
    yield from sentencex.segment(language, text[start:])
