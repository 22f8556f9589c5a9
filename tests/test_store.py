"""The token store as it is read: what it maps, and one clear error for each way it can be damaged."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastbert.data import store as format_
from fastbert.data.drafts import Drafts
from fastbert.data.store import SpecialTokens, Store, read_json, whole_part, write_json
from fastbert.errors import InputError
from tests.stores import FABLES, LETTERS, SPECIAL, content, make_store, write_vocabulary


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    make_store([FABLES], folder / "corpus", write_vocabulary(folder / "vocab.txt"))
    return folder / "corpus"


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "corpus"))


def _change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


class TestOpen:
    def test_what_is_in_it(self, made: Path) -> None:
        store = Store.open(str(made))
        assert len(store.parts) > 10
        assert store.path == made
        assert store.vocab_size == 5 + len(LETTERS) + 36 + 6
        assert store.special == SpecialTokens(pad=0, unk=1, cls=2, sep=3, mask=4, all=(0, 1, 2, 3, 4))
        words = (made / "vocab.txt").read_text().splitlines()
        assert store.continuations.tolist() == [word.startswith("##") for word in words]
        assert store.documents == sum(len(part.documents) - 1 for part in store.parts) == 104
        assert store.sentences == sum(len(part.sentences) - 1 for part in store.parts)
        assert store.tokens == sum(len(part.tokens) for part in store.parts)
        for part in store.parts:
            assert (part.tokens.dtype, part.sentences.dtype, part.documents.dtype) == (np.uint16, np.uint32, np.uint32)
            assert part.tokens.max() < store.vocab_size
            assert not np.isin(part.tokens, [0, 2, 3, 4]).any()
            for offsets, end in ((part.sentences, len(part.tokens)), (part.documents, len(part.sentences) - 1)):
                assert offsets[0] == 0
                assert offsets[-1] == end
                assert (np.diff(offsets.astype(np.int64)) > 0).all()
            with pytest.raises(ValueError, match="read-only"):
                part.tokens[0] = 0

    def test_entropy_is_that_of_its_tokens(self, made: Path) -> None:
        store = Store.open(made)
        counts = np.bincount(np.concatenate([part.tokens for part in store.parts]))
        shares = counts[counts > 0] / counts.sum()
        assert store.entropy == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-12)

    def test_arrays_are_plain_npy_files(self, made: Path) -> None:
        for number, part in enumerate(Store.open(made).parts):
            for name in ("tokens", "sentences", "documents"):
                file = made / f"part-{number:06d}" / f"{name}.npy"
                np.testing.assert_array_equal(np.load(file, allow_pickle=False), getattr(part, name))

    def test_the_fingerprint_is_of_tokens_and_tokenizer(self, made: Path, path: Path) -> None:
        store = Store.open(made)
        assert Store.open(path).fingerprint == store.fingerprint
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["parts"].reverse()
        _change(path / "manifest.json", **manifest)
        assert Store.open(path).fingerprint != store.fingerprint

    def test_transformers_loads_its_tokenizer(self, made: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(made)
        assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL
        assert tokenizer("The Fox").input_ids == [2, *tokenizer.convert_tokens_to_ids(["the", "fox"]), 3]


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)


def _lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0\0")


def _retype(file: Path) -> None:
    """As many bytes, of another kind."""
    file.write_bytes(file.read_bytes().replace(b"<u", b"<i", 1))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file is missing": ("part-000003/tokens.npy", Path.unlink, "is missing"),
    "a part is missing": ("part-000003", shutil.rmtree, "is missing"),
    "cut": ("part-000003/tokens.npy", _cut, "is damaged: it has not the size"),
    "cut to nothing": ("part-000000/documents.npy", lambda f: os.truncate(f, 0), "is damaged: it has not the size"),
    "too long": ("part-000003/sentences.npy", _lengthen, "is damaged: it has not the size"),
    "another type": ("part-000003/documents.npy", _retype, "is damaged: it has not the size"),
    "a bit flips": ("part-000003/tokens.npy", _flip, "is damaged: its checksum"),
    "the tokenizer is another": ("tokenizer.json", _lengthen, "is not the one that the store was made with"),
    "its settings are others": ("tokenizer_config.json", _lengthen, "is not the one that the store was made with"),
    "the vocabulary is another": ("vocab.txt", _flip, "is not the one that the store was made with"),
    "no vocabulary": ("vocab.txt", Path.unlink, "is missing"),
    "manifest cut": ("manifest.json", _cut, "is damaged"),
    "manifest empty": ("manifest.json", lambda f: f.write_text("{}"), "format None is not 1"),
    "manifest of another version": ("manifest.json", lambda f: _change(f, format=2), "format 2 is not 1"),
    "manifest without parts": ("manifest.json", lambda f: _change(f, parts=None), "is damaged"),
    "manifest without totals": ("manifest.json", lambda f: _change(f, totals={}), "is damaged"),
    "parts are lost": ("manifest.json", lambda f: _change(f, parts=[]), "its totals are not those of its parts"),
}


class TestDamaged:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_one_clear_error(self, path: Path, fault: str) -> None:
        name, spoil, message = FAULTS[fault]
        spoil(path / name)
        with pytest.raises(InputError) as error:
            Store.open(path)
        assert str(path / name) in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_checksums_can_be_left_out_sizes_cannot(self, path: Path) -> None:
        _flip(path / "part-000003/tokens.npy")
        Store.open(path, verify=False)
        _cut(path / "part-000003/tokens.npy")
        with pytest.raises(InputError, match="size"):
            Store.open(path, verify=False)

    def test_offsets_that_do_not_end_where_the_part_does(self, path: Path) -> None:
        for name in ("sentences", "documents"):
            file = path / f"part-000001/{name}.npy"
            array = np.load(file)
            array[-1] += 1
            np.save(file, array)
            file.write_bytes(format_.header("uint32", len(array)) + array.tobytes())
            with pytest.raises(InputError, match=rf"{name}\.npy is damaged: it does not end where the part does"):
                Store.open(path, verify=False)
            array[-1] -= 1
            file.write_bytes(format_.header("uint32", len(array)) + array.tobytes())
        Store.open(path)


class TestUnfinished:
    def test_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="none: there is no such folder"):
            Store.open(tmp_path / "none")
        with pytest.raises(InputError, match="is no token store"):
            Store.open(tmp_path)

    def test_says_which_shards_are_missing(self, path: Path) -> None:
        (path / "manifest.json").unlink()
        (path / "shard-00001-of-00001.json").unlink()
        with pytest.raises(InputError, match=r"is not finished: run its `fastbert prepare` again"):
            Store.open(path)
        for shard in (2, 4):
            (path / f"shard-{shard:05d}-of-00004.json").write_text("{}")
        with pytest.raises(InputError, match=r"is not finished: .* with --shard 1/4, 3/4 again"):
            Store.open(path)
        (path / "shard-00064-of-00064.json").write_text("{}")
        with pytest.raises(InputError, match=r"with --shard 1/4, 3/4 again"):
            Store.open(path)
        for file in path.glob("shard-*-of-00004.json"):
            file.unlink()
        with pytest.raises(InputError, match=r"--shard 1/64, 2/64, 3/64, 4/64, 5/64 and 58 more again"):
            Store.open(path)


OPEN = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (30, int(sys.argv[2])))
from fastbert.data.store import Store
print(len(Store.open(sys.argv[1]).parts))
"""


@pytest.mark.parametrize(("hard", "said"), [(4096, None), (60, "files, but a process may open 60 here")])
def test_more_files_than_a_process_may_open_at_first(made: Path, hard: int, said: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", OPEN, str(made), str(hard)], capture_output=True, text=True)
    if said is None:
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) * 3 > 30
    else:
        assert said in done.stderr.splitlines()[-1]


def test_whole_part(path: Path) -> None:
    found = whole_part(path / "part-000002")
    assert found is not None
    assert found["name"] == "part-000002"
    assert whole_part(path / "part-000002", {"text_crc32": found["text_crc32"]}) == found
    assert whole_part(path / "part-000002", {"text_crc32": found["text_crc32"] + 1}) is None
    assert whole_part(path / "part-999999") is None
    (path / "part-000001/part.json").write_text("{}")
    assert whole_part(path / "part-000001") is None
    _flip(path / "part-000002/tokens.npy")
    assert whole_part(path / "part-000002") is None


class TestDrafts:
    def test_json(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"b": [1, "ä"]})
        assert read_json(tmp_path / "a.json") == {"b": [1, "ä"]}
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"b": object()})
        assert read_json(tmp_path / "a.json") == {"b": [1, "ä"]}
        assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
        assert read_json(tmp_path / "none.json") is None

    def test_a_folder_appears_at_once_in_place_of_another(self, tmp_path: Path) -> None:
        drafts = Drafts(tmp_path, "1-of-2")
        for text in ("old", "new"):
            with drafts.directory("part") as folder:
                (folder / text).write_text(text)
                assert (tmp_path / "part/old").exists() == (text == "new")
        assert content(tmp_path) == {"part/new": b"new"}
        with pytest.raises(OSError, match="no room"), drafts.directory("part") as folder:  # noqa: PT012
            (folder / "newest").write_text("newest")
            raise OSError("no room")
        assert content(tmp_path) == {"part/new": b"new"}

    def test_clear_removes_what_was_left_by_the_same_key(self, tmp_path: Path) -> None:
        mine, other = Drafts(tmp_path, "1-of-2"), Drafts(tmp_path, "11-of-2")
        begun = [drafts.scratch("a") for drafts in (mine, other)]
        for scratch in begun:
            scratch.__enter__()
        (tmp_path / ".b.json.1-of-2.0.tmp").write_text("")
        mine.clear()
        assert [file.name.split(".")[2] for file in tmp_path.iterdir()] == ["11-of-2"]
