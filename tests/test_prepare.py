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
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer

from fastbert.data import building, parts
from fastbert.data.documents import Problems
from fastbert.data.prepare import prepare, train_vocabulary
from fastbert.data.readers import Reader
from fastbert.data.sources import File
from fastbert.data.store import Store, whole_part
from fastbert.errors import InputError
from tests.optional import needs
from tests.stores import (
    FABLES,
    SPECIAL,
    content,
    decoded,
    documents,
    fables,
    faulty_texts,
    full_disk,
    make_store,
    write,
    write_vocabulary,
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return faulty_texts(tmp_path_factory.mktemp("texts"))


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
        assert documents(Store.open(tmp_path / "corpus")) == expected
        assert prepared.documents == len(expected)
        assert prepared.sentences == sum(map(len, expected))
        assert prepared.tokens == prepared.written_tokens == sum(len(s) for document in expected for s in document)
        assert prepared.unknown == sum(s.count(1) for document in expected for s in document)
        assert prepared.parts == prepared.written > 10
        assert prepared.found == prepared.missing == prepared.problems.counts.total() == 0

    def test_parts_are_closed_when_they_are_full(self, undisturbed: Path, texts: list[Path], tmp_path: Path) -> None:
        sizes = [len(part.documents) - 1 for part in Store.open(undisturbed).parts]
        assert len(sizes) > 20
        documents = [document for file in texts for document in Reader().read(File.of(file), "", Problems())]
        size, expected = 0, [0]
        for document in documents:
            if size >= 4000:
                expected.append(0)
                size = 0
            expected[-1] += document.kind != "markdown"
            size += document.size
        assert sizes[:20] == expected[:20]

    def test_very_long_sentences_stay_whole(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "Short.\n" + "fox " * 20_000 + "fox.\nShort.\n\nnext")
        make_store([file], tmp_path / "corpus", vocabulary_file)
        lengths = [[len(sentence) for sentence in document] for document in documents(Store.open(tmp_path / "corpus"))]
        assert lengths[0][1] == 20_002
        assert len(lengths) == 2

    def test_names_of_special_tokens_are_text(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "a [MASK] b [SEP]")
        make_store([file], tmp_path / "corpus", vocabulary_file)
        assert decoded(tmp_path / "corpus") == [["a [ m ##a ##s ##k ] b [ s ##e ##p ]"]]

    def test_what_has_no_token_is_left_out_and_counted(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "\u0001\n\nfox\n\u0001\nfox\n\n\u0001\n")
        options = {"reader": Reader(sentence_per_line=True), "part_characters": 1}
        prepared = make_store([file], tmp_path / "corpus", vocabulary_file, **options)
        assert decoded(tmp_path / "corpus") == [["fox", "fox"]]
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
            file = write(tmp_path / "a.txt", f"w0 {names[-1]}")
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
                write(file, '{"text": "fox"}\n{')
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
        file = write(tmp_path / "a.txt", "fox")
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
        write(path / "part-000011/tokens.npy", bytes(tokens))
        assert make_store(texts, path, vocabulary_file).written == 4
        assert content(path) == content(undisturbed)

    def test_parts_of_a_text_that_has_changed_are_written_again(self, vocabulary_file: Path, tmp_path: Path) -> None:
        text = "\n\n".join(fable["text"] for fable in fables())
        file = write(tmp_path / "a.txt", text)
        make_store([file], tmp_path / "changed", vocabulary_file)
        write(file, text.replace("wolf", "flow"))
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
        return [texts[0], write(tmp_path / "cut.txt.gz", packed[: len(packed) * 2 // 3]), texts[1]]

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

        monkeypatch.setattr(building, "ProcessPoolExecutor", Pool)
        monkeypatch.setattr(building, "wait", wait)
        prepared = make_store([FABLES], tmp_path / "corpus", vocabulary_file, workers=3)
        assert prepared.written > 10
        assert most == 5
        Store.open(tmp_path / "corpus")


@needs("sentencex")
class TestMistakes:
    def test_another_plan(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "fox")
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
        write(file, "foxes")
        with pytest.raises(InputError, match=r"other settings \(files\)"):
            make_store([file], path, vocabulary_file)
        assert content(path) == before

    def test_folders_that_cannot_be_written(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "fox")
        with pytest.raises(InputError, match=r"is not empty, and holds no token store"):
            make_store([file], tmp_path, vocabulary_file)
        with pytest.raises(InputError, match=r"a\.txt is no folder"):
            make_store([file], file, vocabulary_file)
        with pytest.raises(InputError, match=r"cannot write .*a\.txt/corpus: Not a directory"):
            make_store([file], file / "corpus", vocabulary_file)
        assert content(tmp_path) == {"a.txt": b"fox"}

    @pytest.mark.parametrize("name", ["plan.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_store_that_is_damaged(self, vocabulary_file: Path, tmp_path: Path, name: str) -> None:
        file = write(tmp_path / "a.txt", "fox")
        make_store([file], tmp_path / "corpus", vocabulary_file)
        write(tmp_path / "corpus" / name, "{")
        with pytest.raises(InputError, match=r"is damaged: remove .*corpus, and begin anew"):
            make_store([file], tmp_path / "corpus", vocabulary_file)

    def test_a_tokenizer_that_fails_leaves_the_folder_to_others(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "fox")
        with pytest.raises(InputError, match="no such file"):
            make_store([file], tmp_path / "corpus", tmp_path / "none.txt")
        make_store([file], tmp_path / "corpus", vocabulary_file, language="de")

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md", "a.txt.gz"])
    def test_nothing_is_left(self, vocabulary_file: Path, tmp_path: Path, name: str) -> None:
        file = write(tmp_path / name, b"\xff\n")
        reason = "the rest of a damaged or truncated gzip file" if name.endswith("gz") else "not UTF-8"
        with pytest.raises(InputError, match=f"nothing is left of the text: 1 x {reason}"):
            make_store([file], tmp_path / "corpus", vocabulary_file, reader=Reader(use_damaged=True))
        write(file, b"\x01\n" if name == "a.txt" else b"")
        reason = "a document without a token" if name == "a.txt" else "a file without text"
        with pytest.raises(InputError, match=f"nothing is left of the text: 1 x {reason}"):
            make_store([file], tmp_path / "other", vocabulary_file)
        assert not (tmp_path / "other").exists()

    def test_arguments(self, vocabulary_file: Path, tmp_path: Path) -> None:
        file = write(tmp_path / "a.txt", "fox")
        for message, files, options in (
            ("there are no files", [], {}),
            ("no such file", [tmp_path / "b.txt"], {}),
            ("no shard 0/2", [file], {"shard": (0, 2)}),
            ("no shard 3/2", [file], {"shard": (3, 2)}),
            ("a code like en", [file], {"language": "English"}),
            (r"a\.txt is given twice", [file, Path(os.path.relpath(file))], {}),
            (r"b\.json is a JSON array", [file, write(tmp_path / "b.json", '[{"text": "fox"}]')], {}),
        ):
            with pytest.raises(InputError, match=message):
                make_store(files, tmp_path / "corpus", vocabulary_file, **options)
        assert not (tmp_path / "corpus").exists()
