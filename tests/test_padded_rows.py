"""padded_rows="computed": transformers' values in every row, padding too; and question answering's padding value."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbert
from tests.models import HEADS, MASKS, assert_gradients_close, batch, mask_named, no_dropout, pair, tiny_config


def _pair(name: str, **changes: Any) -> tuple[Any, Any]:
    config = tiny_config(**({"num_labels": 2} if name == "BertForQuestionAnswering" else {}), **changes)
    stock, fast = pair(name, config)
    return stock, fastbert.patch(fast, padded_rows="computed")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", HEADS)
def test_all_rows_equal_transformers(name: str, mask: str, attention: str) -> None:
    stock, fast = _pair(name)
    for model in (stock, fast):
        model.set_attn_implementation(attention)
    inputs = batch(name, mask_named(mask))
    expected, actual = (no_dropout(m)(**inputs, output_hidden_states=True) for m in (stock, fast))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert fastbert.report(fast).packed_calls == 1


@pytest.mark.parametrize("name", [h for h in HEADS if h not in ("BertModel", "BertForQuestionAnswering")])
def test_gradients(name: str) -> None:
    stock, fast = _pair(name)
    inputs = batch(name, mask_named("holes"))
    for model in (stock, fast):
        output = no_dropout(model)(**inputs)
        (output.loss + output[1].square().mean()).backward()
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_on_padding_need_no_falling_back(name: str) -> None:
    stock, fast = _pair(name)
    inputs = batch(name, mask_named("right"))
    inputs["labels"] = torch.randint(0, 3, inputs["labels"].shape)
    for model in (stock, fast):
        no_dropout(model)(**inputs).loss.backward()
    assert_gradients_close(fast, stock)
    assert fastbert.report(fast).fallbacks.total() == 0


def test_a_decoder() -> None:
    stock, fast = pair("BertLMHeadModel", tiny_config(is_decoder=True))
    fastbert.patch(fast, padded_rows="computed")
    inputs = batch("BertForMaskedLM", mask_named("right"))
    expected, actual = (no_dropout(m)(**inputs) for m in (stock, fast))
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual.loss, expected.loss)


@pytest.mark.parametrize("padded_rows", [None, "computed"])
def test_colberts_query_expansion(padded_rows: str | None) -> None:
    """[MASK] tokens whose attention_mask is 0, and whose vectors are used: MaxSim equals transformers'."""
    stock, fast = _pair("BertModel", initializer_range=0.2)
    fastbert.patch(fast, padded_rows=padded_rows)
    query = torch.tensor([[2, 7, 8, 3] + [4] * 8])
    attended = torch.tensor([[1] * 4 + [0] * 8])
    documents = torch.randint(5, 50, (3, 9))

    def scores(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            q = F.normalize(model(input_ids=query, attention_mask=attended).last_hidden_state, dim=-1)
            d = F.normalize(model(input_ids=documents).last_hidden_state, dim=-1)
        return (q @ d.transpose(1, 2)).amax(-1).sum(-1)

    torch.testing.assert_close(scores(fast), scores(stock), atol=1e-4, rtol=1e-4)
    fastbert.patch(fast, padded_rows="zeros")
    assert not torch.allclose(scores(fast), scores(stock), atol=1e-2)


def test_dropout_replays_and_drops() -> None:
    _, fast = _pair("BertModel", hidden_dropout_prob=0.5)
    inputs = batch("BertModel", mask_named("right"))
    passes = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        passes.append(fast.train()(**inputs).last_hidden_state)
    assert torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], passes[2])


def test_an_option_that_is_none() -> None:
    with pytest.raises(ValueError, match="padded_rows must be 'zeros' or 'computed', but is 'zero'"):
        fastbert.patch(pair("BertModel")[1], padded_rows="zero")


LOSSES = {
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "a teacher, squared": lambda z, y: F.mse_loss(z, torch.zeros_like(z)),
    "a teacher, KL": lambda z, y: F.kl_div(z.log_softmax(-1), torch.zeros_like(z).softmax(-1), reduction="batchmean"),
    "margin": lambda z, y: F.multi_margin_loss(z, y, p=2),
    "focal": lambda z, y: ((1 - z.softmax(-1)) ** 2 * -z.log_softmax(-1)).gather(1, y[:, None]).mean(),
    "temperature": lambda z, y: F.cross_entropy(z / 0.05, y),
    "z-loss": lambda z, y: z.logsumexp(-1).square().mean(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_of_ones_own_on_answers_are_finite(loss: str, dtype: torch.dtype) -> None:
    """And so are their gradients: padding has -1000."""
    _, fast = pair("BertForQuestionAnswering")
    inputs = batch("BertForQuestionAnswering", mask_named("right"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        output = no_dropout(fast)(**inputs)
        value = LOSSES[loss](output.start_logits.float(), torch.zeros(5, dtype=torch.int64))
    value.backward()
    assert torch.isfinite(value)
    assert all(torch.isfinite(p.grad).all() for p in fast.parameters() if p.grad is not None)
    assert (output.start_logits[inputs["attention_mask"] == 0] == -1000).all()
    shares = output.start_logits.float().softmax(-1)
    assert (shares[inputs["attention_mask"] == 0] == 0).all()


def test_options_stay_with_copies() -> None:
    stock, fast = _pair("BertModel")
    inputs = batch("BertModel", mask_named("right"))
    for model in (copy.deepcopy(fast), fastbert.unpatch(copy.deepcopy(fast))):
        torch.testing.assert_close(model(**inputs)[0], stock(**inputs)[0], atol=1e-5, rtol=1e-5)
