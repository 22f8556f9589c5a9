"""The hastened interpreter computes what Triton's own does, bit for bit."""

import os

import pytest
import torch
from torch import Tensor

from fastbert.kernels import _launch, _product
from fastbert.kernels._product import Product, Tiles
from fastbert.kernels.linear import linear_fwd
from tests.models import pair, tiny_config

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="of the interpreter: needs TRITON_INTERPRET=1"
    ),
]


@pytest.fixture(autouse=True)
def hastened() -> None:
    from tests import interpreter

    assert interpreter._originals, "this release of Triton has other insides"


def test_a_training_step() -> None:
    """Attention, LayerNorm, the embedding, the GELU, cross-entropy, with dropout, forward and backward."""
    from tests.interpreter import as_triton_has_it

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    _, model = pair("BertForMaskedLM", tiny_config(vocab_size=40, **sizes))
    model.to(torch.bfloat16).train()
    ids = torch.randint(1, 40, (1, 7))
    inputs = {"input_ids": ids, "labels": ids, "cu_seq_lens_q": torch.tensor([0, 5, 7], dtype=torch.int32)}

    def step() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(**inputs).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    quick = step()
    with as_triton_has_it():
        expected = step()
    assert all(torch.equal(a, b) for a, b in zip(quick, expected, strict=True))
    assert quick[-1].any()


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["pointers", "TMA"])
def test_a_product(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.interpreter import as_triton_has_it

    chip = _launch.Chip(capability, 2)
    x, weight, bias = torch.randn(20, 24).half(), torch.randn(40, 24).half(), torch.randn(40).half()
    entry = Product(capability, torch.float16, None, 40, 24, _product.size_class(20))
    monkeypatch.setattr(_launch, "chip", lambda device: chip)
    monkeypatch.setattr(_product, "TILES", {entry: Tiles(16, 32, 16, 4, 2, PARTS=2, GROUP_M=2)})
    quick = linear_fwd(x, weight, bias)
    with as_triton_has_it():
        assert torch.equal(quick, linear_fwd(x, weight, bias))
