"""What a fine-tuning run is asked to do, and its models."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

import fastbert
from fastbert.errors import InputError
from fastbert.inference.loading import load_config, load_weights
from fastbert.tasks.task import Task

_POOLER = "pooler."
# May be other ones when a run goes on: they change nothing of what is learnt.
_FREE = ("accumulation", "eval_every", "save_every", "log_every", "non_finite_loss", "keep")


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning run: one training, or several of which the best is kept.

    The optimiser is AdamW with bias correction, whose learning rate rises over the warm-up and falls linearly to 0.
    Source: https://arxiv.org/abs/1810.04805, section A.3; bias correction: https://arxiv.org/abs/2006.04884.

    Attributes:
        model: a checkpoint that it begins with.
        epochs: over the training data.  batch_size: items of a step.
        learning_rates, seeds: a training for each pair. A seed decides the head's first weights, order and dropout.
        warmup: share of the steps.
        max_length: tokens of a sequence; None for the task's own, or what the model takes where that is less.
        doc_stride: tokens that windows of a long text have in common.
        dropout: None for what the configuration says.
        keep_head: begin with the checkpoint's own head.
        accumulation: batches of each process whose gradients are added up in a step.
        eval_every, save_every: steps; None for every epoch.
        non_finite_loss: "stop" or "continue", as in `Recipe`.
        keep: checkpoints of a training that goes on.
    """

    model: str
    epochs: float = 3.0
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (2e-5,)
    seeds: tuple[int, ...] = (1,)
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    max_length: int | None = None
    doc_stride: int = 128
    dropout: float | None = None
    dtype: str = "fp32"
    keep_head: bool = False
    accumulation: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    non_finite_loss: str = "stop"
    keep: int = 1

    def check(self) -> None:
        """Raises: InputError, naming the option that cannot be."""
        for name in ("batch_size", "accumulation", "log_every", "keep", "max_length", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, but is {value}")
        if self.doc_stride < 0:
            raise InputError(f"doc_stride must be at least 0, but is {self.doc_stride}")
        for good, what, bound, given in (
            (0 < self.epochs < math.inf, "epochs", "positive and finite", self.epochs),
            (0 <= self.warmup < 1, "the warm-up", "a share of the steps in [0, 1)", self.warmup),
            (0 <= self.weight_decay < math.inf, "the weight decay", "at least 0 and finite", self.weight_decay),
            (self.clip >= 0, "the clip", "at least 0, which is for none", self.clip),
            (self.dropout is None or 0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout),
            (all(0 < rate < math.inf for rate in self.learning_rates), "learning rates", "positive and finite",
             ", ".join(f"{rate:g}" for rate in self.learning_rates)),
            (all(0 <= seed < 2**32 for seed in self.seeds), "seeds", "in [0, 2^32)", self.seeds),
        ):  # fmt: skip
            if not good:
                raise InputError(f"{what} must be {bound}, but is {given}")
        for what, values in (("a learning rate", self.learning_rates), ("a seed", self.seeds)):
            if len(set(values)) != len(values) or not values:
                raise InputError(f"{what} is given twice" if values else f"{what} must be given")

    @property
    def trainings(self) -> list["Training"]:
        """All of them, in order."""
        return [Training(rate, seed) for rate, seed in product(self.learning_rates, self.seeds)]

    def saved(self) -> dict[str, Any]:
        """What must stay the same while it goes on, but for which trainings there are, and what need not."""
        options = asdict(self)
        del options["learning_rates"], options["seeds"]
        return {
            "fixed": {name: value for name, value in options.items() if name not in _FREE},
            "free": {name: options[name] for name in _FREE},
        }


@dataclass(frozen=True)
class Training:
    """One of a run."""

    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"lr-{self.learning_rate:g}-seed-{self.seed}"


def configured(task: Task, tuning: Tuning, head: dict[str, Any]) -> Any:
    """The configuration of the model that is tuned.

    Raises:
        InputError: if there is no such checkpoint, or fastbert does not know its type.
    """
    load_config(tuning.model)
    named = {name: value for name, value in head.items() if name != "num_labels"}  # as many as there are names
    config = AutoConfig.from_pretrained(tuning.model, **named)
    if tuning.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "dropout",
                     "attention_dropout", "seq_classif_dropout", "qa_dropout", "summary_last_dropout",
                     "classifier_dropout_prob"):  # fmt: skip
            if hasattr(config, name):
                setattr(config, name, tuning.dropout)
    return config


def begin(task: Task, tuning: Tuning, config: Any, seed: int) -> tuple[Any, list[str]]:
    """The patched model with its first weights, and what is to be said of them.

    What the checkpoint lacks is drawn by the seed: always the head, but for `keep_head`, for one of another task would
    hold what it has learnt there.

    Raises:
        InputError: if the checkpoint cannot be loaded, lacks weights of its encoder, or has a head of another size that
            is to be kept.
    """
    torch.manual_seed(seed)
    if tuning.keep_head:
        model, missing = load_weights(task.auto, tuning.model, config=config)
        if missing:
            raise InputError(f"--keep-head: {tuning.model} lacks {missing[0]}, so its head is another")
        return fastbert.patch(model), []
    model = task.auto.from_config(config, dtype=torch.float32)
    encoder, missing = load_weights(AutoModel, tuning.model)
    lost = [key for key in missing if not key.startswith(_POOLER)]
    if lost:
        raise InputError(f"{tuning.model} is not whole: it lacks {len(lost)} weights of its encoder, as {lost[0]}")
    weights = {k: v for k, v in encoder.state_dict().items() if not (k.startswith(_POOLER) and missing)}
    if broken := [key for key, value in weights.items() if not value.isfinite().all()]:
        raise InputError(f"{tuning.model} has weights that are not finite: {broken[0]}")
    left = model.base_model.load_state_dict(weights, strict=False)
    needed = [key for key in left.missing_keys if not key.startswith(_POOLER)]
    if needed:
        raise InputError(f"{tuning.model} lacks {needed[0]} of {type(model).__name__}")
    notes = []
    before = getattr(config, "architectures", None) or []
    if any(name.endswith(type(model).__name__.split("For")[-1]) and "For" in name for name in before):
        notes.append(
            f"its head is new: that of {tuning.model}, a {before[0]}, is of another task (--keep-head keeps it)"
        )
    if any(key.startswith(_POOLER) for key in left.missing_keys):
        notes.append(f"its pooler is new: {tuning.model} has none")
    return fastbert.patch(model), notes


def best(results: Sequence[dict[str, Any]], main: str) -> int:
    """Which training is; of equals the first."""
    return max(range(len(results)), key=lambda i: (_comparable(results[i]["metrics"].get(main)), -i))


def _comparable(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
