"""Where text comes from besides files: folders, stdin, datasets; and what needs a package that is not there."""

import io
import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastbert.data import sources
from fastbert.data.datasets import Dataset
from fastbert.data.prepare import train_vocabulary
from fastbert.data.readers import Reader
from fastbert.data.sources import File, Stdin
from fastbert.errors import InputError
from tests.optional import needs
from tests.stores import FABLES, content, decoded, fables, make_store, read_documents, write, write_vocabulary


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
        assert read_documents(found[-1])[2] == {"a file of an unknown kind": ["c.pdf"]}

    def test_links_to_folders(self, tmp_path: Path) -> None:
        (tmp_path / "there").mkdir()
        write(tmp_path / "there/a.txt", "One.")
        (tmp_path / "here").mkdir()
        os.symlink(tmp_path / "there", tmp_path / "here/link")
        assert [read_documents(source)[0] for source in sources.find([tmp_path / "here"])] == [[["One."]]]

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
            ("md", "# A\nOne.\n# B\nTwo."),
            ("csv", "text\nOne.\nTwo."),
            ("tsv", "id\ttext\n1\tOne.\n2\tTwo."),
        ):
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw.encode())))
            (source,) = sources.find(["-"], format)
            assert read_documents(source)[0] == [["One."], ["Two."]]
        with pytest.raises(InputError, match="--format txt or jsonl or md or csv or tsv"):
            sources.find(["-"])
        with pytest.raises(InputError, match="stdin is given twice"):
            sources.find(["-", "-"], "txt")

    def test_a_file_whose_name_says_nothing(self, tmp_path: Path) -> None:
        for name in ("a.log", "a"):
            (source,) = sources.find([write(tmp_path / name, "text\nOne.")], "csv")
            assert read_documents(source)[0] == [["One."]]
        (source,) = sources.find([write(tmp_path / "a.txt", "One.")], "csv")
        assert read_documents(source)[0] == [["One."]]

    def test_a_pipe_is_read_once_or_kept(self) -> None:
        source = _pipe(FABLES.read_bytes())
        assert len(read_documents(source)[0]) == len(fables())
        with pytest.raises(InputError, match="can be read only once"):
            read_documents(source)
        source = _pipe(FABLES.read_bytes())
        words = train_vocabulary([source], Reader(), 700, cased=False).get_vocab()
        assert words == train_vocabulary([FABLES], Reader(), 700, cased=False).get_vocab()
        assert len(read_documents(source)[0]) == len(fables())

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
        texts, numbers, problems = read_documents(source)
        assert texts == [["One."], ["Two.", "Three."]]
        assert numbers == [1, 2]
        assert problems == {"no text at 'text' or 'paragraphs'": [f"dataset:{name}, row 3"]}
        with pytest.raises(InputError, match=f"dataset:{name} has no column 'body', but 'text', 'id'"):
            read_documents(source, text_key="body")
        with pytest.raises(InputError, match=rf"dataset:{name}:none.*\b(train|None)\b"):
            read_documents(Dataset.parse(f"dataset:{folder / name}:none"))
        if name != "saved":
            assert read_documents(Dataset.parse(f"dataset:{folder / name}:test"))[0] == [["One."]]

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
            read_documents(Dataset.parse("dataset:owner/name"))


def test_strict(tmp_path: Path) -> None:
    """What reading finds, what tokenising finds, and what an earlier run has left out."""
    vocabulary = write_vocabulary(tmp_path / "vocab.txt")
    strict = Reader(strict=True)
    reason = r"a\.txt, line 2: not UTF-8; without --strict, that is counted and left out"
    with pytest.raises(InputError, match=reason):
        make_store([write(tmp_path / "a.txt", b"fox\n\xff\n\n\x01")], tmp_path / "corpus", vocabulary, reader=strict)
    with pytest.raises(InputError, match=reason):
        train_vocabulary([tmp_path / "a.txt"], strict, 700, cased=False)
    write(tmp_path / "a.txt", b"fox\n...\n\n\x01")
    path = tmp_path / "other"
    for reader in (strict, Reader(), strict):
        if reader.strict:
            with pytest.raises(InputError, match=r"a\.txt, line 4: a document without a token; without --strict"):
                make_store([tmp_path / "a.txt"], path, vocabulary, reader=reader)
        else:
            assert make_store([tmp_path / "a.txt"], path, vocabulary).found == 1
    assert train_vocabulary([FABLES], strict, 700, cased=False)


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
        read_documents(sources.find([given])[0])
