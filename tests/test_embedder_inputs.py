"""What an Embedder takes: lists, iterators and columns of strings, batches of columns; and what it says of others."""

import contextlib
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

import fastbert
from fastbert.errors import InputError
from fastbert.inference.embedder import Embedder
from fastbert.inference.loading import load_tokenizer
from tests.checkpoints import TEXTS, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def embedder(checkpoint: str) -> Embedder:
    return fastbert.Embedder(checkpoint)


def arrow(texts: list[str]) -> Any:
    return pytest.importorskip("pyarrow").chunked_array([texts[:2], texts[2:]])


def pandas(texts: list[str]) -> Any:
    return pytest.importorskip("pandas").Series(texts, index=range(9, 9 + len(texts)))


def datasets(texts: list[str]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_dict({"text": texts})["text"]


@pytest.mark.parametrize("column", [tuple, iter, np.array, lambda t: np.array(t, object), arrow, pandas, datasets])
def test_any_column_of_strings(embedder: Embedder, column: Callable[[list[str]], Iterable[str]]) -> None:
    np.testing.assert_array_equal(embedder.encode(column(TEXTS)), embedder.encode(TEXTS))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("hello", "is one string"),
        (b"hello", "is of type bytes"),
        ({"hello": 1}, "is of type dict"),
        (7, "is 7"),
        (["a", "b", None], "number 2 is of type NoneType"),
        (["a", b"b"], "number 1 is of type bytes"),
        (iter(["a", ["b"]]), "number 1 is of type list"),
    ],
    ids=["string", "bytes", "dict", "number", "None in it", "bytes in it", "iterator"],
)
def test_what_is_no_text_is_named(embedder: Embedder, texts: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^texts must be .*{message}$"):
        embedder.encode(texts)


def test_a_null_of_arrow_is_no_text(embedder: Embedder) -> None:
    with pytest.raises(InputError, match="number 3 is of type NoneType"):
        embedder.encode(arrow(["a", "b", "c", None]))  # type: ignore[list-item]


def test_a_model_that_is_loaded_needs_its_tokenizer(checkpoint: str, embedder: Embedder) -> None:
    for arguments, options in [((embedder.model,), {}), ((embedder.model, embedder.tokenizer), {"device": "cpu"})]:
        with pytest.raises(InputError, match="needs its tokenizer"):
            Embedder(*arguments, **options)
    with pytest.raises(InputError, match="give the name alone"):
        Embedder(checkpoint, embedder.tokenizer)


def test_texts_without_any_token_are_zeros(checkpoint: str) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    for pool in ("mean", "max", "weightedmean", "lasttoken"):
        vectors = Embedder(Embedder(checkpoint).model, tokenizer, pool=pool).encode(["", "cat", "", "a dog"])
        assert (np.abs(vectors).sum(1) > 0).tolist() == [False, True, False, True]
        assert np.isfinite(vectors).all()


def test_a_batch_of_columns_gets_one_more(embedder: Embedder) -> None:
    batch = {"id": np.arange(len(TEXTS)), "body": np.array(TEXTS, object)}
    done = embedder(batch, column="body", output="vector")
    assert list(done) == ["id", "body", "vector"]
    np.testing.assert_array_equal(done["vector"], embedder.encode(TEXTS))
    np.testing.assert_array_equal(done["id"], batch["id"])
    assert list(batch) == ["id", "body"]
    prompted = embedder({"text": TEXTS}, prompt_text="red ")["embedding"]
    np.testing.assert_array_equal(prompted, embedder.encode(TEXTS, prompt_text="red "))
    with pytest.raises(InputError, match="no column 'text', but 'id', 'body'"):
        embedder(batch)
    with pytest.raises(InputError, match="a column 'body' already"):
        embedder(batch, column="body", output="body")


def test_datasets_map(embedder: Embedder) -> None:
    rows = pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS})
    done = rows.map(embedder, batched=True, batch_size=2).with_format("numpy")
    np.testing.assert_allclose(done["embedding"], embedder.encode(TEXTS), atol=1e-6)


def test_it_travels_to_a_worker(embedder: Embedder) -> None:
    there = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(there.encode(TEXTS), embedder.encode(TEXTS))
    assert str(there) == str(embedder)


class _Killed(Embedder):
    """Of two workers one is killed, in its second batch, as is a process that takes too much memory."""

    def __init__(self, name: str, marks: str) -> None:
        super().__init__(name)
        self.marks, self.calls = Path(marks), 0
        (self.marks / f"started-{os.getpid()}").touch()

    def __call__(self, batch: Any, **options: Any) -> dict[str, Any]:
        until = time.monotonic() + 60
        while len(list(self.marks.glob("started-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        self.calls += 1
        (self.marks / f"worked-{os.getpid()}").touch()
        with contextlib.suppress(FileExistsError):
            if self.calls == 2:
                (self.marks / "killed").touch(exist_ok=False)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch, **options)


@pytest.mark.skipif("FASTBERT_RAY" not in os.environ, reason="takes a minute or two: FASTBERT_RAY=1")
def test_two_workers_of_ray_of_which_one_is_killed(checkpoint: str, embedder: Embedder, tmp_path: Path) -> None:
    """Over Parquet files: each row once, and the vectors of one process."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'ray[data]' (240 MB)")
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"the {'big ' * (i % 7)}cat and {'a dog ' * (i % 3)}" for i in range(64)]
    (tmp_path / "rows").mkdir()
    for i in range(4):
        rows = range(16 * i, 16 * i + 16)
        parquet.write_table(pa.table({"id": rows, "text": [texts[j] for j in rows]}), tmp_path / f"rows/{i}.parquet")
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here)
    try:
        done = (
            ray.data.read_parquet(str(tmp_path / "rows"))
            .repartition(8)
            .map_batches(
                _Killed,
                fn_constructor_args=(checkpoint, str(tmp_path)),
                batch_size=8,
                compute=ray.data.ActorPoolStrategy(size=2),
                num_cpus=0.5,
            )
        )
        found = [(row["id"], row["embedding"]) for row in done.take_all()]
    finally:
        ray.shutdown()
    assert sorted(i for i, _ in found) == list(range(64))
    np.testing.assert_allclose([dict(found)[i] for i in range(64)], embedder.encode(texts), atol=1e-6)
    assert (tmp_path / "killed").exists()
    assert len(list(tmp_path.glob("worked-*"))) == 3  # two, and one in place of the killed one
