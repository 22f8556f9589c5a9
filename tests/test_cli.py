"""The command line as users meet it: what it prints, what it writes, and one line for a mistake."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

import fastbert
from fastbert import verify
from fastbert.inference.embedder import Embedder
from tests.checkpoints import TEXTS, minilm, tiny_checkpoint
from tests.command import Run, is_one_line

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mlm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("mlm"), "BertForMaskedLM")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def test_python_m_works_in_a_process_of_its_own(checkpoint: str, texts: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fastbert", "embed", checkpoint, str(texts), "-o", str(tmp_path / "v.npy")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert np.load(tmp_path / "v.npy").shape == (5, 32)
    command[4] = str(tmp_path / "nothing" / "here" / "at" / "all")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert is_one_line(done.stderr)


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"fastbert {fastbert.__version__}\n", "")


def test_report_names_what_is_fused_and_the_way_of_each_product(run: Run, mlm_checkpoint: str) -> None:
    status, out, err = run("report", mlm_checkpoint)
    assert (status, err) == (0, "")
    assert "packed attention" in out
    assert "32 -> 64 + GELU: PyTorch's own, as always on a CPU" in out
    assert "attention_fwd" not in out  # `info` says that


def test_warm_up_on_a_cpu_says_that_there_is_nothing_to_do(run: Run, mlm_checkpoint: str) -> None:
    status, out, err = run("warm-up", mlm_checkpoint, "--training", "--dtype", "bf16")
    assert (status, err) == (0, "")
    assert out == f"{mlm_checkpoint}: nothing to compile: Triton kernels run on a GPU only\n"


@pytest.mark.parametrize(
    ("options", "training", "weights", "autocast"),
    [
        ([], False, torch.float32, None),
        (["--dtype", "fp16"], False, torch.float16, None),
        (["--training"], True, torch.float32, None),
        (["--training", "--dtype", "bf16"], True, torch.float32, torch.bfloat16),
    ],
)
def test_warm_up(
    run: Run,
    mlm_checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    training: bool,
    weights: torch.dtype,
    autocast: torch.dtype | None,
) -> None:
    asked: list[object] = []

    def warm_up(model: torch.nn.Module, **how: object) -> fastbert.WarmUp:
        mixed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        asked.extend([type(model), next(model.parameters()).dtype, mixed, how])
        return fastbert.WarmUp(23, 3.06, 16)

    monkeypatch.setattr(fastbert, "warm_up", warm_up, raising=False)
    status, out, err = run("warm-up", mlm_checkpoint, "--max-length", 40, "--threads", 3, *options)
    assert (status, err) == (0, "")
    assert out == f"{mlm_checkpoint}: 23 kernels compiled or loaded in 3.1 s, on 16 threads\n"
    how = {"training": training, "max_length": 40, "threads": 3}
    assert asked == [fastbert.BertForMaskedLM, weights, autocast, how]


def test_warm_up_of_longer_texts_than_the_model_takes(run: Run, checkpoint: str) -> None:
    status, out, err = run("warm-up", checkpoint, "--max-length", 49)
    assert (status, out) == (1, "")
    assert is_one_line(err)
    assert "max_length must be in [1, 48] for this model, but is 49" in err


def test_help_lists_the_commands(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in ("info", "report", "embed", "fill-mask", "verify", "warm-up", "demo"))


def test_an_unknown_script_is_warned_of(run: Run, checkpoint: str, tmp_path: Path) -> None:
    status, _, err = run("embed", checkpoint, "-o", tmp_path / "v.npy", stdin="Привет мир, как дела\n".encode())
    assert status == 0
    assert "tokens are unknown to the tokenizer" in err


def no_directory(checkpoint: str, folder: Path) -> str:
    return str(folder / "no" / "such" / "model")


def no_checkpoint(checkpoint: str, folder: Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def a_file(checkpoint: str, folder: Path) -> str:
    return f"{checkpoint}/config.json"


def cut_off(checkpoint: str, folder: Path) -> str:
    shutil.copytree(checkpoint, folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    return str(folder / "cut")


def without_weights(checkpoint: str, folder: Path) -> str:
    shutil.copytree(checkpoint, folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder / "bare")


def without_tokenizer(checkpoint: str, folder: Path) -> str:
    shutil.copytree(checkpoint, folder / "bare", ignore=shutil.ignore_patterns("tok*", "vocab*"))
    return str(folder / "bare")


def broken_config(checkpoint: str, folder: Path) -> str:
    shutil.copytree(checkpoint, folder / "broken")
    (folder / "broken" / "config.json").write_text("{")
    return str(folder / "broken")


def of_other_sizes(checkpoint: str, folder: Path) -> str:
    shutil.copytree(checkpoint, folder / "other")
    config = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    return str(folder / "other")


def unknown_type(checkpoint: str, folder: Path) -> str:
    (folder / "typed").mkdir()
    (folder / "typed" / "config.json").write_text('{"model_type": "nobodys"}')
    return str(folder / "typed")


def of_another_family(checkpoint: str, folder: Path) -> str:
    (folder / "typed").mkdir()
    (folder / "typed" / "config.json").write_text('{"model_type": "gpt2"}')
    return str(folder / "typed")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_directory, "no such directory"),
        (no_checkpoint, "empty is no checkpoint: it has no config.json"),
        (a_file, "config.json is a file"),
        (cut_off, "cut/model.safetensors is damaged or cut off"),
        (without_weights, "no file named model.safetensors"),
        (without_tokenizer, "bare has no tokenizer"),
        (broken_config, "broken"),
        (of_other_sizes, "other"),
        (unknown_type, "nobodys"),
        (of_another_family, "is of type 'gpt2', but fastbert knows"),
    ],
)
def test_a_bad_checkpoint_is_one_line(
    run: Run, checkpoint: str, texts: Path, tmp_path: Path, make: Callable[[str, Path], str], message: str
) -> None:
    model, output = make(checkpoint, tmp_path), tmp_path / "v.npy"
    status, out, err = run("embed", model, texts, "-o", output)
    assert (status, out) == (1, "")
    assert is_one_line(err), err
    assert message in err
    assert not [name for name in os.listdir(tmp_path) if ".npy" in name]
    if make is not without_tokenizer:
        assert run("verify", model)[0] == 1
        assert run("fill-mask", model, "the [MASK]")[0] == 1
        assert run("demo", "--model", model)[0] == 1


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (("nothing.txt",), b"", "nothing.txt: there is no such file"),
        ((".",), b"", "Is a directory"),
        (("-", "--max-length", "1"), b"a", "max_length must be in"),
        (("-", "--device", "tpu"), b"a", "--device must be cpu, cuda or cuda:N, but is 'tpu'"),
        (("-", "--device", "cuda:99"), b"a", "--device cuda:99: PyTorch sees"),
    ],
)
def test_a_bad_argument_is_one_line(
    run: Run, checkpoint: str, tmp_path: Path, arguments: tuple[str, ...], stdin: bytes, message: str
) -> None:
    status, out, err = run("embed", checkpoint, *arguments, "-o", tmp_path / "v.npy", stdin=stdin)
    assert (status, out) == (1, "")
    assert is_one_line(err), err
    assert message in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("output", ["no/such/v.npy", ".", "/dev/null"])
def test_an_output_that_cannot_be_written_is_one_line(
    run: Run, checkpoint: str, texts: Path, tmp_path: Path, output: str
) -> None:
    status, _, err = run("embed", checkpoint, texts, "-o", tmp_path / output)
    assert status == 1
    assert is_one_line(err), err
    assert "cannot write" in err
    assert os.listdir(tmp_path) == ["texts.txt"]


@pytest.mark.parametrize("arguments", [("--pool", "best"), ("--dtype", "int4"), ("--batch-tokens", "0")])
def test_a_wrong_option_is_a_usage_error(run: Run, checkpoint: str, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    status, _, err = run("embed", checkpoint, "-o", tmp_path / "v.npy", *arguments)
    assert status == 2
    assert arguments[0] in err
    assert run("embed", checkpoint)[0] == 2


def test_a_fault_of_ours_keeps_its_traceback(
    run: Run, checkpoint: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(Embedder, "results", fault)
    with pytest.raises(ValueError, match="a bug"):
        run("embed", checkpoint, texts, "-o", tmp_path / "v.npy")
    assert os.listdir(tmp_path) == ["texts.txt"]


@torch.no_grad()
def test_fill_mask_prints_transformers_first_token(run: Run, mlm_checkpoint: str) -> None:
    status, out, err = run("fill-mask", mlm_checkpoint, "the [MASK] sat", "--top-k", 2)
    assert (status, err) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(mlm_checkpoint)
    batch = tokenizer("the [MASK] sat", return_tensors="pt")
    probabilities = AutoModelForMaskedLM.from_pretrained(mlm_checkpoint)(**batch).logits[0, 2].softmax(-1)
    first, second = probabilities.topk(2).indices.tolist()
    rows = [line.split() for line in out.splitlines() if "." in line]
    assert [row[0] for row in rows] == tokenizer.convert_ids_to_tokens([first, second])
    assert rows[0][1] == f"{probabilities[first]:.4f}"


def test_fill_mask_shows_text_in_brackets_as_it_is(run: Run, mlm_checkpoint: str) -> None:
    status, out, _ = run("fill-mask", mlm_checkpoint, "[bold] [MASK] sat [MASK]", "--top-k", 1)
    assert status == 0
    assert "mask 1 of 2" in out
    assert out.count("[bold]") == 2
    assert "sat [MASK]" in out


def test_fill_mask_without_a_mask_is_one_line(run: Run, mlm_checkpoint: str) -> None:
    status, _, err = run("fill-mask", mlm_checkpoint, "the cat")
    assert status == 1
    assert is_one_line(err)
    assert "no [MASK] in the text" in err


def test_fill_mask_without_a_head_is_one_line(run: Run, checkpoint: str) -> None:
    status, _, err = run("fill-mask", checkpoint, "the [MASK]")
    assert status == 1
    assert is_one_line(err)
    assert "weights of BertForMaskedLM" in err


def test_a_cased_vocabulary_without_settings_is_warned_of(run: Run, mlm_checkpoint: str, tmp_path: Path) -> None:
    shutil.copytree(mlm_checkpoint, tmp_path / "old", ignore=shutil.ignore_patterns("tok*"))
    vocabulary = tmp_path / "old" / "vocab.txt"
    assert "lower-cases" not in run("fill-mask", tmp_path / "old", "the [MASK]")[2]
    vocabulary.write_text(vocabulary.read_text().replace("dog", "Dog"))
    status, _, err = run("fill-mask", tmp_path / "old", "the [MASK]")
    assert status == 0
    assert "transformers lower-cases the text" in err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_verify_ends_with_zero_where_all_is_well(run: Run, mlm_checkpoint: str, texts: Path, dtype: str) -> None:
    status, out, err = run("verify", mlm_checkpoint, "--text", texts, "--dtype", dtype)
    assert (status, err) == (0, ""), out
    assert "BertForMaskedLM" in out
    assert "verified" in out
    for row in ("hidden state 0", "hidden state 2", "logits", "grad. layer 1", "all-padding row", "left padding"):
        assert row in out


def test_verify_says_which_calls_fell_back(run: Run, checkpoint: str) -> None:
    status, out, _ = run("verify", checkpoint)
    assert status == 0
    assert "2 fell back" in out


def test_verify_of_a_real_encoder(run: Run) -> None:
    status, out, err = run("verify", minilm())
    assert status == 0, out + err


def test_verify_ends_with_one_where_a_weight_is_off(run: Run, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def off(model: torch.nn.Module) -> torch.nn.Module:
        fast = fastbert.patch(model)
        with torch.no_grad():
            fast.get_parameter("encoder.layer.1.output.dense.weight").mul_(1.01)
        return fast

    monkeypatch.setattr(verify, "patch", off)
    status, out, _ = run("verify", checkpoint)
    assert status == 1
    assert "FAILED" in out
    assert "NO" in out


def test_verify_ends_with_one_past_a_tolerance(run: Run, checkpoint: str) -> None:
    assert run("verify", checkpoint, "--tolerance", "1e-3")[0] == 0
    assert run("verify", checkpoint, "--tolerance", "1e-12")[0] == 1
