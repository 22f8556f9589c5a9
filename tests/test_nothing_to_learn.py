"""Batches without a label: the loss is NaN, as transformers' is, gradients are zeros, and training goes on."""

from typing import Any

import pytest
import torch
from torch import nn

import fastbert
from fastbert import functional
from tests.models import HEADS, batch, mask_named, no_dropout, pair, tiny_config

WITH_LABELS_OF_TOKENS = ("BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification", "BertLMHeadModel")


def _inputs(name: str, mask: str) -> dict[str, Any]:
    inputs = batch("BertForMaskedLM" if name == "BertLMHeadModel" else name, mask_named(mask))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    return inputs


def _models(name: str) -> tuple[Any, Any]:
    stock, fast = pair(name, tiny_config(is_decoder=name == "BertLMHeadModel"))
    return no_dropout(stock), no_dropout(fast)


def _steps(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """A step with decay and clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-1, weight_decay=0.1)
    loss = model(**inputs).loss
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}], ids=str)
@pytest.mark.parametrize("mask", ["none", "right"])
@pytest.mark.parametrize("name", WITH_LABELS_OF_TOKENS)
def test_a_step_without_labels(name: str, mask: str, more: dict[str, Any]) -> None:
    """Weights after it are transformers', decay included; with next sentences, what these alone teach."""
    stock, fast = _models(name)
    inputs = _inputs(name, mask)
    losses = [_steps(stock, inputs), _steps(fast, inputs | more)]
    assert all(torch.isnan(loss) for loss in losses)
    for (key, p), q in zip(fast.named_parameters(), stock.parameters(), strict=True):
        assert torch.isfinite(p).all(), key
        if name != "BertForPreTraining" or not more:
            torch.testing.assert_close(p, q, msg=key)


@pytest.mark.parametrize("name", WITH_LABELS_OF_TOKENS)
def test_one_of_several_processes_without_labels(name: str) -> None:
    """Its loss is 0, and so are its gradients: the others' count alone."""
    _, fast = _models(name)
    inputs = _inputs(name, "right")
    inputs.pop("next_sentence_label", None)
    if name == "BertForPreTraining":
        inputs["next_sentence_label"] = torch.full((len(inputs["labels"]),), -100)
    loss = fast(**inputs, num_items_in_batch=7).loss
    loss.backward()
    if name != "BertForPreTraining":
        assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in fast.parameters())


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
@pytest.mark.parametrize("name", WITH_LABELS_OF_TOKENS)
def test_a_step_with_labels_but_no_items(name: str, items: Any) -> None:
    _, fast = _models(name)
    loss = fast(**batch("BertForMaskedLM" if name == "BertLMHeadModel" else name, None), num_items_in_batch=items).loss
    loss.backward()
    assert torch.isposinf(loss)
    assert all(p.grad is None or not p.grad.any() for p in fast.parameters())


@pytest.mark.parametrize("name", [h for h in HEADS if h.endswith(("SequenceClassification", "MultipleChoice"))])
@pytest.mark.parametrize("items", [0, torch.tensor(0), 7])
def test_classes(name: str, items: Any) -> None:
    """7 are other processes'."""
    _, fast = _models(name)
    inputs = batch(name, mask_named("right"))
    inputs["labels"].fill_(-100)
    loss = fast(**inputs, num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0 if items == 7 else torch.isnan(loss)
    assert all(p.grad is None or not p.grad.any() for p in fast.parameters())


def test_answers_outside_of_every_row() -> None:
    stock, fast = (no_dropout(m) for m in pair("BertForQuestionAnswering"))
    inputs = batch("BertForQuestionAnswering", mask_named("right"))
    answers = {"start_positions": torch.full((5,), 99), "end_positions": torch.full((5,), 99)}
    losses = [_steps(model, inputs | answers) for model in (stock, fast)]
    assert all(torch.isnan(loss) for loss in losses)
    for p, q in zip(fast.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0), 3])
@pytest.mark.parametrize("M", [0, 1, 5])
def test_the_operator(device: str, M: int, items: Any, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((M, 16), (11, 16), (11,)))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    items = items.to(device) if isinstance(items, torch.Tensor) else items
    labels = torch.full((M,), -100, device=device)
    loss = functional.linear_cross_entropy(*leaves, labels, num_items=items)
    loss.backward()
    assert loss == 0 if items == 3 else torch.isnan(loss)
    assert all(t.grad is not None and not t.grad.any() for t in leaves)


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_labels_but_no_items(items: Any) -> None:
    """Infinite, which is seen; nothing is learned from it."""
    x = torch.randn(3, 8, requires_grad=True)
    loss = functional.linear_cross_entropy(x, torch.randn(5, 8), None, torch.tensor([1, 2, 4]), num_items=items)
    loss.backward()
    assert torch.isposinf(loss)
    assert not x.grad.any()


def test_too_many_labels_still_show() -> None:
    _, fast = pair("BertForMaskedLM")
    with pytest.raises(ValueError, match="max_labels is 1"):
        fastbert.patch(fast).train()(**batch("BertForMaskedLM", None), max_labels=1)
