"""What text comes in besides plain files: compressed, tables, folders, stdin, datasets."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastbert.commands.texts import read_texts
from fastbert.data import lines, sources
from fastbert.data.compression import KINDS
from fastbert.data.datasets import Dataset
from fastbert.data.documents import Problems
from fastbert.data.prepare import train_vocabulary
from fastbert.data.readers import Reader
from fastbert.data.sources import File, Source, Stdin
from fastbert.errors import InputError
from tests.optional import needs
from tests.stores import FABLES, content, decoded, fables, make_store, write, write_vocabulary


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return zstd
    return pytest.importorskip("backports.zstd")


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: _zstd().compress(raw, options={_zstd().CompressionParameter.checksum_flag: 1}),
}


def _read(given: Path | Source, **options: Any) -> tuple[list[list[str]], list[int], dict[str, list[str]]]:
    """Texts of each document, the line or row where each starts, and problems."""
    source = File.of(given) if isinstance(given, Path) else given
    problems = Problems()
    reader = Reader(**options)
    reader.check(source)
    found = list(reader.read(source, sources.names([source])[0], problems))
    return [document.texts for document in found], [document.line for document in found], problems.first


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
            texts, _, problems = _read(write(tmp_path / f"a.{suffix.upper()}.{kind}", packed))
            assert (texts, problems) == ([["One."], ["Two."]], {})

    @pytest.mark.parametrize("kept", [0.8, -4])
    def test_cut_off(self, tmp_path: Path, kind: str, kept: float) -> None:
        """All documents that it has, then an error; with use_damaged a problem."""
        chance = random.Random(0)
        expected = [" ".join(f"{chance.randrange(10**9)}" for _ in range(9)) for _ in range(12_000)]
        packed = PACK[kind]("".join(f'{{"text": "{text}"}}\n' for text in expected).encode())
        file = write(tmp_path / f"a.jsonl.{kind}", packed[: int(kept * len(packed)) if kept > 0 else int(kept)])
        with pytest.raises(InputError, match=rf"is a damaged or truncated {KINDS['.' + kind]} file .* can be read\)"):
            _read(file)
        texts, _, problems = _read(file, use_damaged=True)
        assert texts == [[text] for text in expected[: len(texts)]]
        assert 1000 < len(texts) <= len(expected)
        assert list(problems) == [f"the rest of a damaged or truncated {KINDS['.' + kind]} file"]

    @pytest.mark.parametrize("second", [b"junk", None])
    def test_a_second_stream_that_is_none(self, tmp_path: Path, kind: str, second: bytes | None) -> None:
        """Not in silence, as the standard library's files end there."""
        one = PACK[kind](b"One.\n")
        second = b"X" + one[1:] if second is None else second
        texts, _, problems = _read(write(tmp_path / f"a.txt.{kind}", one + second), use_damaged=True)
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
    assert _read(write(tmp_path / "a.txt.zst", packer.compress(b"One.") + packer.flush()))[0] == [["One."]]


class TestCsv:
    @pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t")])
    def test_what_the_csv_module_writes(self, tmp_path: Path, suffix: str, delimiter: str) -> None:
        cells = ["One.", 'a "quote", a, comma\tand a tab', "two\nlines\r\nand three", "x" * 200_000, "  "]
        with (tmp_path / f"a.{suffix}").open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *([1, cell] for cell in cells)])
        texts, numbers, problems = _read(tmp_path / f"a.{suffix}")
        assert texts == [[cells[0]], [cells[1]], ["two", "lines", "and three"], [cells[3]]]
        assert numbers == [2, 3, 4, 7]
        assert problems == {"an empty document": [f"a.{suffix}, line 8"]}

    def test_another_column(self, tmp_path: Path) -> None:
        file = write(tmp_path / "a.csv", "\ufefftext,body\n\nno,One.\n")
        assert _read(file, text_key="body")[0] == [["One."]]
        assert _read(file)[0] == [["no"]]
        for found in (file, Stdin("csv", io.BytesIO(file.read_bytes()))):
            with pytest.raises(InputError, match=r"has no column 'title', but 'text', 'body': --text-key names"):
                _read(found, text_key="title")

    def test_every_fault_of_a_row_is_counted(self, tmp_path: Path) -> None:
        rows = [b"id,text", b"1,One.", b"2", b"3,a,b", b'4,"a"b', b"5,caf\xe9", b"caf\xe9,Six.", b'7,"not', b"closed,"]
        texts, numbers, problems = _read(write(tmp_path / "a.csv", b"\r\n".join(rows)))
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
            assert _read(write(tmp_path / "a.csv", raw)) == ([], [], {"a file without text": ["a.csv"]})
        assert _read(write(tmp_path / "a.csv", "text\na".encode("utf-16")))[2] == {"a file in UTF-16": ["a.csv"]}


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
        texts, numbers, problems = _read(file)
        assert texts == [["One.", "Two."], ["Four.", "Five."], ["Three."]]
        assert numbers == [1, 2, 5]
        assert problems == {
            "no text at 'text' or 'paragraphs'": ["a.parquet, row 3"],
            "an empty document": ["a.parquet, row 4"],
        }
        with pytest.raises(InputError, match=r"a\.parquet has no column 'body', but 'text', 'id', 'paragraphs'"):
            _read(file, text_key="body")
        assert _read(file, text_key="id")[0] == []

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

    def test_what_is_not_utf8(self, tmp_path: Path) -> None:
        import pyarrow

        column = pyarrow.array([b"One.", b"caf\xe9", b"Two."]).view(pyarrow.string())
        texts, _, problems = _read(self._write(tmp_path / "a.parquet", {"text": column}))
        assert texts == [["One."], ["Two."]]
        assert problems == {"not UTF-8": ["a.parquet, row 2"]}

    def test_damaged(self, tmp_path: Path) -> None:
        file = self._write(tmp_path / "a.parquet", {"text": [f"Text {i}." for i in range(9000)]})
        raw = file.read_bytes()
        for damaged in (raw[:-10], b"", raw[:4] + bytes(3000) + raw[3004:]):
            with pytest.raises(InputError, match=r"^cannot read .*a\.parquet: [^\n]+$"):
                _read(write(file, damaged))


class TestFolders:
    def test_all_files_in_order(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a/z.jsonl", "a/b.md.gz", "a.txt", "B.csv", "c.pdf", "a/d", ".hidden.txt", ".git/x.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "store").mkdir()
        for name in ("plan.json", "vocab.txt"):
            (tmp_path / "store" / name).touch()
        os.symlink(tmp_path, tmp_path / "a/up")
        found = sources.find([tmp_path])
        assert sources.names(found) == ["B.csv", "a/b.md.gz", "a/d", "a/z.jsonl", "a.txt", "b.txt", "c.pdf"]
        assert [source.format for source in found if isinstance(source, File)] == [
            *("csv", "md", None, "jsonl", "txt", "txt", None)
        ]
        assert _read(found[-1])[2] == {"a file of an unknown kind": ["c.pdf"]}

    def test_links_to_folders(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        write(tmp_path / "there/a.txt", "One.")
        (tmp_path / "here").mkdir()
        os.symlink(tmp_path / "there", tmp_path / "here/link")
        assert [_read(source)[0] for source in sources.find([tmp_path / "here"])] == [[["One."]]]

    def test_that_cannot_be_used(self, tmp_path: Path) -> None:
        write(tmp_path / "a.pdf", "")
        with pytest.raises(InputError, match=r"has no file whose name ends with one of \.txt, "):
            sources.find([tmp_path])
        write(tmp_path / "plan.json", "{}")
        with pytest.raises(InputError, match="is a token store, and no text"):
            sources.find([tmp_path])
        write(tmp_path / "state.json", "{}")
        with pytest.raises(InputError, match=f"is a saved dataset: give dataset:{tmp_path}"):
            sources.find([tmp_path])

    def test_a_store_of_one(self, tmp_path: Path) -> None:
        """In the folder, too; a file is the same by its own name."""
        vocabulary = write_vocabulary(tmp_path / "vocabulary")
        folder = tmp_path / "texts"
        folder.mkdir()
        write(folder / "a.txt", "fox")
        write(folder / "b.bin", "")
        for _ in range(2):
            prepared = make_store([folder], folder / "corpus", vocabulary)
            assert prepared.problems.first == {"a file of an unknown kind": ["b.bin"]}
            assert decoded(folder / "corpus") == [["fox"]]
        with pytest.raises(InputError, match=r"b\.bin: a file of an unknown kind; without --strict"):
            make_store([folder], folder / "corpus", vocabulary, reader=Reader(strict=True))
        with pytest.raises(InputError, match=r"a\.txt is given twice"):
            make_store([folder, folder / "a.txt"], tmp_path / "corpus", vocabulary)


def _pipe(raw: bytes) -> Stdin:
    reading, writing = os.pipe()

    def fill() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(raw)

    threading.Thread(target=fill, daemon=True).start()
    return Stdin("jsonl", os.fdopen(reading, "rb"))


class TestStdin:
    def test_formats(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for format, raw in (
            ("txt", "One.\n\nTwo."),
            ("jsonl", '{"text": "One."}\n{"text": "Two."}'),
            ("csv", "text\nOne.\nTwo."),
            ("tsv", "id\ttext\n1\tOne.\n2\tTwo."),
        ):
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw.encode())))
            (source,) = sources.find(["-"], format)
            assert _read(source)[0] == [["One."], ["Two."]]
        with pytest.raises(InputError, match="--format txt or jsonl or md or csv or tsv"):
            sources.find(["-"])
        with pytest.raises(InputError, match="stdin is given twice"):
            sources.find(["-", "-"], "txt")

    def test_a_file_whose_name_says_nothing(self, tmp_path: Path) -> None:
        for name in ("a.log", "a"):
            (source,) = sources.find([write(tmp_path / name, "text\nOne.")], "csv")
            assert _read(source)[0] == [["One."]]
        (source,) = sources.find([write(tmp_path / "a.txt", "One.")], "csv")
        assert _read(source)[0] == [["One."]]

    def test_a_pipe_is_read_once_or_kept(self) -> None:
        source = _pipe(FABLES.read_bytes())
        assert len(_read(source)[0]) == len(fables())
        with pytest.raises(InputError, match="can be read only once"):
            _read(source)
        source = _pipe(FABLES.read_bytes())
        words = train_vocabulary([source], Reader(), 700, cased=False).get_vocab()
        assert words == train_vocabulary([FABLES], Reader(), 700, cased=False).get_vocab()
        assert len(_read(source)[0]) == len(fables())

    def test_the_store_is_that_of_a_file(self, tmp_path: Path) -> None:
        vocabulary = write_vocabulary(tmp_path / "vocab.txt")
        raw = FABLES.read_bytes()
        make_store([FABLES], tmp_path / "file", vocabulary)
        make_store([_pipe(raw)], tmp_path / "corpus", vocabulary)
        (tmp_path / "corpus/manifest.json").unlink()
        (tmp_path / "corpus/part-000003/part.json").unlink()
        assert make_store([_pipe(raw)], tmp_path / "corpus", vocabulary).written == 1
        found, expected = content(tmp_path / "corpus"), content(tmp_path / "file")
        assert {name for name in found if found[name] != expected[name]} == {"plan.json"}
        with pytest.raises(InputError, match=r"was begun with other settings \(files\)"):
            make_store([Stdin("txt", io.BytesIO(raw))], tmp_path / "corpus", vocabulary)
        for other in (b"".join(raw.splitlines(keepends=True)[:50]), raw.replace(b"fox", b"cat")):
            with pytest.raises(InputError, match="was begun with another text on stdin"):
                make_store([_pipe(other)], tmp_path / "corpus", vocabulary)


@needs("datasets")
class TestDatasets:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        import datasets

        datasets.disable_progress_bars()
        folder = tmp_path_factory.mktemp("datasets")
        rows = datasets.Dataset.from_dict({"text": ["One.", "Two.\nThree.", None], "id": [1, 2, 3]})
        rows.save_to_disk(folder / "saved")
        datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder / "splits")
        (folder / "files").mkdir()
        for split, count in (("train", 3), ("test", 1)):
            lines = [json.dumps(rows[i]) + "\n" for i in range(count)]
            write(folder / "files" / f"{split}.jsonl", "".join(lines))
        return folder

    @pytest.mark.parametrize("name", ["saved", "splits", "files"])
    def test_folders(self, folder: Path, name: str) -> None:
        (source,) = sources.find([f"dataset:{folder / name}"])
        texts, numbers, problems = _read(source)
        assert texts == [["One."], ["Two.", "Three."]]
        assert numbers == [1, 2]
        assert problems == {"no text at 'text' or 'paragraphs'": [f"dataset:{name}, row 3"]}
        with pytest.raises(InputError, match=f"dataset:{name} has no column 'body', but 'text', 'id'"):
            _read(source, text_key="body")
        with pytest.raises(InputError, match=rf"dataset:{name}:none.*\b(train|None)\b"):
            _read(Dataset.parse(f"dataset:{folder / name}:none"))
        if name != "saved":
            assert _read(Dataset.parse(f"dataset:{folder / name}:test"))[0] == [["One."]]

    def test_a_store_goes_on_with_the_same_rows_only(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A hub with a commit, and rows that are those of a folder."""
        import datasets
        import huggingface_hub

        asked: list[Any] = []
        commits = {None: "1234", "v1": "1111"}
        stock = datasets.load_dataset

        def load(name: str, config: str | None, **options: Any) -> Any:
            asked.append((name, config, options))
            return stock(str(folder / "files"), split=options["split"], streaming=True)

        def info(hub: object, name: str, revision: str | None) -> SimpleNamespace:
            return SimpleNamespace(sha=commits[revision])

        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
        vocabulary = write_vocabulary(tmp_path / "vocab.txt")
        for _ in range(2):
            make_store(["dataset:owner/name:config:train"], tmp_path / "corpus", vocabulary)
        options = {"split": "train", "revision": "1234", "streaming": True}
        assert asked == [("owner/name", "config", options)] * 2
        commits[None] = "5678"
        with pytest.raises(InputError, match=r"was begun with other settings \(files\)"):
            make_store(["dataset:owner/name:config:train"], tmp_path / "corpus", vocabulary)
        commits["1234"] = "1234"
        make_store(["dataset:owner/name@1234:config:train"], tmp_path / "corpus", vocabulary)
        assert Dataset.parse("dataset:owner/name@v1").identity == ["dataset:owner/name", "1111"]

    def test_what_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for text in ("dataset:", "dataset:a:b:c:d", "dataset:a::b"):
            with pytest.raises(InputError, match=r"must be like dataset:NAME, dataset:NAME:SPLIT or"):
                sources.find([text])

        def no_hub(*_: object, **__: object) -> None:
            raise ConnectionError("no hub\nhere")

        import huggingface_hub

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_hub)
        with pytest.raises(InputError, match=r"^dataset:owner/name cannot be read \(no hub\)$"):
            _read(Dataset.parse("dataset:owner/name"))


@pytest.mark.parametrize(
    ("lacks", "name", "message"),
    [
        ("backports", "a.txt.zst", "to read .zst, install backports.zstd: pip"),
        ("pyarrow", "a.parquet", "to read Parquet, install pyarrow: pip"),
        ("datasets", "dataset:a", "to read datasets, install datasets: pip"),
    ],
)
def test_they_say_what_they_lack(
    lacks: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "backports" and sys.version_info >= (3, 14):
        pytest.skip("Python has it")
    for module in [module for module in sys.modules if module.split(".")[0] == lacks]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, lacks, None)
    monkeypatch.setattr(Dataset, "_commit", None)
    given = name if name.startswith("dataset:") else write(tmp_path / name, "text")
    with pytest.raises(InputError, match=message):
        _read(sources.find([given])[0])
