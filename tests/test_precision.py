"""Which precision a name means, and that engines compute in it."""

import numpy as np
import pytest
import torch

import fastbert
from fastbert.errors import InputError
from fastbert.inference.precision import NAMES, Precision, choose
from fastbert.prepared import why_no_precision
from tests.checkpoints import minilm

HAS_BF16, HAS_INT8 = (why_no_precision(name) is None for name in ("bf16", "int8"))


def test_names() -> None:
    bf16 = Precision(torch.float32, "bf16") if HAS_BF16 else Precision(torch.bfloat16)
    assert choose("bf16", "cpu") == bf16
    assert choose("auto", "cpu") == (bf16 if HAS_BF16 else Precision(torch.float32))
    assert choose("fp32", "cpu") == choose(None, "cpu") == Precision(torch.float32)
    assert choose("int8", "cuda") == Precision(torch.bfloat16, "int8")
    assert choose("fp16", "cuda") == choose(torch.float16, "cpu") == Precision(torch.float16)
    assert choose(torch.bfloat16, "cpu") == Precision(torch.bfloat16)
    if HAS_INT8:
        assert choose("int8", "cpu") == Precision(torch.float32, "int8")


def test_what_a_device_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="dtype must be one of auto, int8, fp32, bf16, fp16, but is 'int4'"):
        choose("int4", "cpu")
    monkeypatch.setattr("fastbert.inference.precision.why_no_precision", lambda name, *_: f"the CPU has no {name}")
    with pytest.raises(InputError, match="dtype int8: the CPU has no int8"):
        choose("int8", "cpu")
    assert choose("bf16", "cpu") == Precision(torch.bfloat16)
    assert choose("auto", "cpu") == Precision(torch.float32)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert choose("auto", "cuda") == Precision(torch.bfloat16 if has_bf16 else torch.float16)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_of_a_real_encoder(name: str) -> None:
    if name == "int8" and not HAS_INT8:
        pytest.skip(str(why_no_precision("int8")))
    texts = ["A fox could not reach the grapes.", "Paris", "He said nothing, and walked on. " * 20]
    exact = fastbert.Embedder.from_pretrained(minilm()).encode(texts)
    actual = fastbert.Embedder.from_pretrained(minilm(), dtype=name).encode(texts)
    least = {"fp32": 1, "fp16": 0.999, "bf16": 0.9995, "auto": 0.9995, "int8": 0.995}[name]
    assert (actual * exact).sum(-1).min() > least - 1e-6
    assert np.array_equal(actual, exact) == (name == "fp32" or (name == "auto" and not HAS_BF16))
