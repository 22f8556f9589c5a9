"""Documents of Markdown: a heading of level 1 or 2 begins one; of paragraphs and list items the text is kept."""

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastbert.data.documents import Document, Problems

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

_MARKDOWN_CHARACTERS = 1 << 20


def markdown_pieces(lines: Iterator[tuple[int, str]], name: str, problems: Problems) -> Iterator[Document]:
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
            problems.add("a section of code, tables or HTML only", f"{document.file}, line {document.line + line}")

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
        problems.add("Markdown without text", document.where)


@functools.cache
def _markdown() -> "MarkdownIt":
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark").enable(["table", "strikethrough"])
