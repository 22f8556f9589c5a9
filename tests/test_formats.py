"""What text comes in besides plain files: compressed files and tables."""

import bz2
import csv
import gzip
import io
import lzma
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbert.commands.texts import read_texts
from fastbert.data import lines
from fastbert.data.compression import KINDS
from fastbert.data.documents import Problems
from fastbert.data.readers import Reader
from fastbert.data.sources import File, Stdin
from fastbert.errors import InputError
from tests.optional import needs
from tests.stores import FABLES, read_documents, write


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd
    return pytest.importorskip("backports.zstd")


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": lambda raw: bz2.compress(raw, 1),  # in small blocks
    "xz": lzma.compress,
    "zst": lambda raw: _zstd().compress(raw, options={_zstd().CompressionParameter.checksum_flag: 1}),
}


@pytest.mark.parametrize("kind", PACK)
class TestCompressed:
    def test_every_format(self, tmp_path: Path, kind: str) -> None:
        for suffix, raw in (
            ("txt", b"One.\n\nTwo.\n"),
            ("jsonl", b'{"text": "One."}\n{"text": "Two."}'),
            ("csv", b"text\nOne.\nTwo."),
        ):
            pieces = raw[:7], raw[7:]
            packed = b"".join(map(PACK[kind], pieces)) + bytes(512)  # appended files, and a tape's padding
            texts, _, problems = read_documents(write(tmp_path / f"a.{suffix.upper()}.{kind}", packed))
            assert (texts, problems) == ([["One."], ["Two."]], {})

    @pytest.mark.parametrize("kept", [0.8, -4])
    def test_cut_off(self, tmp_path: Path, kind: str, kept: float) -> None:
        """All documents that it has, then an error; with use_damaged a problem."""
        chance = random.Random(0)
        expected = [" ".join(f"{chance.randrange(10**9)}" for _ in range(9)) for _ in range(3000)]
        packed = PACK[kind]("".join(f'{{"text": "{text}"}}\n' for text in expected).encode())
        file = write(tmp_path / f"a.jsonl.{kind}", packed[: int(kept * len(packed)) if kept > 0 else int(kept)])
        with pytest.raises(InputError, match=rf"is a damaged or truncated {KINDS['.' + kind]} file .* can be read\)"):
            read_documents(file)
        texts, _, problems = read_documents(file, use_damaged=True)
        assert texts == [[text] for text in expected[: len(texts)]]
        assert 500 < len(texts) <= len(expected)
        assert list(problems) == [f"the rest of a damaged or truncated {KINDS['.' + kind]} file"]

    @pytest.mark.parametrize("second", [b"junk", None])
    def test_a_second_stream_that_is_none(self, tmp_path: Path, kind: str, second: bytes | None) -> None:
        """Not in silence, as the standard library's files end there."""
        one = PACK[kind](b"One.\n")
        second = b"X" + one[1:] if second is None else second
        texts, _, problems = read_documents(write(tmp_path / f"a.txt.{kind}", one + second), use_damaged=True)
        assert texts == [["One."]]
        assert list(problems.values()) == [[f"a.txt.{kind} (1 line with 1 document read)"]]

    def test_progress_adds_up_to_the_file(self, tmp_path: Path, kind: str) -> None:
        file = File.of(write(tmp_path / f"a.jsonl.{kind}", PACK[kind](FABLES.read_bytes() * 20)))
        steps: list[int] = []
        list(Reader().read(file, "a", Problems(), steps.append))
        assert sum(steps) == file.size

    @pytest.mark.parametrize("chunk", [1, 1 << 16])
    def test_texts_of_the_other_commands(
        self, tmp_path: Path, kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lines, "_CHUNK", chunk)
        assert read_texts(write(tmp_path / f"a.txt.{kind}", PACK[kind](b"one\n\ntwo"))) == ["one", "", "two"]
        with pytest.raises(InputError, match=rf"truncated {KINDS['.' + kind]} file"):
            read_texts(write(tmp_path / f"a.txt.{kind}", PACK[kind](b"one\n\ntwo")[:-3]))


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    """As corpora are packed with --long=31."""
    zstd = _zstd()
    packer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    assert read_documents(write(tmp_path / "a.txt.zst", packer.compress(b"One.") + packer.flush()))[0] == [["One."]]


class TestCsv:
    @pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
    def test_what_the_csv_module_writes(self, tmp_path: Path, suffix: str, delimiter: str) -> None:
        cells = ["One.", 'a "quote", a, comma\tand a tab', "two\nlines\r\nand three", "x" * 200_000, "  "]
        with (tmp_path / f"a.{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *([1, cell] for cell in cells)])
        texts, numbers, problems = read_documents(tmp_path / f"a.{suffix}")
        assert texts == [[cells[0]], [cells[1]], ["two", "lines", "and three"], [cells[3]]]
        assert numbers == [2, 3, 4, 7]
        assert problems == {"an empty document": [f"a.{suffix}, line 8"]}

    def test_another_column(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.csv", "\ufefftext,body\n\nno,One.\n")
        assert read_documents(file, text_key="body")[0] == [["One."]]
        assert read_documents(file)[0] == [["no"]]
        for found in (file, Stdin("csv", io.BytesIO(file.read_bytes()))):
            with pytest.raises(InputError, match=r"has no column 'title', but 'text', 'body': --text-key names"):
                read_documents(found, text_key="title")

    def test_every_fault_of_a_row_is_counted(self, tmp_path: Path) -> None:
        rows = [b"id,text", b"1,One.", b"2", b"3,a,b", b'4,"a"b', b"5,caf\xe9", b"caf\xe9,Six.", b'7,"not', b"closed,"]
        texts, numbers, problems = read_documents(write(tmp_path / "a.csv", b"\r\n".join(rows)))
        assert texts == [["One."], ["Six."]]
        assert numbers == [2, 7]
        assert problems == {
            "a row with more or fewer cells than the header": ["a.csv, line 3", "a.csv, line 4"],
            "not CSV (',' expected after '\"')": ["a.csv, line 5"],
            "not UTF-8": ["a.csv, line 6"],
            "not CSV (unexpected end of data)": ["a.csv, line 8"],
        }

    def test_files_without_text(self, tmp_path: Path) -> None:
        for raw in (b"", b"text\n"):
            assert read_documents(write(tmp_path / "a.csv", raw)) == ([], [], {"a file without text": ["a.csv"]})
        file = write(tmp_path / "a.csv", "text\na".encode("utf-16"))
        assert read_documents(file)[2] == {"a file in UTF-16": ["a.csv"]}


@needs("pyarrow")
class TestParquet:
    def _write(self, path: Path, columns: dict[str, Any], **options: Any) -> Path:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path, **options)
        return path

    def test_rows(self, tmp_path: Path) -> None:
        file = self._write(
            tmp_path / "a.parquet",
            {
                "text": ["One.\nTwo.", None, None, "", "Three."],
                "id": range(5),
                "paragraphs": [None, ["Four.", "Five."], None, None, ["no"]],
            },
        )
        texts, numbers, problems = read_documents(file)
        assert texts == [["One.", "Two."], ["Four.", "Five."], ["Three."]]
        assert numbers == [1, 2, 5]
        assert problems == {
            "no text at 'text' or 'paragraphs'": ["a.parquet, row 3"],
            "an empty document": ["a.parquet, row 4"],
        }
        with pytest.raises(InputError, match=r"a\.parquet has no column 'body', but 'text', 'id', 'paragraphs'"):
            read_documents(file, text_key="body")
        assert read_documents(file, text_key="id")[0] == []

    def test_large_files_come_in_batches(self, tmp_path: Path) -> None:
        texts = [f"Text {i}." for i in range(3000)]
        file = File.of(self._write(tmp_path / "a.parquet", {"text": texts}, row_group_size=700))
        steps: list[int] = []
        found = []
        for document in Reader().read(file, "a", Problems(), steps.append):
            found += document.texts
            assert len(found) <= 257 * (len(steps) + 1)
        assert found == texts
        assert sum(steps) == file.size

    def test_memory_is_not_that_of_a_row_group(self, tmp_path: Path) -> None:
        import pyarrow

        chance = random.Random(0)
        column = [f"{chance.getrandbits(4000):x}" for _ in range(10_000)]
        file = File.of(self._write(tmp_path / "a.parquet", {"text": column}, use_dictionary=False, compression=None))
        before = pyarrow.total_allocated_bytes()
        most = max(
            pyarrow.total_allocated_bytes() for i, _ in enumerate(Reader().read(file, "a", Problems())) if i % 100 == 0
        )
        assert most - before < file.size / 2 > 4 << 20

    def test_what_is_not_utf8(self, tmp_path: Path) -> None:
        import pyarrow

        column = pyarrow.array([b"One.", b"caf\xe9", b"Two."]).view(pyarrow.string())
        texts, _, problems = read_documents(self._write(tmp_path / "a.parquet", {"text": column}))
        assert texts == [["One."], ["Two."]]
        assert problems == {"not UTF-8": ["a.parquet, row 2"]}

    def test_damaged(self, tmp_path: Path) -> None:
        file = self._write(tmp_path / "a.parquet", {"text": [f"Text {i}." for i in range(9000)]})
        raw = file.read_bytes()
        for damaged in (raw[:-10], b"", raw[:4] + bytes(3000) + raw[3004:]):
            with pytest.raises(InputError, match=r"^cannot read .*a\.parquet: [^\n]+$"):
                read_documents(write(file, damaged))
