"""A patched model against stock transformers (SDPA), at half padding and at none.

Two layers of BERT with a classifier: encoder layers are all alike, so the ratio is a deep model's, in less time.
Lengths are spread evenly over 1 ... S where half the slots are padding.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import fastbert
from bench.harness import Row, compare

BATCH, LAYERS = 16, 2


def _case(step: str, dropout: float, padding: str, S: int, hidden: int, dtype: str) -> dict[str, Any]:
    return {"step": step, "dropout": dropout, "padding": padding, "S": S, "hidden": hidden, "dtype": dtype}


CASES = [
    _case(step, dropout, padding, S, hidden, dtype)
    for (step, dropout), padding, S, hidden, dtype in product(
        (("inference", 0.0), ("training", 0.0), ("training", 0.1)),
        ("half", "none"),
        (128, 512),
        (384, 768),
        ("float32", "bfloat16"),
    )
]
SMALLEST = [_case("inference", 0.0, "half", 16, 384, "float32"), _case("training", 0.0, "half", 16, 384, "bfloat16")]


def _batch(S: int, padding: str) -> dict[str, Tensor]:
    lengths = torch.full((BATCH,), S)
    if padding == "half":
        lengths = torch.linspace(1, S, BATCH).round().long()[torch.randperm(BATCH)]
    return {
        "input_ids": torch.randint(1000, 30000, (BATCH, S)),
        "attention_mask": (torch.arange(S) < lengths[:, None]).long(),
        "labels": torch.randint(0, 2, (BATCH,)),
    }


def _inference(model: BertForSequenceClassification, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.inference_mode():
            return model(**batch).logits

    return step


def _training(model: BertForSequenceClassification, batch: dict[str, Tensor]) -> Callable[[], Tensor | None]:
    """Forward and backward. The gradient to compare is the first layer's, which every other one reaches."""
    weight = model.bert.encoder.layer[0].attention.self.value.weight
    drops = model.config.hidden_dropout_prob > 0

    def step() -> Tensor | None:
        model.zero_grad()
        model(**batch).loss.backward()
        return None if drops else weight.grad

    return step


def test_model(case: dict[str, Any], benchmark: BenchmarkFixture, results: Callable[[Row | None], None]) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=case["hidden"],
        intermediate_size=4 * case["hidden"],
        num_attention_heads=12,
        num_hidden_layers=LAYERS,
        hidden_dropout_prob=case["dropout"],
        attention_probs_dropout_prob=case["dropout"],
        attn_implementation="sdpa",
    )
    dtype = getattr(torch, case["dtype"])
    stock = BertForSequenceClassification(config).to(dtype)
    fast = BertForSequenceClassification(config).to(dtype)
    fast.load_state_dict(stock.state_dict())
    fastbert.patch(fast, strict=True)
    batch = _batch(case["S"], case["padding"])
    make = _inference if case["step"] == "inference" else _training
    steps = [make(model.train(case["step"] == "training"), batch) for model in (stock, fast)]
    results(compare(benchmark, case, *steps, tolerance=1e-4 if dtype == torch.float32 else 0.1))
