"""From text to a token store: what is in it, the same bytes whatever makes it, and nothing half-written ever."""

import errno
import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizer

from fastbert import cli
from fastbert.data import parts, vocabulary
from fastbert.data import prepare as prepare_
from fastbert.data.prepare import prepare, train_vocabulary
from fastbert.data.readers import Reader
from fastbert.data.store import Store, whole_part
from fastbert.data.vocabulary import load_tokenizer
from fastbert.errors import InputError
from tests.optional import needs
from tests.stores import FABLES, SPECIAL, content, fables, full_disk, make_store, write_vocabulary

VOCABULARIES = Path(__file__).parents[2] / "shared/data/vocab"


@pytest.fixture(scope="module")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of each kind, with a fault in each."""
    folder = tmp_path_factory.mktemp("texts")
    lines = FABLES.read_text(encoding="utf-8").splitlines()
    (folder / "a.jsonl").write_text("\n".join([*lines[:30], "not JSON", *lines[30:], '{"text": ""}']))
    stories = "\n\n".join(fable["text"].replace(". ", ".\n") for fable in fables())
    (folder / "b.txt").write_bytes(stories.encode() + b"\n\n\xff\n\n\x01\n")
    chapters = "".join(f"## {fable['title']}\n\n*{fable['text']}*\n\n" for fable in fables())
    (folder / "c.md").write_text(chapters + "# Code\n\n    no text\n")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def undisturbed(texts: list[Path], vocabulary_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "corpus"
    make_store(texts, path, vocabulary_file)
    return path


@pytest.fixture
def begun(undisturbed: Path, tmp_path: Path) -> Path:
    """A store with its plan and its tokenizer: a process need not import transformers to go on with it."""
    names = ("plan.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    (tmp_path / "corpus").mkdir()
    for name in names:
        shutil.copy(undisturbed / name, tmp_path / "corpus")
    return tmp_path / "corpus"


def _documents(store: Store) -> list[list[list[int]]]:
    """Ids of each sentence of each document."""
    found = []
    for part in store.parts:
        for first, end in pairwise(part.documents):
            bounds = part.sentences[first : end + 1]
            found.append([part.tokens[a:b].tolist() for a, b in pairwise(bounds)])
    return found


def _decoded(store: Path) -> list[list[str]]:
    tokenizer = AutoTokenizer.from_pretrained(store)
    found = _documents(Store.open(store))
    return [[" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in document] for document in found]


def _write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@needs("sentencex")
class TestContent:
    def test_documents_sentences_and_tokens(self, vocabulary_file: Path, tmp_path: Path) -> None:
        import sentencex

        prepared = make_store([FABLES], tmp_path / "corpus", vocabulary_file)
        tokenizer = BertTokenizer.from_pretrained(tmp_path / "corpus")
        expected = [
            [tokenizer(s, add_special_tokens=False).input_ids for s in sentencex.segment("en", fable["text"])]
            for fable in fables()
        ]
        assert _documents(Store.open(tmp_path / "corpus")) == expected
        assert prepared.documents == len(expected)
        assert prepared.sentences == sum(map(len, expected))
        assert prepared.tokens == prepared.written_tokens == sum(len(s) for document in expected for s in document)
        assert prepared.unknown == sum(s.count(1) for document in expected for s in document)
        assert prepared.parts == prepared.written > 10
        assert prepared.found == prepared.missing == prepared.problems.counts.total() == 0

    def test_parts_are_closed_when_they_are_full(self, undisturbed: Path, texts: list[Path], tmp_path: Path) -> None:
        sizes = [len(part.documents) - 1 for part in Store.open(undisturbed).parts]
        assert len(sizes) > 20
        documents = [document for file in texts for document in Reader().read(file, "", prepare_.Problems())]
        size, expected = 0, [0]
        for document in documents:
            if size >= 4000:
                expected.append(0)
                size = 0
            expected[-1] += document.kind != "markdown"
            size += document.size
        assert sizes[:20] == expected[:20]

    def test_very_long_sentences_stay_whole(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "Short.\n" + "fox " * 20_000 + "fox.\nShort.\n\nnext")
        make_store([file], tmp_path / "corpus", vocabulary_file)
        lengths = [[len(sentence) for sentence in document] for document in _documents(Store.open(tmp_path / "corpus"))]
        assert lengths[0][1] == 20_002
        assert len(lengths) == 2

    def test_names_of_special_tokens_are_text(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "a [MASK] b [SEP]")
        make_store([file], tmp_path / "corpus", vocabulary_file)
        assert _decoded(tmp_path / "corpus") == [["a [ m ##a ##s ##k ] b [ s ##e ##p ]"]]

    def test_what_has_no_token_is_left_out_and_counted(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "\u0001\n\nfox\n\u0001\nfox\n\n\u0001\n")
        options = {"reader": Reader(sentence_per_line=True), "part_characters": 1}
        prepared = make_store([file], tmp_path / "corpus", vocabulary_file, **options)
        assert _decoded(tmp_path / "corpus") == [["fox", "fox"]]
        assert prepared.problems.first == {"a document without a token": ["a.txt, line 1", "a.txt, line 7"]}
        assert (prepared.parts, prepared.documents, prepared.sentences) == (3, 1, 2)
        manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
        assert [part["name"] for part in manifest["parts"]] == ["part-000001"]
        assert manifest["left_out"] == {"a document without a token": 2}

    def test_problems_are_in_the_manifest(self, undisturbed: Path) -> None:
        manifest = json.loads((undisturbed / "manifest.json").read_text())
        assert manifest["left_out"] == {
            "a document without a token": 1,
            "a section of code, tables or HTML only": 1,
            "an empty document": 1,
            "not JSON": 1,
            "not UTF-8": 1,
        }
        assert manifest["problems"]["not JSON"] == ["a.jsonl, line 31"]
        assert manifest["problems"]["an empty document"] == [f"a.jsonl, line {len(fables()) + 2}"]

    def test_more_than_65536_tokens_take_four_bytes(self, tmp_path: Path) -> None:
        for words, dtype in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
            names = [f"w{i}" for i in range(words - len(SPECIAL))]
            vocabulary = write_vocabulary(tmp_path / "vocab.txt", names)
            file = _write(tmp_path / "a.txt", f"w0 {names[-1]}")
            make_store([file], tmp_path / f"{words}", vocabulary)
            store = Store.open(tmp_path / f"{words}")
            assert store.vocab_size == words
            assert store.parts[0].tokens.dtype == dtype
            assert store.parts[0].tokens.tolist() == [5, words - 1]

    def test_file_names_are_those_below_the_common_folder(self, vocabulary_file: Path, tmp_path: Path) -> None:
        for place in ("here", "there"):
            files = [tmp_path / place / name for name in ("x/wiki.jsonl", "y/wiki.jsonl")]
            for file in files:
                file.parent.mkdir(parents=True)
                _write(file, '{"text": "fox"}\n{')
            make_store(files, tmp_path / f"{place}/corpus", vocabulary_file)
        assert content(tmp_path / "here/corpus") == content(tmp_path / "there/corpus")
        manifest = json.loads((tmp_path / "here/corpus/manifest.json").read_text())
        assert manifest["problems"] == {"not JSON": ["x/wiki.jsonl, line 2", "y/wiki.jsonl, line 2"]}


class TestTheSameBytes:
    def test_whatever_the_number_of_workers(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path
    ) -> None:
        make_store(texts, tmp_path / "corpus", vocabulary_file, workers=3)
        assert content(tmp_path / "corpus") == content(undisturbed)
        shard = "shard-00001-of-00001.json"
        assert (tmp_path / "corpus" / shard).read_bytes() == (undisturbed / shard).read_bytes()

    def test_whatever_the_number_of_shards(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path
    ) -> None:
        path = tmp_path / "corpus"
        for shard in (2, 3, 1):
            prepared = make_store(texts, path, vocabulary_file, shard=(shard, 3))
            assert (prepared.missing == 0) == (shard == 1)
            if shard != 1:
                with pytest.raises(InputError, match=r"is not finished: .* --shard 1/3"):
                    Store.open(path)
        assert content(path) == content(undisturbed)
        assert make_store(texts, path, vocabulary_file, shard=(1, 2)).written == 0

    def test_more_shards_than_parts(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "fox")
        missing = [make_store([file], tmp_path / "corpus", vocabulary_file, shard=(i, 3)).missing for i in (3, 2, 1)]
        assert missing == [1, 1, 0]

    def test_shards_at_the_same_time(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, begun: Path
    ) -> None:
        processes = [_start(texts, begun, vocabulary_file, shard=[i, 2]) for i in (1, 2, 2)]
        ends = [process.communicate()[1] for process in processes]
        # Of two that write the same shard, the first may fail, and says so.
        assert processes[0].returncode == 0, ends[0]
        assert min(process.returncode for process in processes[1:]) == 0, ends[1:]
        assert content(begun) == content(undisturbed)

    def test_a_finished_store_is_left_alone(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(undisturbed, tmp_path / "corpus"))
        before = {file: file.stat().st_mtime_ns for file in path.glob("part-*/*")}
        prepared = make_store(texts, path, vocabulary_file, workers=2)
        assert (prepared.written, prepared.found) == (0, prepared.parts)
        assert {file: file.stat().st_mtime_ns for file in path.glob("part-*/*")} == before
        assert content(path) == content(undisturbed)

    def test_damaged_parts_are_written_again(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, tmp_path: Path
    ) -> None:
        path = Path(shutil.copytree(undisturbed, tmp_path / "corpus"))
        os.truncate(path / "part-000004/tokens.npy", 200)
        (path / "part-000007/part.json").unlink()
        shutil.rmtree(path / "part-000009")
        tokens = bytearray((path / "part-000011/tokens.npy").read_bytes())
        tokens[-2] ^= 1
        _write(path / "part-000011/tokens.npy", bytes(tokens))
        assert make_store(texts, path, vocabulary_file).written == 4
        assert content(path) == content(undisturbed)

    def test_parts_of_a_text_that_has_changed_are_written_again(self, vocabulary_file: Path, tmp_path: Path) -> None:
        text = "\n\n".join(fable["text"] for fable in fables())
        file = _write(tmp_path / "a.txt", text)
        make_store([file], tmp_path / "changed", vocabulary_file)
        _write(file, text.replace("wolf", "flow"))
        assert 0 < make_store([file], tmp_path / "changed", vocabulary_file).written < 13
        make_store([file], tmp_path / "fresh", vocabulary_file)
        assert content(tmp_path / "changed") == content(tmp_path / "fresh")


PROCESS = """
import json, sys
from pathlib import Path
from tests.stores import make_store
files, output, vocabulary, options = json.loads(sys.argv[1])
options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
make_store([Path(file) for file in files], Path(output), Path(vocabulary), **options)
"""


def _start(files: list[Path], output: Path, vocabulary_file: Path, **options: Any) -> subprocess.Popen[str]:
    """make_store in a process of its own."""
    arguments = json.dumps([list(map(str, files)), str(output), str(vocabulary_file), options])
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, arguments], cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True
    )


def _children(process: int) -> list[int]:
    try:
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except FileNotFoundError:  # it has ended
        return []
    return [int(child) for child in found] + [g for child in found for g in _children(int(child))]


def _alive(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


@needs("sentencex")
class TestKilled:
    def test_a_rerun_completes_it(
        self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, begun: Path
    ) -> None:
        generator = random.Random(time.time_ns())
        parts: list[Path] = []
        total = len(list(undisturbed.glob("part-*")))
        for _ in range(5):
            process = _start(texts, begun, vocabulary_file, workers=2)
            wanted = len(parts) + generator.randrange(total // 4)
            while process.poll() is None and len(list(begun.glob("part-*"))) < wanted:
                time.sleep(0.001)
            time.sleep(generator.random() * 0.02)
            children = _children(process.pid)
            process.kill()
            process.wait()
            deadline = time.monotonic() + 10
            while any(map(_alive, children)):
                assert time.monotonic() < deadline, "a worker outlives its parent"
                time.sleep(0.01)
            parts = list(begun.glob("part-*"))
            assert all(whole_part(part) is not None for part in parts)
            if len(parts) < total:
                with pytest.raises(InputError, match="is not finished"):
                    Store.open(begun)
        make_store(texts, begun, vocabulary_file, workers=2)
        assert content(begun) == content(undisturbed)

    def test_before_there_is_a_tokenizer(self, vocabulary_file: Path, tmp_path: Path) -> None:
        path = tmp_path / "corpus"

        def killed() -> None:
            raise KeyboardInterrupt

        options = {"asked": {}, "reader": Reader(), "part_characters": 4000}
        with pytest.raises(KeyboardInterrupt):
            prepare([FABLES], path, killed, **options)
        make_store([FABLES], path, vocabulary_file)
        (path / "tokenizer.json").unlink()  # the last that is written of it
        (path / "vocab.txt").unlink()
        make_store([FABLES], path, vocabulary_file)
        Store.open(path)

    def test_a_worker_alone(self, undisturbed: Path, texts: list[Path], vocabulary_file: Path, begun: Path) -> None:
        process = _start(texts, begun, vocabulary_file)
        while not list(begun.glob("part-*")):
            time.sleep(0.001)
        for child in _children(process.pid):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
        assert "InputError: a process that tokenises was killed" in process.communicate()[1].splitlines()[-1]
        make_store(texts, begun, vocabulary_file)
        assert content(begun) == content(undisturbed)


@needs("sentencex")
class TestDamaged:
    """A gzip file that is cut off, between two that are whole."""

    @pytest.fixture
    def files(self, texts: list[Path], tmp_path: Path) -> list[Path]:
        packed = gzip.compress(b"\n\n".join(fable["text"].encode() for fable in fables()))
        return [texts[0], _write(tmp_path / "cut.txt.gz", packed[: len(packed) * 2 // 3]), texts[1]]

    @pytest.mark.parametrize("workers", [1, 3])
    def test_it_stops_and_goes_on(self, files: list[Path], vocabulary_file: Path, tmp_path: Path, workers: int) -> None:
        """What was written before is there then; however it was made, the store is the same."""
        used = Reader(use_damaged=True)
        whole = make_store(files, tmp_path / "whole", vocabulary_file, reader=used, workers=workers)
        (place,) = whole.problems.first["the rest of a damaged or truncated gzip file"]
        read = place.split("(")[1].removesuffix(" read)")
        for _ in range(2):
            with pytest.raises(InputError, match=rf"cut\.txt\.gz is a damaged .* \({read} can be read\)"):
                make_store(files, tmp_path / "corpus", vocabulary_file, workers=workers)
            with pytest.raises(InputError, match="is not finished"):
                Store.open(tmp_path / "corpus")
        begun = list((tmp_path / "corpus").glob("part-*"))
        assert begun
        assert all(whole_part(part) is not None for part in begun)
        prepared = make_store(files, tmp_path / "corpus", vocabulary_file, reader=used, workers=workers)
        assert (prepared.found, prepared.written) == (len(begun), whole.parts - len(begun))
        assert content(tmp_path / "corpus") == content(tmp_path / "whole")
        manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
        assert manifest["problems"]["the rest of a damaged or truncated gzip file"] == [place]

    def test_the_shards_of_it(self, files: list[Path], vocabulary_file: Path, tmp_path: Path) -> None:
        used = Reader(use_damaged=True)
        make_store(files, tmp_path / "whole", vocabulary_file, reader=used)
        for i in (2, 1):
            with pytest.raises(InputError, match="damaged"):
                make_store(files, tmp_path / "corpus", vocabulary_file, shard=(i, 2))
        assert make_store(files, tmp_path / "corpus", vocabulary_file, reader=used, shard=(2, 2)).missing
        assert not make_store(files, tmp_path / "corpus", vocabulary_file, reader=used, shard=(1, 2)).missing
        assert content(tmp_path / "corpus") == content(tmp_path / "whole")

    def test_a_vocabulary_of_it(self, files: list[Path]) -> None:
        with pytest.raises(InputError, match=r"cut\.txt\.gz is a damaged"):
            train_vocabulary(files, Reader(), 700, cased=False)
        assert len(train_vocabulary(files, Reader(use_damaged=True), 700, cased=False)) == 700


class TestDiskFull:
    @pytest.mark.parametrize("limit", [100, 1000, 6000])
    def test_one_error_and_no_damage(
        self,
        undisturbed: Path,
        texts: list[Path],
        vocabulary_file: Path,
        tmp_path: Path,
        limit: int,
        request: pytest.FixtureRequest,
    ) -> None:
        """100 bytes are too few for the plan, 1,000 for the tokenizer, 6,000 for an array of a part."""
        path = request.getfixturevalue("begun") if limit == 6000 else tmp_path / "corpus"
        with full_disk(limit), pytest.raises(InputError, match=f"^cannot write {path}.*File too large") as caught:
            make_store(texts, path, vocabulary_file)
        assert "\n" not in str(caught.value)
        assert all(whole_part(part) is not None for part in path.glob("part-*"))
        assert not [file for file in path.rglob(".*") if file.name.endswith(".tmp")]
        make_store(texts, path, vocabulary_file)
        assert content(path) == content(undisturbed)

    def test_when_it_is_brought_to_the_disk(
        self, vocabulary_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match=r"cannot write .*corpus: No space left on device"):
            make_store([FABLES], tmp_path / "corpus", vocabulary_file)
        assert not list((tmp_path / "corpus").iterdir())


class TestMemory:
    def test_few_parts_are_in_flight(
        self, vocabulary_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A pool that does nothing until it is waited for."""
        outstanding, most = 0, 0

        class Pool:
            def __init__(self, workers: int, context: object, initializer: Callable[..., None], arguments: Any) -> None:
                monkeypatch.setattr(parts, "parent_process", lambda: None)
                monkeypatch.setattr(signal, "signal", lambda *_: None)
                monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
                initializer(*arguments)

            def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
                nonlocal outstanding, most
                outstanding += 1
                most = max(most, outstanding)
                future: Future[Any] = Future()
                future.work = lambda: future.set_result(function(*arguments))  # type: ignore[attr-defined]
                return future

            def shutdown(self, cancel_futures: bool) -> None:
                pass

        def wait(futures: dict[Any, int], return_when: str) -> Any:
            nonlocal outstanding
            last = list(futures)[-1]  # in any order
            last.work()
            outstanding -= 1
            return type("Waited", (), {"done": {last}})

        monkeypatch.setattr(prepare_, "ProcessPoolExecutor", Pool)
        monkeypatch.setattr(prepare_, "wait", wait)
        prepared = make_store([FABLES], tmp_path / "corpus", vocabulary_file, workers=3)
        assert prepared.written > 10
        assert most == 5
        Store.open(tmp_path / "corpus")


class TestVocabulary:
    @pytest.mark.parametrize(
        ("words", "cased", "said"),
        [
            (["fox", "##x", "caf", "e", "##e", "[unused1]", "<S>"], None, "uncased"),
            (["fox", "##x", "Fox"], None, "cased"),
            (["fox", "##X"], None, "cased"),
            (["fox", "Fox"], False, "uncased"),
            (["fox", "##x"], True, "cased"),
        ],
    )
    def test_cased_as_its_words_or_as_asked(
        self, tmp_path: Path, words: list[str], cased: bool | None, said: str
    ) -> None:
        tokenizer = load_tokenizer(str(write_vocabulary(tmp_path / "vocab.txt", words)), cased)
        assert tokenizer.tokenize("fox") == ["fox"]
        assert tokenizer.tokenize("Fox") == (["fox"] if said == "uncased" else ["Fox"] if "Fox" in words else ["[UNK]"])
        # What is saved says which it is, and cannot be had otherwise.
        tokenizer.save_pretrained(tmp_path / "saved")
        for source in (tmp_path / "saved", tmp_path / "saved/tokenizer.json"):
            assert load_tokenizer(str(source), said == "cased").tokenize("Fox") == tokenizer.tokenize("Fox")
            with pytest.raises(InputError, match=f"is {said}, whatever the option says"):
                load_tokenizer(str(source), said != "cased")

    def test_accents_go_with_capitals(self, tmp_path: Path) -> None:
        file = write_vocabulary(tmp_path / "vocab.txt", ["cafe", "café", "Café"])
        assert load_tokenizer(str(file)).tokenize("Café café cafe") == ["Café", "café", "cafe"]
        assert load_tokenizer(str(file), False).tokenize("Café café cafe") == ["cafe"] * 3

    def test_chinese_by_character(self, tmp_path: Path) -> None:
        vocabulary = write_vocabulary(tmp_path / "vocab.txt", [*"我们是人a。", "##们", "\u2028", "##\u2028", "##b"])
        file = _write(tmp_path / "a.txt", "我们是ab人。我们Ab我。")
        make_store([file], tmp_path / "corpus", vocabulary, language="zh")
        assert _decoded(tmp_path / "corpus") == [["我 们 是 a ##b 人 。", "我 们 a ##b 我 。"]]
        store = Store.open(tmp_path / "corpus")
        assert store.vocab_size == 15
        assert store.continuations.nonzero()[0].tolist() == [11, 13, 14]

    def test_a_folder_with_nothing_but_a_vocabulary(self, tmp_path: Path) -> None:
        write_vocabulary(tmp_path / "vocab.txt", ["fox", "Fox"])
        assert load_tokenizer(str(tmp_path)).tokenize("Fox fox") == ["Fox", "fox"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("fox\n", r"vocab\.txt lacks \[PAD\] and \[UNK\] and \[CLS\] and \[SEP\] and \[MASK\]"),
            ("\n".join([*SPECIAL, "fox", "fox"]), r"vocab\.txt has 'fox' twice"),
            (b"\xff", r"vocab\.txt: no tokenizer can be read there"),
        ],
    )
    def test_vocabularies_that_are_none(self, tmp_path: Path, content: str | bytes, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_tokenizer(str(_write(tmp_path / "vocab.txt", content)))

    def test_tokenizers_that_are_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name, message in (("none.txt", "there is no such file"), ("none", "no tokenizer can be read there")):
            with pytest.raises(InputError, match=message) as error:
                load_tokenizer(str(tmp_path / name))
            assert "\n" not in str(error.value)
        _write(tmp_path / "tokenizer.json", "{")
        with pytest.raises(InputError, match=r"tokenizer\.json: no tokenizer can be read there"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))
        saved = load_tokenizer(str(write_vocabulary(tmp_path / "vocab.txt")))
        saved.save_pretrained(tmp_path)
        content = (tmp_path / "tokenizer.json").read_text()
        _write(tmp_path / "tokenizer.json", content.replace("[MASK]", "[MUSK]"))
        with pytest.raises(InputError, match=r"tokenizer\.json lacks \[MASK\] or <mask>"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))

    def test_special_tokens_of_a_model_that_knows_them_as_pieces(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "▁a", "b", "▁"]
        backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=1))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.add_special_tokens(pieces[:5])
        backend.save(str(tmp_path / "tokenizer.json"))
        file = _write(tmp_path / "a.txt", "a b <s> ab\n\n<mask>")
        prepared = make_store([file], tmp_path / "corpus", tmp_path / "tokenizer.json")
        store = Store.open(tmp_path / "corpus")
        assert not np.isin(store.parts[0].tokens, [0, 2, 3, 4]).any()
        assert store.special.cls == 2
        assert store.continuations.nonzero()[0].tolist() == [6]
        assert prepared.problems.counts["a special token's name in the text"] == 2

    @pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs BERT's vocabularies in ../shared")
    @pytest.mark.parametrize(
        ("name", "size", "ids"),
        [
            ("bert-base-uncased", 30_522, [1996, 7668]),
            ("bert-base-cased", 28_996, [1109, 21036]),
            ("bert-base-chinese", 21_128, [8174, 8377]),
        ],
    )
    def test_berts_own(self, name: str, size: int, ids: list[int]) -> None:
        tokenizer = load_tokenizer(str(VOCABULARIES / f"{name}.txt"))
        assert len(tokenizer) == size
        assert tokenizer("The Café", add_special_tokens=False).input_ids == ids


class TestTraining:
    def test_the_same_text_gives_the_same_vocabulary(self, texts: list[Path]) -> None:
        made = {tuple(train_vocabulary(texts, Reader(), 1500, cased=False).get_vocab().items()) for _ in range(3)}
        assert len({tuple(sorted(words, key=lambda word: word[1])) for words in made}) == 1

    def test_the_vocabulary(self) -> None:
        tokenizer = train_vocabulary([FABLES], Reader(), 700, cased=False)
        words = tokenizer.convert_ids_to_tokens(range(700))
        assert len(tokenizer) == len(set(words)) == 700
        assert words[:5] == SPECIAL
        assert all(word == word.lower() for word in words[5:])
        assert {"the", "and", "fox", "##ed", "a", "##a", "z", "##z"} <= set(words)
        assert "##," not in words
        unknown = sum(tokenizer(fable["text"]).input_ids.count(1) for fable in fables())
        assert unknown == 0

    def test_cased(self) -> None:
        words = train_vocabulary([FABLES], Reader(), 700, cased=True).get_vocab()
        assert "The" in words
        assert "the" in words

    def test_an_alphabet_that_covers_the_text(self) -> None:
        """Chinese needs more letters than the usual limit of 1,000 allows; what is rare still has no place."""
        generator = random.Random(0)
        letters = [chr(0x4E00 + i) for i in range(2000)]
        latin = ["".join(generator.choices("abcdefghij", k=6)) for _ in range(1500)]
        text = "".join(letters * 5) + "\u5fff " + " ".join(latin * 2)
        words = vocabulary.train(lambda: [text], 5000, cased=False).get_vocab()
        assert len(words.keys() & set(letters)) >= 1990
        assert "\u5fff" not in words
        assert f"##{letters[0]}" not in words

    def test_too_little_text(self) -> None:
        with pytest.raises(InputError, match=r"the text gives a vocabulary of [12],\d{3} tokens, not of 30,522"):
            train_vocabulary([FABLES], Reader(), 30_522, cased=False)


@needs("sentencex")
class TestMistakes:
    def test_another_plan(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "fox")
        path = tmp_path / "corpus"
        make_store([file], path, vocabulary_file)
        before = content(path)
        for message, options in (
            ("language", {"language": "de"}),
            ("reader", {"reader": Reader(sentence_per_line=True)}),
            ("part_characters", {"part_characters": 5}),
        ):
            with pytest.raises(InputError, match=rf"was begun with other settings \({message}\)"):
                make_store([file], path, vocabulary_file, **options)
        with pytest.raises(InputError, match=r"other settings \(files\)"):
            make_store([file, file], path, vocabulary_file)
        with pytest.raises(InputError, match=r"other settings \(tokenizer\)"):
            prepare([file], path, lambda: None, asked={"another": 1}, reader=Reader(), part_characters=4000)
        _write(file, "foxes")
        with pytest.raises(InputError, match=r"other settings \(files\)"):
            make_store([file], path, vocabulary_file)
        assert content(path) == before

    def test_folders_that_cannot_be_written(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "fox")
        with pytest.raises(InputError, match=r"is not empty, and holds no token store"):
            make_store([file], tmp_path, vocabulary_file)
        with pytest.raises(InputError, match=r"a\.txt is no folder"):
            make_store([file], file, vocabulary_file)
        with pytest.raises(InputError, match=r"cannot write .*a\.txt/corpus: Not a directory"):
            make_store([file], file / "corpus", vocabulary_file)
        assert content(tmp_path) == {"a.txt": b"fox"}

    @pytest.mark.parametrize("name", ["plan.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_store_that_is_damaged(self, vocabulary_file: Path, tmp_path: Path, name: str) -> None:
        file = _write(tmp_path / "a.txt", "fox")
        make_store([file], tmp_path / "corpus", vocabulary_file)
        _write(tmp_path / "corpus" / name, "{")
        with pytest.raises(InputError, match=r"is damaged: remove .*corpus, and begin anew"):
            make_store([file], tmp_path / "corpus", vocabulary_file)

    def test_a_tokenizer_that_fails_leaves_the_folder_to_others(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "fox")
        with pytest.raises(InputError, match="no such file"):
            make_store([file], tmp_path / "corpus", tmp_path / "none.txt")
        make_store([file], tmp_path / "corpus", vocabulary_file, language="de")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md", "a.txt.gz"])
    def test_nothing_is_left(self, vocabulary_file: Path, tmp_path: Path, name: str) -> None:
        file = _write(tmp_path / name, b"\xff\n")
        reason = "the rest of a damaged or truncated gzip file" if name.endswith("gz") else "not UTF-8"
        with pytest.raises(InputError, match=f"nothing is left of the text: 1 x {reason}"):
            make_store([file], tmp_path / "corpus", vocabulary_file, reader=Reader(use_damaged=True))
        _write(file, b"\x01\n" if name == "a.txt" else b"")
        reason = "a document without a token" if name == "a.txt" else "a file without text"
        with pytest.raises(InputError, match=f"nothing is left of the text: 1 x {reason}"):
            make_store([file], tmp_path / "other", vocabulary_file)
        with pytest.raises(InputError, match="is not finished"):
            Store.open(tmp_path / "other")

    def test_arguments(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "fox")
        for message, files, options in (
            ("there are no files", [], {}),
            ("no such file", [tmp_path / "b.txt"], {}),
            ("no shard 0/2", [file], {"shard": (0, 2)}),
            ("no shard 3/2", [file], {"shard": (3, 2)}),
            ("a code like en", [file], {"language": "English"}),
            (r"a\.txt is given twice", [file, Path(os.path.relpath(file))], {}),
            (r"b\.json is a JSON array", [file, _write(tmp_path / "b.json", '[{"text": "fox"}]')], {}),
        ):
            with pytest.raises(InputError, match=message):
                make_store(files, tmp_path / "corpus", vocabulary_file, **options)
        assert not (tmp_path / "corpus").exists()


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
        assert f"fastbert: {closing}parts;" in said
        assert said.rstrip().endswith("corpus is finished")
        status, said = run(*arguments)
        assert status == 0
        assert "1 parts, 1 of them were there;" in said
        status, said = run(*arguments, "--cased")
        assert (status, said.count("\n")) == (1, 1)
        assert "was begun with other settings (tokenizer)" in said

    def test_another_vocabulary_of_the_same_name(self, run: Run, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt", "fox")
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
        assert "is not finished: 1 of 1 parts are other shards' to write" in said
        assert run(*arguments, "--shard", "1/2")[0] == 0
        assert Store.open(path).vocab_size == 700
        shutil.move(path, tmp_path / "sharded")
        assert run(*arguments)[0] == 0
        assert content(path) == content(tmp_path / "sharded")

    def test_options(self, run: Run, vocabulary_file: Path, tmp_path: Path) -> None:
        files = [_write(tmp_path / "a.jsonl", '{"b": "fox fox"}'), _write(tmp_path / "b.txt.gz", b"")]
        files[1].write_bytes(gzip.compress("lion。 fox\nlion".encode()))
        options = ("--text-key", "b", "--sentence-per-line", "--language", "zh", "--uncased", "--workers", "2")
        status, said = run(*files, "-o", tmp_path / "corpus", "--vocab", vocabulary_file, *options)
        assert status == 0
        assert "fastbert: warning: 1 of 6 tokens are unknown to the vocabulary" in said
        assert _decoded(tmp_path / "corpus") == [["fox fox"], ["lion [UNK] fox", "lion"]]

    def test_a_damaged_file(self, run: Run, vocabulary_file: Path, tmp_path: Path) -> None:
        file = _write(tmp_path / "a.txt.gz", gzip.compress(b"fox lion\n\nfox", 0)[:-10])
        arguments = (file, "-o", tmp_path / "corpus", "--vocab", vocabulary_file)
        status, said = run(*arguments)
        assert (status, said.count("\n")) == (1, 1)
        assert f"fastbert: {file} is a damaged or truncated gzip file (3 lines with 2 documents can be read)" in said
        assert "--use-damaged" in said
        status, said = run(*arguments, "--use-damaged")
        assert status == 0
        reason = "the rest of a damaged or truncated gzip file, 1 x: a.txt.gz (3 lines with 2 documents read)"
        assert f"fastbert: left out: {reason}\n" in said
        assert _decoded(tmp_path / "corpus") == [["fox lion"], ["f"]]

    def test_mistakes(self, run: Run, vocabulary_file: Path, tmp_path: Path) -> None:
        array = _write(tmp_path / "array.json", '[{"text": "fox"}]')
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
