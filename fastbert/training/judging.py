"""How well a model does on a task's data, by all processes of a run together."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastbert.inference.engine import Engine
from fastbert.tasks.scores import Scores
from fastbert.tasks.task import Judge

Progress = Callable[[int], None]


def judged(
    engine: Engine, judge: Judge, rank: int = 0, world_size: int = 1, progress: Progress | None = None
) -> Scores:
    """The model's scores, the same in every process; each of them runs its share of the sequences.

    Batches are by a budget of tokens, longest first.

    Args:
        progress: called with the number of tokens that have just been done here.
    """
    model, tokens = engine.model, judge.tokens
    mine = np.arange(rank, len(tokens.lengths), world_size)
    was_training = model.training
    model.eval()
    try:
        some = tokens if world_size == 1 else tokens.select(mine)
        outputs = engine.gather(
            some, judge.width, lambda batch: judge.call(model, batch), progress, per_token=judge.per_token
        )
    finally:
        model.train(was_training)
    if world_size > 1:
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, outputs)
        total = len(tokens.ids) if judge.per_token else len(tokens.lengths)
        outputs = np.zeros((total, judge.width), np.float32)
        for other, theirs in enumerate(every):
            rows = np.arange(other, len(tokens.lengths), world_size)
            outputs[tokens.places(rows)[0] if judge.per_token else rows] = theirs
    return judge.score(outputs)


def mixed(device: torch.device, dtype: str) -> Any:
    """The autocast that a run computes in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")
