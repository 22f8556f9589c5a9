"""Layers with products of int8, operator by operator: what a GPU runs, here on the operators' CPU sides too.

Dimension key:  T packed tokens   N features
"""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert import prepared
from fastbert.kernels import _launch
from fastbert.prepared_int8 import PreparedInt8
from tests.families import BASES
from tests.models import batch, config_of, mask_named
from tests.prepared import NORM_FIRST, at_once, both, copy_of

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "INTERPRETED", True)


class _Int8Linear(nn.Module):
    """What a product of int8 is, from its definition."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        (q, scale), (of_weight, of_channel) = _rounded(x), _rounded(self.weight)
        y = (q @ of_weight.T) * scale * of_channel.T
        return y if self.bias is None else y + self.bias


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round(), scale


def _layers(model: Any) -> nn.Module:
    (layers,) = [module for name, module in model.named_modules() if name.split(".")[-1] in ("encoder", "transformer")]
    return layers


def _by_definition(stock: Any) -> Any:
    exact = copy.deepcopy(stock).double()
    for module in list(_layers(exact).modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name != "embedding_hidden_mapping_in":
                setattr(module, name, _Int8Linear(child))
    return exact


def _hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0][inputs["attention_mask"].bool()].cpu().double()


def _inputs(name: str, device: str) -> dict[str, Tensor]:
    return {key: t.to(device) for key, t in batch(name, mask_named("right")).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in BASES if name not in NORM_FIRST])
def test_a_model_is_its_definition(name: str, dtype: torch.dtype, device: str) -> None:
    """Some elements are a step of int8 off where sums differ in their last bits; and there is the dtype's rounding."""
    stock, _ = both(name)
    stock = stock.to(device, dtype)
    inputs = _inputs(name, device)
    fast = fastbert.patch(copy.deepcopy(stock), inference_dtype="int8")
    actual, expected, rounded = (_hidden(of, inputs) for of in (fast, _by_definition(stock), stock))
    exact = _hidden(copy.deepcopy(stock).double(), inputs)
    assert isinstance(copy_of(fast).layers, PreparedInt8)
    error, cost, rounding = ((a - b).abs().mean() for a, b in ((actual, expected), (expected, exact), (rounded, exact)))
    assert 0 < error < 0.3 * cost + 2 * rounding
    assert cost < 0.05


def test_the_first_token_alone(device: str) -> None:
    """The last layer runs for these alone; an empty sequence has zeros."""
    _, fast = both(inference_dtype="int8")
    fast.to(device)
    ids = torch.arange(5, 45, device=device)[None]
    bounds = torch.tensor([0, 7, 7, 17, 40], dtype=torch.int32, device=device)
    packing = fastbert.packing.Packing.from_cu_seqlens(bounds, 23, 40)
    with torch.inference_mode():
        every = fast.encode_packed(ids, None, packing)
        first = fast.encode_packed(ids, None, packing, first_only=True)
    assert not first[1].any()
    torch.testing.assert_close(first[[0, 2, 3]], every[[0, 7, 17]], atol=0.02, rtol=0.02)


def test_weights_that_change_are_seen(device: str) -> None:
    stock, fast = both(inference_dtype="int8")
    stock, fast = stock.to(device), fast.to(device)
    inputs = _inputs("BertModel", device)
    before = _hidden(fast, inputs)
    for model in (stock, fast):
        with torch.no_grad():
            model.encoder.layer[0].output.dense.weight.mul_(-1.5)
    for _ in range(3):  # the first call finds it, the next makes another copy
        after = _hidden(fast, inputs)
        assert (after - _hidden(stock, inputs)).abs().mean() < 0.1 * (after - before).abs().mean()


def test_training_is_as_it_was(device: str) -> None:
    name = "BertForSequenceClassification"
    stock = getattr(transformers, name)(config_of(name)).eval().to(device)
    inputs = _inputs(name, device)
    gradients = []
    for options in ({}, {"inference_dtype": "int8"}):
        model = fastbert.patch(copy.deepcopy(stock), **options)
        model(**inputs).loss.backward()
        gradients.append(model.bert.encoder.layer[0].output.dense.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("name", NORM_FIRST)
def test_layers_that_it_is_not_for(name: str, device: str) -> None:
    stock, fast = both(name, inference_dtype="int8")
    inputs = _inputs(name, device)
    torch.testing.assert_close(
        _hidden(fast.to(device), inputs), _hidden(stock.to(device), inputs), atol=1e-4, rtol=1e-4
    )
    assert "int8 on a GPU is for layers that normalise last" in str(fastbert.report(fast))


def test_it_says_so(device: str) -> None:
    _, fast = both(inference_dtype="int8")
    assert "products, int8" in str(fastbert.report(fast.to(device)))
    with pytest.raises(ValueError, match=r"inference_dtype='bf16': .* products are in the weights' dtype"):
        both(inference_dtype="bf16")
    assert device != "cpu" or at_once(fast) is not None


def test_a_warm_up_leaves_no_weights_behind(device: str) -> None:
    """What operators write in it is not written."""
    _, fast = both(inference_dtype="int8")
    fast.to(device)
    with _launch.only_compiling(), torch.inference_mode():
        fast(**_inputs("BertModel", device))
    assert copy_of(fast) is None
    fastbert.warm_up(fast)
    _, again = both(inference_dtype="int8")
    again.load_state_dict(fast.state_dict())
    inputs = _inputs("BertModel", device)
    assert torch.equal(_hidden(fast, inputs), _hidden(again.to(device), inputs))
