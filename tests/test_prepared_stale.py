"""Layers in one call of C++ are never stale, whatever somebody does to their weights, or to the embeddings.

Dimension key:  N features
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fastbert
from tests.models import batch, mask_named
from tests.prepared import NORM_FIRST, both, copy_of, hidden, needs_fp32


def _load(model: Any) -> None:
    model.load_state_dict({key: value + 0.1 for key, value in model.state_dict().items()})


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3].zero_()


def _other_parameter(model: Any) -> None:
    model.encoder.layer[0].attention.self.value.bias = nn.Parameter(torch.randn(48))


def _other_tensor(model: Any) -> None:
    model.encoder.layer[0].intermediate.dense.weight.data = torch.randn(96, 48)


def _other_module(model: Any) -> None:
    model.encoder.layer[2].intermediate.dense = nn.Linear(48, 96)


def _step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**batch("BertModel", mask_named("right")))[0][:, 0, :5].sum().backward()
    optimizer.step()


def _hook(model: Any) -> None:
    model.encoder.layer[1].output.LayerNorm.register_forward_hook(lambda module, args, output: output * 2)


def _scaling(model: Any) -> None:
    model.encoder.layer[1].attention.self.scaling = 0.05


def _eps(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.attention.output.LayerNorm.eps = layer.output.LayerNorm.eps = 0.5


def _no_bias(model: Any) -> None:
    model.encoder.layer[0].output.dense.bias = None


def _activation(model: Any) -> None:
    for layer in model.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def _data_in_place(model: Any) -> None:  # as PEFT merges, and as averages of weights are swapped in
    for weight in model.encoder.layer[1].parameters():
        weight.data.mul_(1.5)


def _twice(model: Any) -> None:
    for _ in range(2):
        model.encoder.layer[0].intermediate.dense.weight = nn.Parameter(torch.randn(96, 48))


def _data_twice(model: Any) -> None:
    for _ in range(2):
        model.encoder.layer[0].intermediate.dense.weight.data = torch.randn(96, 48)


def _table_in_place(model: Any) -> None:
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(2)


def _table_data(model: Any) -> None:
    model.embeddings.position_embeddings.weight.data = torch.randn_like(model.embeddings.position_embeddings.weight)


def _other_table(model: Any) -> None:
    model.embeddings.token_type_embeddings = nn.Embedding(2, 48)


def _embeddings_norm(model: Any) -> None:
    model.embeddings.LayerNorm.weight.data[5:].mul_(2)


def _embeddings_eps(model: Any) -> None:
    model.embeddings.LayerNorm.eps = 0.5


def _half(model: Any) -> None:
    model.bfloat16()


def _fewer_layers(model: Any) -> None:
    del model.encoder.layer[1]


CHANGES = [_load, _in_place, _other_parameter, _other_tensor, _other_module, _step, _hook, _scaling, _eps, _no_bias]
CHANGES += [_activation, _half, _fewer_layers, _data_in_place, _twice, _data_twice]
CHANGES += [_table_in_place, _table_data, _other_table, _embeddings_norm, _embeddings_eps]


@needs_fp32
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
def test_it_is_never_stale(change: Any) -> None:
    torch.manual_seed(3)
    stock, fast = both()
    before = hidden(fast)
    assert copy_of(fast).layers is not None
    for model in (stock, fast):
        torch.manual_seed(4)
        change(model)
    expected = hidden(stock)
    tolerance = 0.05 if expected.dtype == torch.bfloat16 else 1e-5
    assert (expected - before).abs().max() > 10 * tolerance or change is _half
    for _ in range(3):  # the first call after a change finds it, the next makes another copy
        torch.testing.assert_close(hidden(fast), expected, atol=tolerance, rtol=tolerance)


def norms_of(model: Any) -> list[nn.LayerNorm]:
    """Of a model that normalises first: the last one, and a layer's two."""
    if hasattr(model, "LayerNorm"):
        first, second = model.encoder.layer[1].attention.LayerNorm, model.encoder.layer[1].intermediate.LayerNorm
        return [model.LayerNorm, first, second]
    layer = model.encoder.layer[1]
    return [model.encoder.LayerNorm, layer.attention.self_attn_layer_norm, layer.LayerNorm]


@needs_fp32
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", NORM_FIRST)
def test_the_norms_of_layers_that_normalise_first_are_never_stale(name: str, which: int) -> None:
    torch.manual_seed(3)
    stock, fast = both(name)
    before = hidden(fast, name)
    for model in (stock, fast):
        torch.manual_seed(4)
        norms_of(model)[which].weight.data = torch.randn(48)
    expected = hidden(stock, name)
    assert (expected - before).abs().max() > 1e-3
    for _ in range(3):
        torch.testing.assert_close(hidden(fast, name), expected, atol=1e-5, rtol=1e-5)
    assert copy_of(fast).layers is not None
    norms_of(fast)[which].eps = norms_of(stock)[which].eps = 0.5
    for _ in range(3):
        torch.testing.assert_close(hidden(fast, name), hidden(stock, name), atol=1e-5, rtol=1e-5)
    assert (copy_of(fast).layers is None) == (which > 0)  # a layer has one epsilon


@needs_fp32
def test_weights_that_change_all_the_time_are_not_copied_each_time() -> None:
    _, fast = both()
    hidden(fast)
    for _ in range(3):
        _in_place(fast)
        hidden(fast)
        assert copy_of(fast).layers is None
    hidden(fast)
    assert copy_of(fast).layers is not None


@needs_fp32
def test_it_is_given_back() -> None:
    _, fast = both()
    hidden(fast)
    assert copy_of(copy.deepcopy(fast)) is None
    assert copy_of(pickle.loads(pickle.dumps(fast))) is None
    fast.train()(**batch("BertModel", mask_named("right")))
    assert copy_of(fast) is None
    hidden(fast.eval())
    assert copy_of(fast) is not None
    assert copy_of(fastbert.unpatch(fast)) is None
