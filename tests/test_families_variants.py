"""Configurations and calls that reach other code of a family: activations, sizes, frozen weights, vectors, rows."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.func import functional_call, grad

import fastbert
from tests.families import BASES, IN_FULL, LEFT_TO_RIGHT, MASKED_LM, both, dropping, pack, packed_and_padded
from tests.models import (
    BATCH,
    LENGTH,
    assert_gradients_close,
    assert_outputs_equal,
    batch,
    config_of,
    head_of,
    mask_named,
    pair,
)


def _pair(name: str, **changes: Any) -> tuple[Any, Any]:
    stock, fast = pair(name, config_of(name, **{"num_hidden_layers": 1, **dropping(0.0), **changes}))
    return stock, fastbert.patch(fast, strict=True)


def _assert_trains_alike(name: str, stock: Any, fast: Any) -> None:
    inputs = batch(name, mask_named("right"))
    expected, actual = stock.train()(**inputs), fast.train()(**inputs)
    assert_outputs_equal(actual, expected, inputs["attention_mask"])
    for output in (expected, actual):
        output.loss.backward()
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("name", MASKED_LM)
def test_an_activation_that_is_no_gelu(name: str) -> None:
    stock, fast = _pair(name, hidden_act="relu", activation="relu")
    _assert_trains_alike(name, stock, fast)
    assert any("is no GELU" in why for why in fastbert.report(fast).plain)


@pytest.mark.parametrize("name", MASKED_LM)
def test_resized_embeddings(name: str) -> None:
    stock, fast = (copy.deepcopy(model) for model in both(name, strict=True))
    for model in (stock, fast):
        model.resize_token_embeddings(120, mean_resizing=False)
    fast.load_state_dict(stock.state_dict())
    assert fast.get_output_embeddings().weight is fast.get_input_embeddings().weight
    _assert_trains_alike(name, stock, fast)


def test_sinusoidal_positions() -> None:
    _assert_trains_alike("DistilBertForMaskedLM", *_pair("DistilBertForMaskedLM", sinusoidal_pos_embds=True))


@pytest.mark.parametrize(("layers", "groups", "inner"), [(1, 1, 1), (3, 2, 1), (2, 1, 3)])
def test_layers_that_repeat(layers: int, groups: int, inner: int) -> None:
    sizes = {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": inner}
    _assert_trains_alike("AlbertForPreTraining", *_pair("AlbertForPreTraining", **sizes))


@pytest.mark.parametrize("size", [24, 48])
def test_embeddings_of_another_size(size: int) -> None:
    """There is no projection where it is the hidden size."""
    for name in ("ElectraForPreTraining", "AlbertForMaskedLM"):
        _assert_trains_alike(name, *_pair(name, embedding_size=size))


def test_ernie_without_tasks() -> None:
    stock, fast = _pair("ErnieForMaskedLM", use_task_id=False)
    _assert_trains_alike("ErnieForMaskedLM", stock, fast)
    assert not hasattr(fast.ernie.embeddings, "task_type_embeddings")


@pytest.mark.parametrize("name", BASES)
class TestBaseModels:
    def test_vectors(self, name: str) -> None:
        stock, fast = both(name, strict=True)
        mask = mask_named("holes")
        vectors = torch.randn(BATCH, LENGTH, getattr(stock.config, "embedding_size", 48))
        leaves = [vectors.clone().requires_grad_() for _ in range(2)]
        for model, leaf in zip((stock, fast), leaves, strict=True):
            hidden = model(inputs_embeds=leaf, attention_mask=mask).last_hidden_state
            (hidden * mask[..., None]).square().sum().backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad, atol=1e-4, rtol=1e-4)

    def test_touched_embeddings(self, name: str) -> None:
        """transformers computes them then, from all that it takes, and the layers behind them stay packed."""
        stock, fast = (copy.deepcopy(model) for model in both(name, strict=True))
        for model in (stock, fast):
            model.get_input_embeddings().register_forward_hook(lambda module, args, output: 2 * output)
        inputs = batch(name, mask_named("right"))
        inputs["position_ids"] = torch.arange(LENGTH).flip(0)[None] + 30
        assert_outputs_equal(fast(**inputs), stock(**inputs), inputs["attention_mask"])
        packed, padded = packed_and_padded(name)
        actual, expected = fast(**packed).last_hidden_state, stock(**padded).last_hidden_state
        torch.testing.assert_close(actual, pack(expected, padded["attention_mask"]), atol=1e-5, rtol=1e-5)
        assert fastbert.report(fast).packed_calls == 2

    def test_frozen_weights(self, name: str) -> None:
        stock, fast = (copy.deepcopy(model) for model in both(name, strict=True))
        inputs = batch(name, None)
        for model in (stock, fast):
            for path, p in model.named_parameters():
                p.requires_grad_("norm" in path.lower() or "value" in path or "v_lin" in path)
            model(**inputs).last_hidden_state.square().mean().backward()
        assert_gradients_close(fast, stock)

    def test_residual_dtype(self, name: str) -> None:
        stock, fast = both(name, residual_dtype="bf16", strict=True)
        inputs = batch(name, mask_named("right"))
        expected = stock(**inputs).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            actual = fast(**inputs).last_hidden_state
        assert actual.dtype == torch.bfloat16
        assert (actual - expected)[inputs["attention_mask"].bool()].abs().max() < 0.1

    def test_a_transform(self, name: str) -> None:
        stock, fast = both(name)
        inputs = batch(name, None)
        values = {path: p.detach() for path, p in stock.named_parameters()}
        expected, actual = (
            grad(lambda v, m=m: functional_call(m, v, (), inputs).last_hidden_state.square().mean())(values)
            for m in (stock, fast)
        )
        torch.testing.assert_close(actual, expected)
        assert fastbert.report(fast).fallbacks == {"a transform of torch.func": 1}


@pytest.mark.parametrize("name", MASKED_LM)
def test_gradients_under_autocast(name: str) -> None:
    stock, fast = both(name, strict=True)
    inputs = batch(name, mask_named("right"))
    for model in (stock, fast):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(**inputs).loss
        loss.backward()
    assert_gradients_close(fast, stock, 0.03)
    assert all(p.grad.dtype == torch.float32 for p in fast.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", LEFT_TO_RIGHT)
def test_cross_attention_falls_back(name: str) -> None:
    stock, fast = pair(name, config_of(name, num_hidden_layers=1, add_cross_attention=True))
    inputs = batch(name, None) | {"encoder_hidden_states": torch.randn(BATCH, 4, 48)}
    torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits)
    assert fastbert.report(fast).fallbacks == {"a decoder with cross-attention": 1}


HEADS = ("ForMaskedLM", "ForPreTraining", "ForSequenceClassification")  # they read some rows


@pytest.mark.parametrize("name", [name for name in IN_FULL if head_of(name) in HEADS])
def test_the_last_layer_for_some_rows_drops_the_same_elements(name: str) -> None:
    model = getattr(transformers, name)(config_of(name, num_hidden_layers=2, **dropping(0.3))).train()
    inputs, losses = batch(name, mask_named("right")), []
    for subset in (False, True):
        fastbert.patch(model, last_layer_subset=subset, strict=True)
        torch.manual_seed(5)
        output = model(**inputs)
        losses.append(output.loss)
        if head_of(name) == "ForMaskedLM":  # read later
            again = F.cross_entropy(output.logits.flatten(0, 1), inputs["labels"].flatten())
            torch.testing.assert_close(output.loss, again)
    torch.testing.assert_close(*losses)
