"""Fine-tuning by stock transformers on padded batches, for ours to be compared with."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastbert
from fastbert.tasks.task import Task
from fastbert.training.batches import ShuffledBatches
from fastbert.training.finetuning import Finetuning
from fastbert.training.tuning import Tuning, begin
from tests.curves import losses


def both_curves(
    task: Task,
    tuning: Tuning,
    items: Sequence[Any],
    collator: Any,
    folder: Path,
    change: Callable[[Any], object] = lambda model: None,
) -> tuple[list[float], list[float]]:
    """The loss of each step, of a run of ours and of transformers' Trainer with a stock model.

    Args:
        tuning: one training without dropout, with `log_every=1`; its batches divide the items.
        items: what the stock model takes, in the order of the task's features.
        collator: makes padded batches of them.
        change: what is to be done to the stock model first.
    """
    run = Finetuning(task, tuning, folder / "run")
    run()
    (training,) = tuning.trainings
    log = folder / "run" / "runs" / training.name / "log.jsonl"
    packed = [record["loss"] for record in map(json.loads, log.read_text().splitlines()) if "loss" in record]

    features = run._features()
    assert len(features) == len(items)
    batches = ShuffledBatches(features, tuning.batch_size, tuning.epochs, training.seed)
    order = np.concatenate([batches.items(step) for step in range(batches.steps)])
    assert len(order) == batches.steps * tuning.batch_size
    model = fastbert.unpatch(begin(task, tuning, run.config, training.seed)[0])
    change(model)
    stock = losses(
        model,
        [items[i] for i in order],
        collator,
        folder,
        per_device_train_batch_size=tuning.batch_size,
        max_steps=batches.steps,
        learning_rate=training.learning_rate,
        weight_decay=tuning.weight_decay,
        max_grad_norm=tuning.clip,
        warmup_steps=round(tuning.warmup * batches.steps),
        lr_scheduler_type="linear",
    )
    assert len(packed) == len(stock) == batches.steps
    return packed, stock
