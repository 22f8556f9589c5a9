"""Runs of fine-tuning on tiny models, and the same by transformers on padded batches.

Dimension key:  B items   C sequences of an item   L padded length
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
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


def transformers_curve(
    run: Finetuning,
    folder: Path,
    items: Sequence[Any] | None = None,
    collator: Callable[[list[Any]], Any] | None = None,
    change: Callable[[Any], object] = lambda model: None,
) -> list[float]:
    """The same run by transformers' model and Trainer: the same items in the same order, padded.

    Args:
        items, collator: what the stock model takes, in the order of the task's features, and what pads it; the features
            themselves where it is None.
        change: what is to be done to the stock model first.
    """
    tuning, features = run.tuning, run.task.features(run.train, run.tokenizing, run.config)
    (training,) = tuning.trainings
    batches = ShuffledBatches(features, tuning.batch_size, tuning.epochs, training.seed)
    order = np.concatenate([batches.items(step) for step in range(batches.steps)])
    assert len(order) == batches.steps * tuning.batch_size  # what Trainer makes of a list of items
    if items is None:
        items = [features.batch(np.asarray([i])) for i in range(len(features))]
    assert len(items) == len(features)
    model = fastbert.unpatch(begin(run.task, tuning, run.config, training.seed)[0])
    change(model)
    return losses(
        model,
        [items[i] for i in order],
        collator or partial(_padded, padding=run.config.pad_token_id, per_token=features.per_token),
        folder,
        max_steps=batches.steps,
        per_device_train_batch_size=tuning.batch_size,
        learning_rate=training.learning_rate,
        warmup_steps=round(tuning.warmup * batches.steps),
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        remove_unused_columns=False,
    )


def _padded(items: list[dict[str, Any]], padding: int, per_token: bool) -> dict[str, Tensor]:
    """(B, L), or (B, C, L) where items have several sequences. Labels of tokens are padded, too."""
    lengths = [item["cu_seq_lens_q"].diff().tolist() for item in items]
    fillings = {"input_ids": padding, "token_type_ids": 0}
    if per_token:
        fillings["labels"] = -100
    rows = {
        name: [row.long() for item, ns in zip(items, lengths, strict=True) for row in item[name][0].split(ns)]
        for name in fillings
        if name in items[0]
    }
    rows["attention_mask"] = [torch.ones(n, dtype=torch.int64) for ns in lengths for n in ns]
    batch = {name: pad_sequence(of, batch_first=True, padding_value=fillings.get(name, 0)) for name, of in rows.items()}
    if len(lengths[0]) > 1:
        batch = {name: t.view(len(items), len(lengths[0]), -1) for name, t in batch.items()}
    return batch if per_token else {**batch, "labels": torch.cat([item["labels"] for item in items])}
