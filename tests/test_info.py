"""`fastbert info`: what it says of machines that this one is not, and the same as JSON."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastbert
from fastbert import _library, cli
from fastbert.commands import info
from fastbert.kernels import _launch


def shown() -> str:
    done = CliRunner().invoke(cli.app, ["info"], catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0
    return done.output


def as_json() -> dict[str, Any]:
    done = CliRunner().invoke(cli.app, ["info", "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(done.output)


def test_both_name_versions_and_every_operator() -> None:
    text, known = shown(), as_json()
    assert known["versions"]["fastbert"] == fastbert.__version__
    assert known["versions"]["torch"] == torch.__version__
    assert known["operators"].keys() == _library.backends("cpu").keys()
    for word in (fastbert.__version__, torch.__version__, known["cpu"]["name"], *known["operators"]):
        assert word in text
    assert known["cpu"]["memory_bytes"] > 2**28
    assert known["cpu"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("capability", "said"),
    [((9, 0), "fast there: fp16, bf16, tf32"), ((7, 5), "a GPU of compute capability 7.5: the kernels need 8.0")],
)
def test_a_gpu(capability: tuple[int, int], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    major, minor = capability
    made = SimpleNamespace(name="Made Up 100", major=major, minor=minor, multi_processor_count=9)
    made.total_memory = 5 * 2**30
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: made)
    monkeypatch.setattr(_launch, "_cuda_chip", lambda index: _launch.Chip(capability, 9))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    (tmp_path / "version").write_text("570.1\n")
    monkeypatch.setattr(info, "_DRIVER", tmp_path / "version")
    text = shown()
    assert f"Made Up 100, compute capability {major}.{minor}, 5.0 GiB" in text
    assert said in text
    assert "12.9, as PyTorch was built; driver 570.1" in text
    (gpu,) = as_json()["gpus"]
    assert (gpu["capability"], gpu["why_not"] is None) == ([major, minor], capability >= (8, 0))


@pytest.mark.parametrize(
    ("has", "said"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, "fp32, bf16 (by amx_bf16, avx512_bf16); slow: fp16"),
        ({"bf16": True, "fp16_arith": True}, "fp32, bf16, fp16 (by bf16, fp16_arith)"),
        ({"avx2": True}, "fp32; slow: bf16, fp16"),
        ({}, "fp32"),  # PyTorch does not say
    ],
)
def test_which_dtypes_are_fast_on_a_cpu(has: dict[str, bool], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert [line.strip() for line in shown().splitlines() if "fast there" in line] == [f"fast there: {said}"]


def test_the_environment_in_force_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FASTBERT_DEBUG", "1"), ("OMP_NUM_THREADS", "3"), ("HF_TOKEN", "hf_abc"), ("OTHER", "x")):
        monkeypatch.setenv(name, value)
    found = as_json()["environment"]
    assert found["FASTBERT_DEBUG"] == "1"
    assert found["HF_TOKEN"] == "(set)"
    assert "OTHER" not in found
    text = shown()
    assert "OMP_NUM_THREADS=3" in text
    assert "hf_abc" not in text


def test_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "weights").write_bytes(bytes(3 * 2**20))
    monkeypatch.setattr(info, "_caches", lambda: {"Made up": tmp_path, "Other": tmp_path / "none"})
    text = shown()
    assert f"{tmp_path}, 3.0 MiB" in text
    assert f"{tmp_path / 'none'}, not there yet" in text
    monkeypatch.setattr(info, "_SECONDS", -1.0)  # too many files to add up
    assert as_json()["caches"]["Made up"]["bytes"] is None
    assert f"{tmp_path}, large" in shown()


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastbert._C" else find(name))
    assert "not built: `fastbert pretrain`, fastbert.data.masking and int8 do not work" in shown()
    assert as_json()["extension"] is False
