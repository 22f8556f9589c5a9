"""A pretraining step with the masked-LM head on labelled rows only, against the head on all rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

import fastbert
from bench.harness import Bench, Ready
from bench.record import OURS, Work
from bench.shapes import MODELS, VOCABULARY
from fastbert.data.pretraining import Phase, PretrainingBatches, Sampling
from fastbert.training.metrics import training_flops
from tests.corpora import random_store

SDPA = "transformers SDPA"
ALL_ROWS = f"{OURS}, head on all rows"
SMALLEST = [{"model": "tiny", "batch": 2, "S": 16, "dtype": "float32"}]
CASES: dict[str, list[dict[str, Any]]] = {
    "cpu": [{"model": "MiniLM", "batch": 8, "S": 128, "dtype": "float32"}],
    "cuda": [
        {"model": model, "batch": batch, "S": S, "dtype": "bfloat16"}
        for model in ("base", "large")
        for batch, S in ((128, 128), (32, 512))
    ],
}


def _labelled_rows(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


def _all_rows(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The same loss, of the logits of every token."""
    inputs = {name: t for name, t in batch.items() if name not in ("labels", "next_sentence_label", "label_rows")}
    outputs = model(**inputs)
    masked = F.cross_entropy(outputs.prediction_logits.flatten(0, 1).float(), batch["labels"].flatten())
    return masked + F.cross_entropy(outputs.seq_relationship_logits.float(), batch["next_sentence_label"])


def _padded(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss


def _pad(batch: dict[str, Any]) -> dict[str, Tensor]:
    lengths = batch["cu_seq_lens_q"].diff().tolist()

    def rows(t: Tensor, fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence(list(t[0].split(lengths)), batch_first=True, padding_value=fill)

    return {
        "input_ids": rows(batch["input_ids"], 0),
        "token_type_ids": rows(batch["token_type_ids"], 0),
        "attention_mask": rows(torch.ones_like(batch["input_ids"]), 0),
        "labels": rows(batch["labels"], -100),
        "next_sentence_label": batch["next_sentence_label"],
    }


def test_pretraining(case: dict[str, Any], bench: Bench) -> None:
    pytest.importorskip("fastbert._C", reason="needs the C++ extension, which is not built")
    layers, hidden, heads = MODELS.get(case["model"], (2, 64, 2))
    dtype = getattr(torch, case["dtype"])
    config = transformers.BertConfig(
        vocab_size=VOCABULARY if case["model"] in MODELS else 500,
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        hidden_dropout_prob=0.0,  # so that all compute the same
        attention_probs_dropout_prob=0.0,
    )
    sampling = Sampling(batch_size=case["batch"])
    batch = next(iter(PretrainingBatches(random_store(sentences=40), sampling, (Phase(case["S"], 1),))))
    packed = {name: t.to(bench.device) if isinstance(t, Tensor) else t for name, t in batch.items()}
    torch.manual_seed(0)
    weights = transformers.BertForPreTraining(config).state_dict()

    def ready(kind: Any, loss_of: Callable[..., Tensor], inputs: dict[str, Any], subset: bool = True) -> Ready:
        model = kind(config)
        model.load_state_dict(weights)
        model.to(bench.device, dtype).train()
        if kind is fastbert.BertForPreTraining:
            fastbert.patch(model, last_layer_subset=subset)
        with torch.no_grad():
            loss = float(loss_of(model, inputs))
        wrong = None if abs(loss - expected) <= 1e-2 * expected else f"the loss is {loss:.4f}, not {expected:.4f}"

        def step() -> None:
            for p in model.parameters():
                p.grad = None
            loss_of(model, inputs).backward()

        return Ready([step], wrong)

    reference = transformers.BertForPreTraining(config)
    reference.load_state_dict(weights)
    padded = {name: t.to(bench.device) for name, t in _pad(batch).items()}
    with torch.no_grad():
        expected = float(_padded(reference.to(bench.device), padded))
    del reference
    providers = {
        OURS: partial(ready, fastbert.BertForPreTraining, _labelled_rows, packed),
        ALL_ROWS: partial(ready, fastbert.BertForPreTraining, _all_rows, packed, False),
        SDPA: partial(ready, transformers.BertForPreTraining, _padded, padded),
    }
    lengths, labels = batch["cu_seq_lens_q"].diff(), len(batch["label_rows"])
    tokens = batch["input_ids"].shape[1]
    work = Work(flops=training_flops(config, lengths, labels), tokens=tokens, sequences=case["batch"])
    bench.steps("pretraining", case, providers, work)
