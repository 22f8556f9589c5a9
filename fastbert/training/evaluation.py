"""How well a model predicts text that it was not trained on: fixed sequences, fixed masks."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastbert.data.pretraining import Batch, fixed_batches
from fastbert.data.store import HELD_OUT, Store
from fastbert.errors import InputError

LENGTH = 128  # tokens of a sequence at most: of both the phases that BERT has
_TOKENS = 2048  # of a batch: its logits are those of all tokens
_COUNTED = 6


def has_held_out(data: Path) -> bool:
    return (data / HELD_OUT).is_dir()


def evaluated_length(max_lengths: Sequence[int]) -> int:
    """Of sequences to evaluate on: one that a model has learnt from its first phase on."""
    return min(LENGTH, *max_lengths)


class Evaluation:
    """Masked-LM and next-sentence figures of models, on the same sequences with the same masks each time.

    They depend on the store, the objective, `max_length` and `sequences` alone, and the figures on nothing else: not on
    seeds, batches or how many processes share the work. Nothing random is drawn, and no state of training is touched.

    Args:
        objective: of `Sampling`: sentence pairs, full sentences, or left to right.
        max_length: of the sequences, in tokens.
        sequences: so many, or all that there are.
        rank, world_size: of this process; all of them call alike.

    Raises:
        InputError: if the store has too little text.
    """

    def __init__(
        self, store: Store, objective: str, max_length: int, sequences: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.max_length = max_length
        try:
            self._batches = list(fixed_batches(store, objective, max_length, sequences, _TOKENS))
        except InputError as error:
            raise InputError(f"{store.path} cannot be evaluated on: {error}") from error
        self.sequences = sum(len(batch["cu_seq_lens_q"]) - 1 for batch in self._batches)
        self.labels = sum(len(batch["label_rows"]) for batch in self._batches)
        if not self.labels:
            raise InputError(f"{store.path} cannot be evaluated on: it has no token to predict")
        self._rank, self._world_size = rank, world_size

    def __len__(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def __call__(self, model: nn.Module, progress: Callable[[int], None] | None = None) -> dict[str, float]:
        """The figures, which have the names that they have in a run's log.

        Args:
            progress: called with the number of batches that have just been done.
        """
        device = next(model.parameters()).device
        counts = torch.zeros(len(self._batches), _COUNTED, dtype=torch.float64, device=device)
        was_training = model.training
        model.eval()
        for first in range(0, len(self._batches), self._world_size):
            i = min(first + self._rank, len(self._batches) - 1)  # sharded weights are gathered by all or none
            counted = _count(model, self._batches[i], device)
            if first + self._rank == i:
                counts[i] = counted
            if progress is not None:
                progress(1)
        model.train(was_training)
        if self._world_size > 1:
            dist.all_reduce(counts)  # each row is one process's, so the sum below has one order
        loss, right, labels, nsp_loss, nsp_right, pairs = counts.cpu().sum(0).tolist()
        loss /= labels
        found = {"eval_mlm_loss": loss, "eval_mlm_accuracy": right / labels, "eval_perplexity": _exp(loss)}
        if pairs:
            found |= {"eval_nsp_loss": nsp_loss / pairs, "eval_nsp_accuracy": nsp_right / pairs}
        return found


def _count(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """(6,) float64: of tokens the loss, how many are right, how many there are; the same of pairs."""
    inputs: dict[str, Any] = {name: batch[name].to(device) for name in ("input_ids", "cu_seq_lens_q")}
    answers = batch.get("next_sentence_label")
    if answers is not None:  # without pairs all are of the first type
        inputs["token_type_ids"] = batch["token_type_ids"].to(device)
    output = model(**inputs, max_length_q=batch["max_length_q"])
    rows = batch["label_rows"]
    labels = (batch["labels"] if "labels" in batch else batch["shift_labels"])[0, rows]
    logits = output.logits if answers is None else output.prediction_logits
    counted = _compared(logits[0, rows.to(device)], labels.to(device))
    if answers is None:
        return torch.cat([counted, torch.zeros_like(counted)])
    return torch.cat([counted, _compared(output.seq_relationship_logits, answers.to(device))])


def _compared(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float()
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    return torch.stack([losses.sum(), (logits.argmax(-1) == labels).sum().double(), losses.new_tensor(len(labels))])


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # beyond, no float holds it


class Evaluate(TrainerCallback):
    """Every so many steps, and after the last one."""

    def __init__(self, every: int) -> None:
        self._every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True
