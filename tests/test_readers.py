"""Documents and sentences: what each format means, and what becomes of what cannot be read."""

import errno
import gzip
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from fastbert.data import lines, markdown, sentences, sources
from fastbert.data.documents import Problems
from fastbert.data.lines import Lines
from fastbert.data.readers import Reader
from fastbert.data.sources import File
from fastbert.errors import InputError
from tests.optional import needs
from tests.stores import FABLES, fables, read_documents

Read = tuple[list[list[str]], list[int], dict[str, list[str]]]


def _read(path: Path, content: str | bytes | None = None, **options: Any) -> Read:
    """Texts of each document, the line where each starts, and problems."""
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_documents(path, **options)


class TestText:
    def test_blank_lines_part_documents(self, tmp_path: Path) -> None:
        texts, lines, problems = _read(tmp_path / "a.txt", "\n One\ntwo. \n\n \t\nThree.\r\n\r\nfour")
        assert texts == [["One two."], ["Three."], ["four"]]
        assert lines == [2, 6, 8]
        assert not problems

    def test_a_sentence_a_line(self, tmp_path: Path) -> None:
        texts, _, _ = _read(tmp_path / "a.txt", "One. Two.\nThree\n\nFour\n", sentence_per_line=True)
        assert texts == [["One. Two.", "Three"], ["Four"]]

    def test_only_newlines_end_lines(self, tmp_path: Path) -> None:
        texts, _, _ = _read(tmp_path / "a.txt", "a\u2028b\x0cc\x85d\n", sentence_per_line=True)
        assert texts == [["a\u2028b\x0cc\x85d"]]

    @pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 16])
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_each_newline_ends_lines(
        self, tmp_path: Path, end: str, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wherever the chunks of a file end."""
        monkeypatch.setattr(lines, "_CHUNK", chunk)
        content = f"One{end}two.{end}{end} {end}Three.{end}"
        texts, numbers, _ = _read(tmp_path / "a.txt", content, sentence_per_line=True)
        assert texts == [["One", "two."], ["Three."]]
        assert numbers == [1, 5]
        assert _read(tmp_path / "a.txt.gz", gzip.compress(content.encode()), sentence_per_line=True)[0] == texts
        assert _read(tmp_path / "a.md", f"# A{end}One{end}two.{end}{end}Three.{end}# B{end}Four.")[0] == [
            ["One two.", "Three."],
            ["Four."],
        ]
        assert _read(tmp_path / "a.jsonl", f'{{"text": "One."}}{end}{{"text": "Two."}}{end}')[0] == [["One."], ["Two."]]

    @pytest.mark.parametrize("chunk", [1, 2, 1 << 16])
    def test_newlines_of_all_kinds_in_a_file(self, tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lines, "_CHUNK", chunk)
        texts, numbers, _ = _read(tmp_path / "a.txt", "a\rb\nc\r\nd\n\re\r\r\nf\r\n\ng")
        assert texts == [["a b c d"], ["e"], ["f"], ["g"]]
        assert numbers == [1, 6, 8, 10]

    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path) -> None:
        assert _read(tmp_path / "a.txt", b"\xef\xbb\xbfone\n\n\xef\xbb\xbftwo")[0] == [["one"], ["\ufefftwo"]]

    def test_lines_that_are_not_utf8(self, tmp_path: Path) -> None:
        texts, _, problems = _read(tmp_path / "a.txt", b"one\ncaf\xe9\ntwo\n\n\xff\nthree")
        assert texts == [["one two"], ["three"]]
        assert problems == {"not UTF-8": ["a.txt, line 2", "a.txt, line 5"]}

    def test_utf16_is_left_out_as_a_whole(self, tmp_path: Path) -> None:
        texts, _, problems = _read(tmp_path / "a.txt", "one\n\ntwo\n".encode("utf-16"))
        assert not texts
        assert problems == {"a file in UTF-16": ["a.txt"]}

    @pytest.mark.parametrize("content", ["", "\n \n\t\n"])
    @pytest.mark.parametrize("suffix", ["txt", "jsonl", "md", "txt.gz"])
    def test_files_without_text(self, tmp_path: Path, content: str, suffix: str) -> None:
        raw = gzip.compress(content.encode()) if suffix.endswith("gz") else content
        texts, _, problems = _read(tmp_path / f"a.{suffix}", raw)
        assert not texts
        assert problems == {"a file without text": [f"a.{suffix}"]}


class TestJsonLines:
    def test_text_or_paragraphs(self, tmp_path: Path) -> None:
        lines = [
            {"text": "One.\nTwo.\n\n \nThree."},
            {"text": None, "paragraphs": ["Four.", "", "Five.\nSix."]},
            {"title": "left out", "text": "Seven."},
        ]
        texts, numbers, problems = _read(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
        assert texts == [["One.", "Two.", "Three."], ["Four.", "Five.", "Six."], ["Seven."]]
        assert numbers == [1, 3, 5]
        assert not problems

    def test_another_key(self, tmp_path: Path) -> None:
        texts, _, problems = _read(
            tmp_path / "a.json", '{"body": "One.", "text": "no"}\n{"text": "no"}', text_key="body"
        )
        assert texts == [["One."]]
        assert problems == {"no text at 'body'": ["a.json, line 2"]}

    def test_every_fault_of_a_line_is_counted(self, tmp_path: Path) -> None:
        lines = {
            "{": "not JSON",
            '{"text": "One."} {': "not JSON",
            "[" * 200_000: "not JSON",
            '["text"]': "not a JSON object",
            '"text"': "not a JSON object",
            '{"title": "One."}': "no text at 'text' or 'paragraphs'",
            '{"text": 1}': "no text at 'text' or 'paragraphs'",
            '{"paragraphs": ["One.", 2]}': "no text at 'text' or 'paragraphs'",
            '{"text": " \\n "}': "an empty document",
            '{"paragraphs": []}': "an empty document",
            '{"text": "\\ud83d"}': "half a surrogate pair",
        }
        texts, numbers, problems = _read(tmp_path / "a.jsonl", "\n".join(lines) + '\n{"text": "Good \\ud83d\\ude00"}')
        assert texts == [["Good 😀"]]
        assert numbers == [len(lines) + 1]
        expected: dict[str, list[str]] = {}
        for number, reason in enumerate(lines.values(), 1):
            expected.setdefault(reason, []).append(f"a.jsonl, line {number}")
        assert problems == expected

    @pytest.mark.parametrize("suffix", ["json", "jsonl", "ndjson.gz"])
    @pytest.mark.parametrize(
        "content", ['[{"text": "One."}]', '[\n  {\n    "text": "One."\n  }\n]\n', '\ufeff\r\n \t["One.", "Two."]', "[]"]
    )
    def test_an_array_is_no_lines(self, tmp_path: Path, content: str, suffix: str) -> None:
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
        with pytest.raises(InputError, match=rf"{path} is a JSON array, but JSON lines are wanted, an object a line"):
            Reader().check(File.of(path))

    def test_what_is_no_array(self, tmp_path: Path) -> None:
        for content in (b'{"text": ["One."]}', b"", b"\n\n", b"\xff["):
            (tmp_path / "a.json").write_bytes(content)
            Reader().check(File.of(tmp_path / "a.json"))
        for name in ("a.txt", "a.md"):
            (tmp_path / name).write_text("[1] One.")
            Reader().check(File.of(tmp_path / name))
        (tmp_path / "a.json.gz").write_bytes(b"[damaged")
        Reader().check(File.of(tmp_path / "a.json.gz"))


MARKDOWN = """\
---
title: not text
---
Before *any*
heading.

# One

A *first* __paragraph__ with `code`, a [link](http://x.y "title"), a [reference][r], an ![image](i.png "not text"),
<b>bold</b>, ~~struck~~ &amp; \\*escaped\\*, one<br/>two and <http://a.b>.

- an item
- another

  with two paragraphs
***
> quoted
> text

### Deeper

still the first.

```
# not a heading
```

Two
---
    code
| a | b |
|---|---|
| 1 | 2 |

Three
=====

## Four ##
The last
one.

[r]: http://somewhere.else
"""


class TestMarkdown:
    def test_markup_goes_and_headings_begin_documents(self, tmp_path: Path) -> None:
        texts, lines, problems = _read(tmp_path / "a.md", MARKDOWN)
        assert texts == [
            ["Before any heading."],
            [
                "A first paragraph with code, a link, a reference, an ,"
                " bold, struck & *escaped*, one two and http://a.b.",
                "an item",
                "another",
                "with two paragraphs",
                "quoted text",
                "still the first.",
            ],
            ["The last one."],
        ]
        assert [MARKDOWN.splitlines()[line - 1] for line in lines] == ["Before *any*", "# One", "## Four ##"]
        assert problems == {"a section of code, tables or HTML only": ["a.md, line 28"]}

    def test_front_matter_is_not_a_rule(self, tmp_path: Path) -> None:
        assert _read(tmp_path / "a.md", "---\none\n---\ntwo")[0] == [["two"]]  # a rule, and a heading
        assert _read(tmp_path / "a.md", "---\n\none\n\n---\n\ntwo")[0] == [["one", "two"]]
        texts, _, problems = _read(tmp_path / "a.md", "---\na: b\n\none\n")
        assert not texts
        assert problems == {"front matter without an end": ["a.md"]}

    def test_headings_only(self, tmp_path: Path) -> None:
        assert _read(tmp_path / "a.md", "# One\n## Two\n")[2] == {"Markdown without text": ["a.md, line 1"]}

    def test_lines_that_are_not_utf8_keep_their_numbers(self, tmp_path: Path) -> None:
        texts, lines, _ = _read(tmp_path / "a.md", b"# A\n\xff\n\xff\none\n# B\ntwo\n")
        assert texts == [["one"], ["two"]]
        assert lines == [1, 5]

    def test_large_files_are_parsed_in_pieces(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        section = "## {0}\n\ntext {0}\n\n````\n```\n# no heading\n````\n\n### {0}.1\nmore\n"
        (tmp_path / "a.md").write_text("".join(section.format(i) for i in range(50)))
        whole = _read(tmp_path / "a.md")
        monkeypatch.setattr(markdown, "_MARKDOWN_CHARACTERS", 200)
        pieces = list(Reader().read(File.of(tmp_path / "a.md"), "a.md", Problems()))
        assert len(pieces) > 10
        assert _read(tmp_path / "a.md") == whole
        assert len(whole[0]) == 50


class TestGzip:
    @pytest.mark.parametrize(
        ("suffix", "content"),
        [("txt", "One.\n\nTwo.\n"), ("jsonl", '{"text": "One."}\n{"text": "Two."}'), ("md", "# A\nOne.\n# B\nTwo.")],
    )
    def test_every_format(self, tmp_path: Path, suffix: str, content: str) -> None:
        plain = _read(tmp_path / f"a.{suffix}", content)
        assert plain[0] == [["One."], ["Two."]]
        assert _read(tmp_path / f"a.{suffix}.gz", gzip.compress(content.encode())) == plain
        halves = content.encode()[:7], content.encode()[7:]
        assert _read(tmp_path / f"a.{suffix.upper()}.GZ", b"".join(map(gzip.compress, halves))) == plain

    @pytest.mark.parametrize("kept", [0.2, 0.9, -16, -4])
    def test_truncated(self, tmp_path: Path, kept: float) -> None:
        """All documents that it has, then an error; with use_damaged a problem. The last 8 bytes hold no text."""
        packed = gzip.compress(FABLES.read_bytes().removesuffix(b"\n"))
        packed = packed[: int(kept * len(packed) if kept > 0 else kept)]
        texts, _, problems = _read(tmp_path / "a.jsonl.gz", packed, use_damaged=True)
        assert 0 < len(texts) <= len(fables())
        assert (len(texts) == len(fables())) == (kept == -4)
        assert texts == [[text["text"]] for text in fables()[: len(texts)]]
        read = f"{len(texts) + (kept != -4)} lines with {len(texts)} documents"
        assert problems == {"the rest of a damaged or truncated gzip file": [f"a.jsonl.gz ({read} read)"]}
        found = []
        with pytest.raises(InputError, match=rf"a\.jsonl\.gz is a damaged or truncated .* \({read} can be read\)"):
            found.extend(Reader().read(File.of(tmp_path / "a.jsonl.gz"), "a", Problems()))
        assert [document.texts for document in found] == texts

    def test_truncated_in_a_line(self, tmp_path: Path) -> None:
        """What there is of a line is text; a character that is not whole, and half an object, are none."""
        for letter, size in (("ä", 2), ("\N{GRINNING FACE}", 4)):
            raw = b"".join(random.Random(0).choices([b"a", b"b ", b"c\n", letter.encode()], k=5000)).replace(b"\n", b"")
            packed = gzip.compress(raw, 0)  # stored as it is: any byte of it can be the last
            for cut in range(9, 9 + 2 * size):
                texts, numbers, problems = _read(tmp_path / "a.txt.gz", packed[:-cut], use_damaged=True)
                kept = raw[: len(raw) + 8 - cut].decode(errors="ignore")
                assert texts == [[kept.strip()]]
                assert numbers == [1]
                assert list(problems.values()) == [["a.txt.gz (1 line with 1 document read)"]]
        markdown = gzip.compress(b"# A\n\nOne two three.", 0)[:-14]
        texts, _, problems = _read(tmp_path / "a.md.gz", markdown, use_damaged=True)
        assert texts == [["One two"]]
        assert list(problems.values()) == [["a.md.gz (3 lines read)"]]
        for content, cut in (('{"text": "One."}\n{"text": "Two."}', 10), ('{"text": "One."}\n', 8)):
            packed = gzip.compress(content.encode(), 0)[:-cut]
            texts, _, problems = _read(tmp_path / "a.jsonl.gz", packed, use_damaged=True)
            assert texts == [["One."]]
            assert problems.keys() == {"the rest of a damaged or truncated gzip file"}

    @pytest.mark.parametrize(
        ("damage", "read"),
        [
            (lambda b: b"not gzip", "nothing"),
            (lambda b: b[:30] + b"\0" * 9 + b[39:], "line"),
            (lambda b: b + b"x", "5 lines with 3 documents"),
        ],
    )
    def test_damaged(self, tmp_path: Path, damage: Any, read: str) -> None:
        packed = gzip.compress(b"One.\n\nTwo.\n\nThree and some more to have a longer file.\n")
        _, _, problems = _read(tmp_path / "a.txt.gz", damage(packed), use_damaged=True)
        (places,) = problems.values()
        assert problems.keys() == {"the rest of a damaged or truncated gzip file"}
        assert read in places[0]
        with pytest.raises(InputError, match=rf"a\.txt\.gz is a damaged .*{read}.* can be read\): fetch it again"):
            _read(tmp_path / "a.txt.gz")


def test_files_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "a.pdf", "a.gz", "a.tar.gz", ".txt", "a.parquet.gz"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=r"its name must end with one of \.txt"):
            sources.find([tmp_path / name])
    with pytest.raises(InputError, match=r"a\.txt: there is no such file"):
        sources.find([tmp_path / "a.txt"])
    os.mkfifo(tmp_path / "b.txt")
    with pytest.raises(InputError, match=r"b\.txt: not a file"):
        sources.find([tmp_path / "b.txt"])

    class Unreadable(io.BytesIO):
        def read1(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "c.txt").write_text("text")
    Reader().check(File.of(tmp_path / "c.txt"))
    monkeypatch.setattr(Path, "open", lambda *_: Unreadable())
    with pytest.raises(InputError, match=r"cannot read .*c\.txt: Input/output error"):
        list(Reader().read(File.of(tmp_path / "c.txt"), "c.txt", Problems()))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_progress_adds_up_to_the_file(tmp_path: Path, suffix: str) -> None:
    content = FABLES.read_bytes() * 20
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    steps: list[int] = []
    list(Reader().read(File.of(tmp_path / f"a.{suffix}"), "a", Problems(), steps.append))
    assert sum(steps) == (tmp_path / f"a.{suffix}").stat().st_size
    assert len(steps) > 5


def test_lines_are_those_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `bytes.splitlines` parts them, whatever the chunks."""
    generator = random.Random(0)
    for chunk in (1, 2, 3, 7):
        monkeypatch.setattr(lines, "_CHUNK", chunk)
        for _ in range(300):
            content = bytes(generator.choices(b"ab\r\n\n\r\x0b\x0c\x85", k=generator.randrange(14)))
            read = Lines(io.BytesIO(content))
            assert list(read) == content.splitlines()
            assert (read.number, read.damaged) == (len(content.splitlines()), False)


def test_problems_are_all_counted_and_a_few_of_each_are_kept() -> None:
    problems = Problems()
    for i in range(1000):
        problems.add("rare" if i == 999 else "often", f"line {i}")
    problems.update({"often": 5, "other": 1}, {"often": ["no room"], "other": ["there"]})
    assert problems.counts == {"often": 1004, "rare": 1, "other": 1}
    assert problems.first["often"] == [f"line {i}" for i in range(10)]
    assert problems.first["rare"] == ["line 999"]
    assert problems.first["other"] == ["there"]
    assert str(problems) == "1,004 x often, 1 x other, 1 x rare"


@needs("sentencex")
class TestSentences:
    def test_english(self) -> None:
        text = ' Dr. Smith went to 3.5 places.  "Why?" he asked. Nobody knew... U.S. troops came! '
        assert list(sentences.split(text)) == [
            "Dr. Smith went to 3.5 places.",
            '"Why?" he asked.',
            "Nobody knew...",
            "U.S. troops came!",
        ]

    def test_chinese(self) -> None:
        assert list(sentences.split("我们是人。他们也是。真的", "zh")) == ["我们是人。", "他们也是。", "真的"]

    @pytest.mark.parametrize("text", ["", " ", "\n\t "])
    def test_blank(self, text: str) -> None:
        assert list(sentences.split(text)) == []

    def test_long_paragraphs_go_through_in_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sentencex

        text = " ".join(fable["text"] for fable in fables())
        whole = [segment.strip() for segment in sentencex.segment("en", text)]
        sizes: list[int] = []
        stock = sentencex.segment
        monkeypatch.setattr(
            sentencex, "segment", lambda language, text: sizes.append(len(text)) or stock(language, text)
        )
        pieces = list(sentences.split(text))
        assert "".join(pieces).replace(" ", "") == text.replace(" ", "")
        assert len(set(whole) ^ set(pieces)) < 0.02 * len(whole)  # a sentence that is parted is three of them
        assert max(sizes) == sentences._WINDOW < len(text) / 5
        assert sum(sizes) < 3 * len(text)

    def test_very_long_sentences_stay_whole(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sentences, "_WINDOW", 100)
        long = "word " * 1000 + "end."
        assert list(sentences.split(f"Short. {long} Short again.")) == ["Short.", long, "Short again."]

    def test_what_is_no_language(self) -> None:
        for language in ("en", "zh", "arz", "zh-classical"):
            sentences.check_language(language)
        for language in ("", "EN", "english", "en_US", "e"):
            with pytest.raises(InputError, match="a code like en"):
                sentences.check_language(language)
