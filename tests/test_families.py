"""Every class of every family against transformers' own: values, gradients, outputs. BERT's are in test_model.py."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from tests.families import (
    BASES,
    IN_FULL,
    LEFT_TO_RIGHT,
    MASKED_LM,
    SAME,
    SMOKE,
    WITH_LABELS,
    both,
    module_of,
    reads_first,
    without_cache,
)
from tests.models import (
    BATCH,
    LENGTH,
    assert_gradients_close,
    assert_outputs_equal,
    batch,
    head_of,
    mask_named,
)

MASKS = ("none", "right", "left", "holes", "empty row")


@pytest.mark.parametrize(
    ("name", "mask"),
    [*((name, mask) for name in IN_FULL for mask in MASKS), *((name, "right") for name in SMOKE)],
)
def test_values(name: str, mask: str) -> None:
    stock, fast = both(name)
    inputs = batch(name, mask_named(mask)) | without_cache(name)
    with torch.no_grad():
        expected, actual = (m(**inputs, output_hidden_states=True) for m in (stock, fast))
    assert_outputs_equal(actual, expected, inputs.get("attention_mask"))
    report = fastbert.report(fast)
    fell_back = mask == "left" and reads_first(stock)
    assert (report.packed_calls, report.fallbacks.total()) == (1 - fell_back, fell_back)


def _inputs(name: str, mask: str) -> dict[str, Any]:
    """With labels of question answering too, where there is no padding."""
    inputs = batch(name, mask_named(mask))
    if head_of(name) == "ForQuestionAnswering" and mask == "none":
        inputs |= {"start_positions": torch.zeros(BATCH).long(), "end_positions": torch.tensor([1, 99, 16, 3, 0])}
    return inputs


def _loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A head's own; of a base model, of all that it computes of valid tokens."""
    output = model(**inputs)
    if "loss" in output:
        return output.loss
    hidden, mask = output.last_hidden_state, inputs.get("attention_mask")
    weights = 1.1 + torch.cos(torch.arange(hidden.numel())).view_as(hidden)
    loss = (hidden.square() * weights * (1 if mask is None else mask[..., None])).sum()
    return loss if output.get("pooler_output") is None else loss + output.pooler_output.square().sum()


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name in (*IN_FULL, *SMOKE)
        for mask in ("none", "holes")
        if (mask == "none" or head_of(name) != "ForQuestionAnswering") and (mask == "holes" or name not in SMOKE)
    ],
)
def test_losses_and_gradients(name: str, mask: str) -> None:
    stock, fast = both(name, strict=True)
    inputs = _inputs(name, mask)
    expected, actual = (_loss(model.train(), inputs) for model in (stock, fast))
    assert abs(actual - expected) <= 1e-5 * max(1, abs(expected))
    for loss in (expected, actual):
        loss.backward()
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("family", SAME)
def test_what_is_only_smoke_tested_is_the_same(family: str) -> None:
    assert module_of(family).ROLES is module_of("roberta").ROLES


def _assert_as_near(actual: Tensor, stock: Tensor, exact: Tensor) -> None:
    """To float64 or float32, in bf16, as transformers' is: in the mean, for one number may be near by chance."""
    assert actual.shape == stock.shape
    ours, theirs, size = (
        float(t.detach().double().square().mean().sqrt()) for t in (actual - exact, stock - exact, exact)
    )
    assert ours <= 2 * theirs + 2**-7 * size, f"{ours:.2e}, transformers {theirs:.2e}, of {size:.2e}"


def _gradients(model: nn.Module) -> Tensor:
    """All of them in a row."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", IN_FULL)
def test_low_precision(name: str) -> None:
    """bf16: values and gradients, as near to float64 as transformers' are."""
    stock, fast = both(name, strict=True)
    inputs = _inputs(name, "none" if head_of(name) == "ForQuestionAnswering" else "right")
    exact, *low = copy.deepcopy(stock).double(), copy.deepcopy(stock).bfloat16(), copy.deepcopy(fast).bfloat16()
    outputs = [model.train()(**inputs) for model in (exact, *low)]
    valid = inputs.get("attention_mask")
    valid = None if valid is None else valid.flatten(0, -2).bool()
    for key in outputs[0]:
        of_all = [output[key].detach() for output in (outputs[2], outputs[1], outputs[0])]
        if of_all[0].ndim:  # one number, a loss, may be near by chance
            _assert_as_near(*(t[valid] if valid is not None and t.shape[:2] == valid.shape else t for t in of_all))
    for model in (exact, *low):
        _loss(model, inputs).backward()
    _assert_as_near(*(_gradients(model) for model in (low[1], low[0], exact)))


@pytest.mark.parametrize("name", IN_FULL)
def test_autocast(name: str) -> None:
    stock, fast = both(name, strict=True)
    inputs = batch(name, mask_named("right")) | without_cache(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (m(**inputs, output_hidden_states=True) for m in (stock, fast))
    exact = stock(**inputs, output_hidden_states=True)
    valid = inputs["attention_mask"].flatten(0, -2).bool()
    for key in expected:
        sides = [out[key] if isinstance(out[key], tuple) else (out[key],) for out in (actual, expected, exact)]
        for of_all in zip(*sides, strict=True):
            _assert_as_near(*((t[valid] if t.shape[:2] == valid.shape else t) for t in of_all))
            assert of_all[0].dtype == of_all[1].dtype, key


@pytest.mark.parametrize("name", IN_FULL)
def test_all_rows_where_padding_is_computed(name: str) -> None:
    stock, fast = both(name, strict=True, padded_rows="computed")
    inputs = batch(name, mask_named("holes")) | without_cache(name)
    with torch.no_grad():
        expected, actual = (m(**inputs, output_hidden_states=True) for m in (stock, fast))
    assert_outputs_equal(actual, expected, None)


@pytest.mark.parametrize("name", WITH_LABELS)
def test_losses_honour_num_items_in_batch(name: str) -> None:
    """Shares of unequal batches add up to the mean over all of their labels."""
    _, fast = both(name, strict=True)
    batches = [batch(name, mask_named("none")), batch(name, mask_named("right"))]
    counts = [(b["labels"] != -100).sum() for b in batches]
    fast.train()
    means = [fast(**b).loss for b in batches]
    shares = [fast(**b, num_items_in_batch=sum(counts)).loss for b in batches]
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(sum(shares), expected)


class TestHiddenStates:
    @pytest.mark.parametrize("name", BASES)
    def test_selected(self, name: str) -> None:
        stock, fast = both(name, strict=True)
        inputs = batch(name, mask_named("right"))
        expected = stock(**inputs, output_hidden_states=True).hidden_states
        actual = fast(**inputs, output_hidden_states=[0, -1]).hidden_states
        assert [state is None for state in actual] == [0 < i < len(expected) - 1 for i in range(len(expected))]
        for a, e in ((actual[0], expected[0]), (actual[-1], expected[-1])):
            assert (a - e)[inputs["attention_mask"].bool()].abs().max() <= 1e-5

    @pytest.mark.parametrize("name", BASES)
    def test_have_gradients(self, name: str) -> None:
        stock, fast = both(name, strict=True)
        inputs, gradients = batch(name, mask_named("right")), []
        for model in (stock, fast):
            output = model(**inputs, output_hidden_states=True)
            for hidden in output.hidden_states:
                hidden.retain_grad()
            output.last_hidden_state[:, 0].square().sum().backward()
            gradients.append([hidden.grad for hidden in output.hidden_states])
        for e, a in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


class TestOutputs:
    @pytest.mark.parametrize("name", IN_FULL)
    def test_tuple(self, name: str) -> None:
        stock, fast = both(name, strict=True)
        inputs = batch(name, mask_named("right")) | without_cache(name)
        expected, actual = (m(**inputs, return_dict=False) for m in (stock, fast))
        assert isinstance(actual, tuple)
        assert [t.shape for t in actual] == [t.shape for t in expected]

    @pytest.mark.parametrize("name", BASES)
    def test_attentions_fall_back_and_the_next_call_does_not(self, name: str) -> None:
        stock, fast = (copy.deepcopy(model) for model in both(name))
        for model in (stock, fast):
            model.set_attn_implementation("eager")
        inputs = batch(name, mask_named("right"))
        expected, actual = (m(**inputs, output_attentions=True, output_hidden_states=True) for m in (stock, fast))
        assert len(actual.attentions) == len(expected.attentions) > 0
        torch.testing.assert_close(actual.attentions, expected.attentions)
        torch.testing.assert_close(actual.hidden_states, expected.hidden_states)
        fast(**inputs)
        report = fastbert.report(fast)
        assert (report.packed_calls, report.fallbacks) == (1, {"output_attentions": 1})

    @pytest.mark.parametrize("name", BASES)
    def test_4d_mask_falls_back(self, name: str) -> None:
        stock, fast = both(name)
        inputs = batch(name, None) | {"attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH).tril().bool()}
        torch.testing.assert_close(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
        assert fastbert.report(fast).packed_calls == 0


@pytest.mark.parametrize("name", LEFT_TO_RIGHT)
def test_generation(name: str) -> None:
    """With a cache: transformers' own, and what comes out is the same."""
    stock, fast = both(name)
    ids = torch.randint(3, 99, (2, 4))
    expected, actual = (m.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0) for m in (stock, fast))
    assert torch.equal(actual, expected)
    assert set(fastbert.report(fast).fallbacks) <= {"a decoder that returns a cache", "cross-attention or a cache"}


@pytest.mark.parametrize("name", MASKED_LM)
def test_labels_on_padding_fall_back(name: str) -> None:
    stock, fast = both(name)
    inputs = batch(name, mask_named("right")) | {"labels": torch.randint(0, 99, (BATCH, LENGTH))}
    assert abs(fast(**inputs).loss - stock(**inputs).loss) <= 1e-6
    assert fastbert.report(fast).fallbacks == {"labels on padding": 1}
