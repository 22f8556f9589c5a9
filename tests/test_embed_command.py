"""`fastbert embed` and `fastbert similar` as users meet them."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.numpy import load_file

from fastbert.commands.texts import read_texts
from fastbert.inference.embedder import Embedder
from tests.checkpoints import TEXTS, tiny_checkpoint
from tests.command import Run, is_one_line
from tests.stores import full_disk, write

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write(tmp_path / "texts.txt", "\n".join(TEXTS) + "\n")


def said(stderr: str) -> list[str]:
    """Lines behind the one about what was taken from the model."""
    taken, *others = stderr.splitlines()
    assert taken.startswith("fastbert: BertModel, mean")
    assert all(line.startswith("fastbert: ") for line in others)
    return [line.removeprefix("fastbert: ") for line in others]


def test_embed_writes_a_row_for_each_line(run: Run, checkpoint: str, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    status, out, err = run("embed", checkpoint, texts, "-o", output, "--batch-tokens", 10)
    assert (status, out) == (0, "")
    (done,) = said(err)
    assert done.startswith("5 texts, 35 tokens (1 empty) in ")
    assert done.endswith(f" s for texts): {output} (5, 32)")
    vectors = np.load(output)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, Embedder.from_pretrained(checkpoint).encode(TEXTS), atol=1e-5)
    assert output.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    assert sorted(os.listdir(tmp_path)) == ["texts.txt", "v.npy"]


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_embed_reads_stdin(run: Run, checkpoint: str, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    output = tmp_path / "v.npy"
    status, _, err = run("embed", checkpoint, *arguments, "-o", output, stdin=b"the cat\n\na dog")
    assert status == 0, err
    np.testing.assert_allclose(
        np.load(output), Embedder.from_pretrained(checkpoint).encode(["the cat", "", "a dog"]), atol=1e-5
    )


def test_embed_reads_gzip_files(run: Run, checkpoint: str, tmp_path: Path) -> None:
    packed, output = tmp_path / "texts.txt.gz", tmp_path / "v.npy"
    packed.write_bytes(gzip.compress(b"the cat\r\n\r\na dog", 0))
    status, _, err = run("embed", checkpoint, packed, "-o", output)
    assert status == 0, err
    expected = Embedder.from_pretrained(checkpoint).encode(["the cat", "", "a dog"])
    np.testing.assert_allclose(np.load(output), expected, atol=1e-5)
    output.unlink()
    packed.write_bytes(packed.read_bytes()[:-10])  # a row a line, or none
    status, _, err = run("embed", checkpoint, packed, "-o", output)
    assert status == 1
    assert f"{packed} is a damaged or truncated gzip file, after line 2" in err
    assert not output.exists()


def test_embed_passes_its_options_on(run: Run, checkpoint: str, texts: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.npy"
    options = ("--pool", "cls", "--normalize", "--max-length", 5, "--device", "cpu", "--dtype", "bf16")
    status, _, err = run("embed", checkpoint, texts, "-o", output, *options)
    assert status == 0, err
    assert "cut at 5 tokens" in err
    exact = Embedder.from_pretrained(checkpoint, pool="cls", normalize=True, max_length=5).encode(TEXTS)
    np.testing.assert_allclose(np.load(output), exact, atol=0.05)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"\n", [""]),
        (b"a\n\n\nb", ["a", "", "", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\rb\r\rc\r", ["a", "b", "", "c"]),
        ("\N{ZERO WIDTH NO-BREAK SPACE}a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),
    ],
)
def test_only_newlines_end_a_text(tmp_path: Path, content: bytes, lines: list[str]) -> None:
    (tmp_path / "texts.txt").write_bytes(content)
    (tmp_path / "texts.txt.GZ").write_bytes(gzip.compress(content))
    assert read_texts(tmp_path / "texts.txt") == read_texts(tmp_path / "texts.txt.GZ") == lines


def test_one_text_is_one(run: Run, checkpoint: str, tmp_path: Path) -> None:
    status, _, err = run("embed", checkpoint, "-o", tmp_path / "v.npy", stdin=b"the cat sat\n")
    assert status == 0
    assert "fastbert: 1 text, 5 tokens in " in err


def test_the_three_files_hold_the_same(run: Run, checkpoint: str, tmp_path: Path) -> None:
    lines = [json.dumps({"key": f"k{number}", "body": text}) + "\n" for number, text in enumerate(TEXTS)]
    table = write(tmp_path / "texts.jsonl", "".join(lines))
    keys = ("--text-key", "body", "--id-key", "key", "--window", 2)
    for suffix in ("npy", "safetensors", "parquet"):
        status, _, err = run("embed", checkpoint, table, *keys, "-o", tmp_path / f"v.{suffix}")
        assert status == 0, err
    vectors = np.load(tmp_path / "v.npy")
    np.testing.assert_allclose(vectors, Embedder.from_pretrained(checkpoint).encode(TEXTS), atol=1e-5)
    np.testing.assert_array_equal(load_file(tmp_path / "v.safetensors")["vector"], vectors)
    written = parquet.read_table(tmp_path / "v.parquet")
    assert written["id"].to_pylist() == [f"k{number}" for number in range(5)]
    assert written["text"].to_pylist() == TEXTS
    np.testing.assert_array_equal(np.array(written["vector"].to_pylist(), np.float32), vectors)
    run("embed", checkpoint, table, *keys, "-o", tmp_path / "w.parquet", "--no-keep-text")
    assert parquet.read_schema(tmp_path / "w.parquet").names == ["id", "vector"]


def test_what_is_wrong_with_lines_is_counted(run: Run, checkpoint: str, tmp_path: Path) -> None:
    content = b"the cat\n\n\xff\n" + b"the cat " * 50 + b"\n"
    status, _, err = run("embed", checkpoint, "-o", tmp_path / "v.npy", stdin=content)
    assert status == 0, err
    warning, done = said(err)
    assert warning == "warning: 1 x not UTF-8 (read with \ufffd for what is not), first in stdin, line 3"
    assert done.startswith("4 texts, 56 tokens (1 cut at 48 tokens, 1 empty) in ")
    assert np.load(tmp_path / "v.npy").shape == (4, 32)


def test_nothing_to_embed_is_said(run: Run, checkpoint: str, tmp_path: Path) -> None:
    status, _, err = run("embed", checkpoint, "-o", tmp_path / "v.npy", stdin=b"")
    assert status == 1
    assert said(err) == ["stdin is empty"]
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_there_is_refused_before_any_work(
    run: Run, checkpoint: str, texts: Path, tmp_path: Path
) -> None:
    output = write(tmp_path / "v.npy", "before")
    status, _, err = run("embed", "no/such/model", texts, "-o", output)
    assert (status, err) == (1, f"fastbert: {output} exists: --force takes its place\n")
    status, _, err = run("embed", "no/such/model", texts, "-o", output, "--resume")
    assert (status, err) == (0, f"fastbert: {output} is there, whole: nothing to resume (--force makes it anew)\n")
    status, _, err = run("embed", "no/such/model", texts, "-o", output, "--resume", "--force")
    assert status == 1
    assert "give one of them" in err
    status, _, err = run("embed", "no/such/model", texts, "-o", tmp_path / "v.pt")
    assert status == 1
    assert "its name must end with .npy or .safetensors or .parquet" in err
    assert output.read_bytes() == b"before"
    status, _, err = run("embed", checkpoint, texts, "-o", output, "--force")
    assert status == 0, err
    assert np.load(output).shape == (5, 32)


def test_a_full_disk_is_one_line_and_the_run_goes_on(run: Run, checkpoint: str, texts: Path, tmp_path: Path) -> None:
    arguments = ("embed", checkpoint, texts, "--window", 1)
    assert run(*arguments, "-o", tmp_path / "whole.npy")[0] == 0
    with full_disk(600):
        status, _, err = run(*arguments, "-o", tmp_path / "v.npy")
    assert status == 1
    (line,) = said(err)
    parts = tmp_path / "v.npy.parts"
    assert line == f"cannot write {tmp_path}/v.npy: File too large; 3 rows are in {parts}: --resume goes on with them"
    status, _, err = run(*arguments, "-o", tmp_path / "v.npy", "--pool", "cls", "--resume")
    assert status == 1
    assert "was begun with engine" in err
    status, _, err = run(*arguments, "-o", tmp_path / "v.npy", "--dtype", "fp16", "--resume")
    assert status == 1
    assert "was begun with dtype fp32, and now it is fp16" in err
    assert err.endswith("--force begins anew\n")
    status, _, err = run(*arguments, "-o", tmp_path / "v.npy", "--resume")
    assert status == 0
    assert "5 texts, 35 tokens (1 empty, 3 from before), the others in" in err
    assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert not parts.exists()


def test_another_model_is_refused(run: Run, checkpoint: str, texts: Path, tmp_path: Path) -> None:
    with full_disk(600):
        run("embed", checkpoint, texts, "-o", tmp_path / "v.npy", "--window", 1)
    torch.manual_seed(1)
    model = Embedder.from_pretrained(checkpoint)
    other = model.model.state_dict()
    other["encoder.layer.1.output.dense.weight"] += 1e-3
    model.model.save_pretrained(tmp_path / "other")
    model.tokenizer.save_pretrained(tmp_path / "other")
    status, _, err = run("embed", tmp_path / "other", texts, "-o", tmp_path / "v.npy", "--window", 1, "--resume")
    assert status == 1
    assert "was begun with model " in err
    assert (tmp_path / "v.npy.parts" / "data").exists()


SLOWLY = """
import time
from fastbert import cli
from fastbert.inference.embedder import Embedder

results = Embedder.results

def slow(self, tokens, progress=None):
    time.sleep(0.05)
    return results(self, tokens, progress)

Embedder.results = slow
cli.main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_run_that_is_stopped_and_killed_goes_on_to_the_same_bytes(
    run: Run, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write(tmp_path / "texts.txt", b"".join(b"the cat %s\n" % (b"sat " * (i % 9)) for i in range(150)))
    arguments = ["embed", checkpoint, str(texts), "--window", "4", "-o"]
    assert run(*arguments, tmp_path / "whole.parquet")[0] == 0
    output, log = tmp_path / "v.parquet", tmp_path / "v.parquet.parts" / "windows.jsonl"

    results, calls = Embedder.results, iter(range(100))

    def stopped(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return results(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Embedder, "results", stopped)
        status, out, err = run(*arguments, output)
    assert (status, out) == (130, "")
    assert said(err) == [f"stopped; 12 rows are in {log.parent}: --resume goes on with them"]

    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments, str(output), "--resume"])
    while log.read_bytes().count(b"\n") < 10:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    killed = log.read_bytes().count(b"\n")
    assert 10 <= killed < 30
    assert not output.exists()

    status, _, err = run(*arguments, output, "--resume")
    assert status == 0
    assert f"{killed * 4} from before" in err
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["texts.txt", "v.parquet", "whole.parquet"]


class TestSimilar:
    def found(self, out: str) -> list[list[tuple[object, str | None]]]:
        return [[(hit["id"], hit["text"]) for hit in json.loads(line)["hits"]] for line in out.splitlines()]

    def expected(self, checkpoint: str, queries: list[str], k: int) -> list[list[int]]:
        embedder = Embedder.from_pretrained(checkpoint)
        q, v = (torch.nn.functional.normalize(torch.from_numpy(embedder.encode(x)), dim=-1) for x in (queries, TEXTS))
        return (q @ v.T).topk(k).indices.tolist()

    def test_the_nearest_come_first(self, run: Run, checkpoint: str, texts: Path, tmp_path: Path) -> None:
        queries = ["a small cat", "dogs"]
        best = self.expected(checkpoint, queries, 3)
        for name in ("v.parquet", "v.npy"):
            run("embed", checkpoint, texts, "-o", tmp_path / name, "--window", 2)
        for corpus in ("texts.txt", "v.parquet", "v.npy"):
            status, out, _ = run("similar", checkpoint, tmp_path / corpus, *queries, "-k", 3, "--json")
            assert status == 0
            known = [None if corpus == "v.npy" else text for text in TEXTS]
            assert self.found(out) == [[(i, known[i]) for i in row] for row in best]
            assert [json.loads(line)["query"] for line in out.splitlines()] == queries
        assert json.loads(out.splitlines()[1])["hits"][0]["score"] == pytest.approx(1)

    def test_a_table_is_shown(self, run: Run, checkpoint: str, texts: Path) -> None:
        status, out, err = run("similar", checkpoint, texts, "[dogs]", "-k", 2)
        assert (status, err.split(" in ")[0]) == (0, "fastbert: 5 rows compared")
        lines = [line.strip() for line in out.splitlines() if line.strip()]
        assert lines[0] == "[dogs]"
        assert lines[1].split() == ["cosine", "id", "text"]
        assert len(lines) == 5

    def test_a_long_text_takes_no_place_of_score_and_id(self, run: Run, checkpoint: str, tmp_path: Path) -> None:
        (tmp_path / "long.txt").write_text("the cat sat on the mat and the dog ran to the bird " * 9 + "\n")
        _, out, _ = run("similar", checkpoint, tmp_path / "long.txt", "the cat")
        lines = [line.split() for line in out.splitlines() if line.strip()]
        assert lines[1] == ["cosine", "id", "text"]
        assert re.fullmatch(r"\d\.\d{3}", lines[3][0])
        assert lines[3][1:3] == ["0", "the"]

    def test_mistakes_are_one_line(self, run: Run, checkpoint: str, tmp_path: Path) -> None:
        np.save(tmp_path / "small.npy", np.zeros((3, 8), np.float32))
        np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
        write(tmp_path / "none.npy", "nothing")
        for name, message in {
            "small.npy": "has vectors of 8 elements, but those of",
            "flat.npy": "has float32 of shape (3,), but rows of vectors are wanted",
            "none.npy": "cannot read",
            "gone.npy": "gone.npy",
            "gone.txt": "there is no such file",
        }.items():
            status, out, err = run("similar", checkpoint, tmp_path / name, "a cat")
            assert (status, out) == (1, "")
            assert is_one_line(err), err
            assert message in err

    def test_vectors_of_another_model_are_warned_of(
        self, run: Run, checkpoint: str, texts: Path, tmp_path: Path
    ) -> None:
        run("embed", checkpoint, texts, "-o", tmp_path / "v.parquet")
        assert "another model" not in run("similar", checkpoint, tmp_path / "v.parquet", "a cat")[2]
        other = tiny_checkpoint(tmp_path / "other", initializer_range=0.1)
        assert "made by another model" in run("similar", other, tmp_path / "v.parquet", "a cat")[2]
