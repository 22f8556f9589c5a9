"""Runs of fine-tuning on tiny models, and the same by transformers on padded batches.

Dimension key:  B items   C sequences of an item   L padded length
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import fastbert
from fastbert.tasks.task import Task
from fastbert.training.batches import ShuffledBatches
from fastbert.training.finetuning import Finetuning
from fastbert.training.tuning import Tuning, begin
from tests.curves import losses

CPU = torch.device("cpu")
STEPS, BATCH = 50, 8


def tuned(task: Task, model: str, folder: Path, **options: Any) -> Finetuning:
    """A run that has ended."""
    settings = {"batch_size": BATCH, "dropout": 0.0, "log_every": 1, "learning_rates": (1e-3,), **options}
    run = Finetuning(task, Tuning(model, **settings), folder, device=CPU)
    run()
    return run


def curve_of(run: Finetuning) -> list[float]:
    """The loss of each step."""
    (log,) = run.output.glob("runs/*/log.jsonl")
    records = map(json.loads, log.read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def transformers_curve(run: Finetuning, folder: Path) -> list[float]:
    """The same run by transformers' model and Trainer: the same items in the same order, padded."""
    tuning = run.tuning
    seed, rate = tuning.seeds[0], tuning.learning_rates[0]
    model, _ = begin(run.task, tuning, run.config, seed)
    features = run.task.features(run.train, run.tokenizing, run.config)
    batches = ShuffledBatches(features, tuning.batch_size, tuning.epochs, seed)
    items = [features.batch(np.asarray([i])) for step in range(batches.steps) for i in batches.items(step)]
    return losses(
        fastbert.unpatch(model),
        items,
        _padded,
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=tuning.batch_size,
        learning_rate=rate,
        warmup_steps=round(tuning.warmup * batches.steps),
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        remove_unused_columns=False,
    )


def _padded(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """(B, L), or (B, C, L) where items have several sequences."""
    lengths = [item["cu_seq_lens_q"].diff().tolist() for item in items]
    names = [name for name in ("input_ids", "token_type_ids") if name in items[0]]
    rows = {
        name: [row.long() for item, ns in zip(items, lengths, strict=True) for row in item[name][0].split(ns)]
        for name in names
    }
    rows["attention_mask"] = [torch.ones(n, dtype=torch.int64) for ns in lengths for n in ns]
    batch = {name: pad_sequence(of, batch_first=True) for name, of in rows.items()}
    if len(lengths[0]) > 1:
        batch = {name: t.view(len(items), len(lengths[0]), -1) for name, t in batch.items()}
    return {**batch, "labels": torch.cat([item["labels"] for item in items])}
