"""`fastbert prepare`: what it says, its options, and what it does with mistakes."""

import gzip
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastbert import cli
from fastbert.data.store import Store
from fastbert.data.vocabulary import load_tokenizer
from tests.optional import needs
from tests.stores import FABLES, content, decoded, faulty_texts, write, write_vocabulary


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return faulty_texts(tmp_path_factory.mktemp("texts"))


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """`fastbert prepare` with these arguments: exit status and stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fastbert", "prepare", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
        except SystemExit as exit_:
            return int(exit_.code or 0), capfd.readouterr().err
        return 0, capfd.readouterr().err

    return run


@needs("sentencex")
class TestCommand:
    def test_what_it_says(self, run: Run, texts: list[Path], vocabulary_file: Path, tmp_path: Path) -> None:
        arguments = (*texts, "-o", tmp_path / "corpus", "--vocab", vocabulary_file)
        status, said = run(*arguments)
        store = Store.open(tmp_path / "corpus")
        assert status == 0
        assert "fastbert: left out: not JSON, 1 x: a.jsonl, line 31\n" in said
        assert "warning" not in said
        closing = (
            f"{store.documents:,} documents, {store.sentences:,} sentences, {store.tokens:,} tokens, 5 left out; 1 "
        )
        assert f"fastbert: {closing}part;" in said
        assert said.rstrip().endswith("corpus is finished")
        status, said = run(*arguments)
        assert status == 0
        assert "1 part, 1 there before;" in said
        status, said = run(*arguments, "--cased")
        assert (status, said.count("\n")) == (1, 1)
        assert "was begun with other settings (tokenizer)" in said

    def test_another_vocabulary_of_the_same_name(self, run: Run, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "fox")
        for name in ("x", "y"):
            (tmp_path / name).mkdir()
            write_vocabulary(tmp_path / name / "vocab.txt", ["fox", name])
        assert run(file, "-o", tmp_path / "corpus", "--vocab", tmp_path / "x/vocab.txt")[0] == 0
        status, said = run(file, "-o", tmp_path / "corpus", "--vocab", tmp_path / "y/vocab.txt")
        assert status == 1
        assert "was begun with other settings (tokenizer)" in said

    def test_vocabulary_first_then_shards(self, run: Run, tmp_path: Path) -> None:
        path = tmp_path / "corpus"
        arguments = (FABLES, "-o", path, "--train-vocab", 700)
        status, said = run(*arguments, "--shard", "1/2")
        assert status == 1
        assert "train the vocabulary first" in said
        assert run(*arguments, "--only-vocab")[0] == 0
        assert sorted(content(path)) == ["plan.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
        status, said = run(*arguments, "--shard", "2/2")
        assert status == 0
        assert "is not finished: other shards have 1 of 1 part to write" in said
        assert run(*arguments, "--shard", "1/2")[0] == 0
        assert Store.open(path).vocab_size == 700
        shutil.move(path, tmp_path / "sharded")
        assert run(*arguments)[0] == 0
        assert content(path) == content(tmp_path / "sharded")

    def test_options(self, run: Run, vocabulary_file: Path, tmp_path: Path) -> None:
        files = [write(tmp_path / "a.jsonl", '{"b": "fox fox"}'), write(tmp_path / "b.txt.gz", b"")]
        files[1].write_bytes(gzip.compress("lion。 fox\nlion".encode()))
        options = ("--text-key", "b", "--sentence-per-line", "--language", "zh", "--uncased", "--workers", "2")
        status, said = run(*files, "-o", tmp_path / "corpus", "--vocab", vocabulary_file, *options)
        assert status == 0
        assert "fastbert: warning: 1 of 6 tokens are unknown to the vocabulary" in said
        assert decoded(tmp_path / "corpus") == [["fox fox"], ["lion [UNK] fox", "lion"]]

    def test_a_damaged_file(self, run: Run, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt.gz", gzip.compress(b"fox lion\n\nfox", 0)[:-10])
        arguments = (file, "-o", tmp_path / "corpus", "--vocab", vocabulary_file)
        status, said = run(*arguments)
        assert (status, said.count("\n")) == (1, 1)
        assert f"fastbert: {file} is a damaged or truncated gzip file (3 lines with 2 documents can be read)" in said
        assert "--use-damaged" in said
        status, said = run(*arguments, "--use-damaged")
        assert status == 0
        reason = "the rest of a damaged or truncated gzip file, 1 x: a.txt.gz (3 lines with 2 documents read)"
        assert f"fastbert: left out: {reason}\n" in said
        assert decoded(tmp_path / "corpus") == [["fox lion"], ["f"]]

    def test_mistakes(self, run: Run, vocabulary_file: Path, tmp_path: Path) -> None:
        array = write(tmp_path / "array.json", '[{"text": "fox"}]')
        good = (FABLES, "-o", tmp_path / "corpus", "--vocab", vocabulary_file)
        for message, status, arguments in (
            ("exactly one of --vocab and --train-vocab", 1, good[:3]),
            ("exactly one of --vocab and --train-vocab", 1, (*good, "--train-vocab", "1000")),
            ("--only-vocab goes with --train-vocab", 1, (*good, "--only-vocab")),
            ("--shard must be like 3/64", 1, (*good, "--shard", "0/2")),
            ("there is no shard 3/2", 1, (*good, "--shard", "3/2")),
            ("is uncased, whatever the option says", 1, (*good[:4], _saved(vocabulary_file, tmp_path), "--cased")),
            ("Invalid value for '--workers'", 2, (*good, "--workers", "0")),
            ("Invalid value for '--train-vocab'", 2, (*good[:3], "--train-vocab", "99")),
            ("array.json is a JSON array", 1, (array, *good)),
            ("fables.jsonl is given twice", 1, (FABLES, *good)),
            ("No such option", 2, (*good, "--vocabulary", "x")),
            ("Missing option '--output'", 2, (FABLES,)),
        ):
            found, said = run(*arguments)
            assert found == status, said
            assert message in said
            assert status != 1 or said.count("\n") == 1


def _saved(vocabulary_file: Path, folder: Path) -> Path:
    load_tokenizer(str(vocabulary_file)).save_pretrained(folder / "saved")
    return folder / "saved"
