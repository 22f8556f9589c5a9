"""Every family's heads with labels: logits that are read later, nothing to learn, transforms that fall back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastbert
from tests.families import IN_FULL, LEFT_TO_RIGHT, MASKED_LM, both, dropping, without_cache
from tests.models import CAUSAL, assert_gradients_close, batch, config_of, head_of, mask_named, pair

WORDS = [*MASKED_LM, *LEFT_TO_RIGHT, "AlbertForPreTraining", "ErnieForPreTraining"]
OF_TOKENS = [*WORDS, *(name for name in IN_FULL if head_of(name) == "ForTokenClassification")]


def _pair(name: str) -> tuple[Any, Any]:
    """One that a test may change, in training."""
    stock, fast = pair(name, config_of(name, num_hidden_layers=2, **dropping(0.0)))
    return stock.train(), fast.train()


def _logits(name: str) -> str:
    return "prediction_logits" if head_of(name) == "ForPreTraining" else "logits"


@pytest.mark.parametrize("name", WORDS)
def test_logits_that_are_read_after_the_loss(name: str) -> None:
    """They are those of the step, gradients flow through them, and they are not computed where nobody reads them."""
    stock, fast = both(name, strict=True)
    mask = mask_named("right")
    inputs, outputs = batch(name, mask), []
    for model in (stock, fast):
        output = model.train()(**inputs)
        if model is fast:
            assert type(dict.__getitem__(output, _logits(name))) is not Tensor, "computed before anybody read them"
        outputs.append(output)
    expected, actual = (output[_logits(name)] for output in outputs)
    assert type(actual) is Tensor
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    for output in outputs:
        (output.loss + output[_logits(name)][mask.bool()].square().mean()).backward()
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("name", WORDS)
def test_logits_that_are_read_after_the_weights_have_changed(name: str) -> None:
    _, fast = _pair(name)
    of_layers = [p for key, p in fast.base_model.named_parameters() if "layer" in key]
    for weight in (of_layers[-1], fast.get_output_embeddings().weight):
        output = fast(**batch(name, None))
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"computed when they are read.*changed"):
            output[_logits(name)].sum()


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), 7], ids=str)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_a_step_without_labels(name: str, items: Any) -> None:
    """The loss is NaN, as transformers' is, or 0 where others have the labels; nothing is learned."""
    _, fast = _pair(name)
    inputs = batch(name, mask_named("right"))
    for label in ("labels", "sentence_order_label", "next_sentence_label"):
        if label in inputs:
            inputs[label] = torch.full_like(inputs[label], -100)
    output = fast(**inputs, **({} if items is None else {"num_items_in_batch": items}))
    output.loss.backward()
    if items == 7 and head_of(name) != "ForPreTraining":
        assert output.loss == 0
    elif items is None:
        assert torch.isnan(output.loss)
    assert all(p.grad is None or not p.grad.any() for p in fast.parameters())
    assert fastbert.report(fast).packed_calls == 1


@pytest.mark.parametrize("name", IN_FULL)
def test_forward_mode_differentiation_falls_back(name: str) -> None:
    stock, fast = (model.double() for model in _pair(name))
    inputs = batch(name, mask_named("right")) | without_cache(name)
    keep = inputs["attention_mask"].bool()
    values = {key: p.detach() for key, p in stock.named_parameters()}
    tangents = {key: torch.randn_like(p) for key, p in values.items()}

    def outputs(model: nn.Module) -> Callable[[dict[str, Tensor]], list[Tensor]]:
        def call(v: dict[str, Tensor]) -> list[Tensor]:
            found = functional_call(model, v, (), inputs).to_tuple()
            return [t[keep] if t.shape[:2] == keep.shape else t for t in found if isinstance(t, Tensor)]

        return call

    with sdpa_kernel(SDPBackend.MATH):
        expected, actual = (jvp(outputs(model), (values,), (tangents,)) for model in (stock, fast))
    tolerance = 1e-5 if head_of(name) in CAUSAL else 1e-8  # transformers' causal loss is in float32
    torch.testing.assert_close(actual, expected, check_dtype=False, atol=tolerance, rtol=tolerance)
    assert fastbert.report(fast).packed_calls == 0
