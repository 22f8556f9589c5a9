"""PyTorch's generator moves in a pass if and only if something is dropped, as in transformers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import functional
from tests.models import HEADS, batch, mask_named, tiny_config

WITH_DROPOUT = tiny_config(num_hidden_layers=2, num_labels=2)
IDS = torch.tensor([[2, 7, 8, 3], [2, 9, 5, 3]])


def _dropouts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Dropout)]


def _by_p(model: nn.Module) -> None:
    for _, module in _dropouts(model.train()):
        module.p = 0.0


def _by_mode(model: nn.Module) -> None:
    for name, module in model.train().named_modules():
        module.training = name == ""


def _by_configuration(model: nn.Module) -> None:
    """The modules were built before: it says nothing."""
    model.train().config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.0


def _in_evaluation_but_one(place: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.eval()
        for name, module in _dropouts(model):
            if name.endswith(place):
                module.train()

    return change


def _all_but_one(place: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, module in _dropouts(model.train()):
            module.p = 0.5 if name.endswith(place) else 0.0

    return change


PLACES = ("embeddings.dropout", "layer.0.attention.self.dropout", "attention.output.dropout", "layer.1.output.dropout")
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "training": nn.Module.train,
    "evaluation": nn.Module.eval,
    "p = 0": _by_p,
    "by mode": _by_mode,
    "by configuration": _by_configuration,
    **{f"only {place}": _all_but_one(place) for place in PLACES},
    **{f"in evaluation, but {place}": _in_evaluation_but_one(place) for place in PLACES},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", [*HEADS, "BertLMHeadModel"])
def test_it_moves_where_transformers_moves_it(name: str, change: str) -> None:
    stock = getattr(transformers, name)(WITH_DROPOUT if name != "BertLMHeadModel" else tiny_config(is_decoder=True))
    CHANGES[change](stock)
    inputs = batch(name if name in HEADS else "BertForMaskedLM", mask_named("right"))
    if name == "BertForTokenClassification":
        inputs["labels"] = inputs["labels"].clamp(max=1)
    elif name == "BertForSequenceClassification":
        inputs["labels"] = inputs["labels"] % 2
    moved = []
    for model in (stock, fastbert.patch(copy.deepcopy(stock))):
        before = torch.get_rng_state()
        model(**inputs)
        moved.append(not torch.equal(before, torch.get_rng_state()))
    assert moved[0] == moved[1]


def test_negatives_drawn_between_passes_are_the_same() -> None:
    drawn = []
    stock = transformers.BertModel(WITH_DROPOUT)
    _by_p(stock)
    for model in (stock, fastbert.patch(copy.deepcopy(stock))):
        torch.manual_seed(0)
        for _ in range(2):
            model(**batch("BertModel", None))
        drawn.append(torch.randperm(100))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("place", ["embeddings.dropout", "attention.self.dropout", "output.dropout"])
def test_one_number_is_drawn_for_a_pass(place: str) -> None:
    """In however many layers it drops, so that all of its masks can be had again from that one."""
    model = fastbert.patch(transformers.BertModel(WITH_DROPOUT))
    _all_but_one(place)(model)
    states = []
    for draw in (lambda: model(input_ids=IDS), lambda: functional.draw_seed(torch.device("cpu"))):
        torch.manual_seed(0)
        draw()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_none_is_drawn_where_only_transformers_embeddings_drop() -> None:
    states = []
    stock = transformers.BertModel(WITH_DROPOUT)
    stock.embeddings.position_embeddings = nn.Sequential(stock.embeddings.position_embeddings)
    _all_but_one("embeddings.dropout")(stock)
    for model in (stock, fastbert.patch(copy.deepcopy(stock))):
        torch.manual_seed(0)
        model(input_ids=IDS)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert fastbert.report(model).packed_calls == 1
