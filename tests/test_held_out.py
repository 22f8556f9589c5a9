"""Documents that are held out: which, the same ones whatever makes the store, and in a store that is whole, too."""

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastbert import cli
from fastbert.data.parts import is_held_out
from fastbert.data.prepare import train_vocabulary
from fastbert.data.readers import Reader
from fastbert.data.store import HELD_OUT, Store
from fastbert.errors import InputError
from tests.stores import (
    FABLES,
    content,
    documents,
    fables,
    faulty_texts,
    make_store,
    write,
)

pytest.importorskip("sentencex")
SHARE = 0.2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return faulty_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def undisturbed(texts: list[Path], vocabulary_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "corpus"
    make_store(texts, path, vocabulary_file, held_out=SHARE)
    return path


class TestWhich:
    def test_every_document_is_on_one_side(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path
    ) -> None:
        whole = make_store(texts, tmp_path / "whole", vocabulary_file)
        sides = [documents(Store.open(path)) for path in (undisturbed, undisturbed / HELD_OUT)]
        assert sorted(sides[0] + sides[1]) == sorted(documents(Store.open(tmp_path / "whole")))
        # Each fable stands in all three files.
        assert all(document not in sides[0] for document in sides[1])
        assert 30 < len(sides[1]) < 90
        again = make_store(texts, undisturbed, vocabulary_file, held_out=SHARE)
        assert (again.documents, again.held_out_documents) == tuple(map(len, sides))
        assert again.tokens + again.held_out_tokens == whole.tokens
        assert again.held_out_tokens == Store.open(undisturbed / HELD_OUT).tokens
        assert again.problems == whole.problems

    def test_the_share(self) -> None:
        chance = random.Random(0)
        found = [f"{chance.random()}" for _ in range(20_000)]
        for share in (0.005, 0.5):
            count = sum(is_held_out([text], share) for text in found)
            assert abs(count - 20_000 * share) < 5 * (20_000 * share * (1 - share)) ** 0.5
        assert all(is_held_out([text], 0.5) for text in found if is_held_out([text], 0.005))

    def test_wherever_lines_end(self) -> None:
        for fable in fables():
            words = fable["text"].split(" ")
            copies = [["\n".join(words)], words, [f" {fable['text']}\t", ""]]
            assert {is_held_out(copy, SHARE) for copy in copies} == {is_held_out([fable["text"]], SHARE)}

    def test_a_vocabulary_is_of_the_others(self, tmp_path: Path) -> None:
        rows = FABLES.read_text().splitlines()
        held_out = {json.loads(row)["text"] for row in rows if is_held_out([json.loads(row)["text"]], SHARE)}
        assert held_out
        others = [row for row in rows if json.loads(row)["text"] not in held_out]
        file = write(tmp_path / "others.jsonl", "\n".join(others))
        expected = train_vocabulary([file], Reader(), 700, cased=False)
        found = train_vocabulary([FABLES], Reader(), 700, cased=False, held_out=SHARE)
        assert found.get_vocab() == expected.get_vocab()


class TestStore:
    def test_it_is_one_like_others(self, undisturbed: Path) -> None:
        stores = [Store.open(path) for path in (undisturbed, undisturbed / HELD_OUT)]
        assert len({store.fingerprint for store in stores}) == 2
        assert len({store.entropy for store in stores}) == 2
        assert stores[0].special == stores[1].special
        assert AutoTokenizer.from_pretrained(undisturbed / HELD_OUT)("a fox").input_ids
        manifests = [json.loads((store.path / "manifest.json").read_text()) for store in stores]
        assert sum(manifests[0]["left_out"].values()) == 5
        assert manifests[1]["left_out"] == {}

    @pytest.mark.parametrize("shards", [1, 2])
    def test_the_same_bytes(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path, shards: int
    ) -> None:
        path = tmp_path / "corpus"
        for i in range(shards):
            for unfinished in (path, path / HELD_OUT):
                with pytest.raises(InputError):
                    Store.open(unfinished)
            shard = (shards - i, shards)
            make_store(texts, path, vocabulary_file, held_out=SHARE, workers=3 - shards, shard=shard)
        assert content(path) == content(undisturbed)

    def test_what_a_kill_leaves_is_completed(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path
    ) -> None:
        """Parts of one side only, damaged ones, drafts, no plan."""
        path = Path(shutil.copytree(undisturbed, tmp_path / "corpus"))
        beside = path / HELD_OUT
        shutil.rmtree(beside / "part-000003")
        write(beside / "part-000005/tokens.npy", b"")
        shutil.rmtree(path / "part-000007")
        (beside / ".part-000007.1-of-1.0.tmp").mkdir()
        write(beside / "tokenizer.json", "{")
        for file in (path / "manifest.json", beside / "manifest.json", beside / "plan.json"):
            file.unlink()
        assert make_store(texts, path, vocabulary_file, held_out=SHARE).written == 3
        assert content(path) == content(undisturbed)


class TestMistakes:
    def test_none_or_all(self, vocabulary_file: Path, tmp_path: Path) -> None:
        """Another share is tried with the same command, and what was not fastbert's stays in the folder."""
        for share, message in (
            (0.0001, "of 104 documents 0.01% holds out none: 4.8% would most likely do"),
            (0.9999, "of 104 documents 99.99% holds out all: 95% would most likely do"),
        ):
            with pytest.raises(InputError, match=message):
                make_store([FABLES], tmp_path / "corpus", vocabulary_file, held_out=share)
            assert not (tmp_path / "corpus").exists()
        make_store([FABLES], tmp_path / "corpus", vocabulary_file, held_out=0.048)
        assert Store.open(tmp_path / "corpus" / HELD_OUT).documents >= 2

    def test_one_is_too_few(self, vocabulary_file: Path, tmp_path: Path) -> None:
        texts = [f"Fox number {i} ran." for i in range(30)]
        first = min(texts, key=lambda text: next(k for k in range(10_001) if is_held_out([text], k / 10_000)))
        some = write(tmp_path / "some.txt", "\n\n".join(texts))
        share = next(k for k in range(10_001) if is_held_out([first], k / 10_000)) / 10_000
        with pytest.raises(
            InputError, match=rf"of 30 documents {100 * share:g}% holds out 1: 17% would most likely do"
        ):
            make_store([some], tmp_path / "corpus", vocabulary_file, held_out=share)

    def test_of_few_documents(self, vocabulary_file: Path, tmp_path: Path) -> None:
        few = write(tmp_path / "few.txt", "A fox.\n\nA crow.\n")
        with pytest.raises(InputError, match=r"of 2 documents 0\.5% holds out none: a pair of sentences takes 2"):
            make_store([few], tmp_path / "corpus", vocabulary_file, held_out=0.005)

    def test_what_was_there_stays(self, vocabulary_file: Path, tmp_path: Path) -> None:
        """A finished store, whose text is another now; and a file that is nobody's."""
        text, path = write(tmp_path / "a.txt", "A fox."), tmp_path / "corpus"
        make_store([text], path, vocabulary_file)
        before = content(path)
        write(text, " " * 6)
        with pytest.raises(InputError, match="nothing is left of the text"):
            make_store([text], path, vocabulary_file)
        assert content(path) == before
        (path / "manifest.json").unlink()
        write(path / "notes.md", "mine")
        with pytest.raises(InputError, match="nothing is left of the text"):
            make_store([text], path, vocabulary_file)
        assert [file.name for file in path.iterdir()] == ["notes.md"]

    def test_another_share(self, undisturbed: Path, texts: list[Path], vocabulary_file: Path) -> None:
        for share in (None, 0.3):
            with pytest.raises(InputError, match=r"was begun with other settings \(held_out\)"):
                make_store(texts, undisturbed, vocabulary_file, held_out=share)

    def test_what_is_no_share(self, vocabulary_file: Path, tmp_path: Path) -> None:
        for share in (0.0, 1.0, -0.1):
            with pytest.raises(InputError, match="must lie between 0% and 100%"):
                make_store([FABLES], tmp_path / "corpus", vocabulary_file, held_out=share)
        assert not (tmp_path / "corpus").exists()


def test_the_command(
    vocabulary_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus"
    arguments = ["fastbert", "prepare", str(FABLES), "-o", str(path), "--vocab", str(vocabulary_file), "--held-out"]
    for share in ("1000", "0.5", "x%"):
        monkeypatch.setattr("sys.argv", [*arguments, share])
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        assert f"fastbert: --held-out must be a share like 0.5%, but is {share}\n" in capfd.readouterr().err
    monkeypatch.setattr("sys.argv", [*arguments, "10.5%"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    store = Store.open(path / HELD_OUT)
    said = f"fastbert: held out: {store.documents:,} documents, {store.tokens:,} tokens, in {store.path}\n"
    assert said in capfd.readouterr().err
    assert Store.open(path).documents + store.documents == 104
