"""Training a BiLSTM over a frozen encoder's hidden states, which are computed once."""

import math
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import get_linear_schedule_with_warmup

from fastbert.errors import InputError
from fastbert.inference.engine import Engine
from fastbert.tasks.features import Features
from fastbert.tasks.scores import Scores
from fastbert.tasks.tagging.frozen import BYTES, Vectors, WordLSTM, about_of, encoder_of, layers_of, scored, vectors
from fastbert.tasks.tagging.words import firsts
from fastbert.tasks.task import Judge, Task
from fastbert.terminal import note, progress
from fastbert.training import checkpoints, files, logs
from fastbert.training.finetuning import Finetuning
from fastbert.training.judging import mixed
from fastbert.training.results import figures_of
from fastbert.training.tuning import Training, Tuning

_GIB = 1 << 30
_DROPOUT = 0.1
_STATE = "state.pt"  # in a checkpoint


class FrozenRun(Finetuning):
    """A run that trains no weight of the checkpoint. A training that was cut off goes on at its last checkpoint.

    On a CPU it ends with the same bits; cuDNN's dropout has a state of its own that nobody can save.

    Args:
        features: of `frozen.FEATURES`.
        memory: GiB that hidden states may take.
        options: of `Finetuning`.

    Raises:
        InputError: if the task has no words, there are several processes, or what is given cannot be.
    """

    def __init__(
        self, task: Task, tuning: Tuning, output: Path, features: str, *, memory: float = 4.0, **options: Any
    ) -> None:
        if task.kind != "token":
            raise InputError(f"--features is for tasks with a tag a word, as ner, and {task.name} is none")
        self._kind, self._memory = features, memory
        super().__init__(task, tuning, output, **options)
        if self._world_size > 1:
            raise InputError("--features trains in one process: its model is small")
        self._about = about_of(tuning.model, features, self.config)
        self._made: Features | None = None
        self._read_vectors: dict[str, Vectors] = {}

    def _kept(self) -> Features:
        """In memory: the windows that its tokens are must be known."""
        if self._made is None:
            self._made = self._features()
        return self._made

    def _saved(self) -> dict[str, Any]:
        saved = super()._saved()
        saved["fixed"]["features"] = self._kind
        return saved

    def saved_of_model(self) -> dict[str, Any]:
        return {**super().saved_of_model(), "features": self._kind}

    def _summary(self, features: Features, judges: Mapping[str, Judge]) -> list[tuple[str, str]]:
        tokens: list[Any] = [features.tokens, *(judge.tokens for judge in judges.values())]
        words = sum(len(firsts(each)) for each in tokens)
        about = self._about
        size = words * about.kept * about.hidden * BYTES / _GIB
        what = f"{self._kind}: {words:,} words x {about.kept} x {about.hidden}, {size:.3g} GiB"
        if size > self._memory:
            raise InputError(
                f"--features {what}, is more than --features-memory {self._memory:g}: allow more, or take features of"
                " fewer layers"
            )
        return [*super()._summary(features, judges), ("features", f"{what} in memory; the encoder is frozen")]

    def _train(self, training: Training, features: Features, judges: Mapping[str, Judge]) -> dict[str, Any]:
        folder = self._folder(training)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_drafts(folder)
        checkpoint = checkpoints.last_checkpoint(folder)
        logs.cut(folder / logs.LOG, -1 if checkpoint is None else checkpoints.step_of(checkpoint))
        start = time.perf_counter()
        if not self._read_vectors:
            self._read_vectors = self._vectors({"": features.tokens, **{n: j.tokens for n, j in judges.items()}})
        torch.manual_seed(training.seed)
        model = WordLSTM(self._about, _DROPOUT if self.tuning.dropout is None else self.tuning.dropout)
        scores, steps = self._fit(model.to(self._device), training, features.labels["labels"], judges, checkpoint)
        model.save(folder / files.MODEL)
        result = {
            "training": training.name,
            **asdict(training),
            "metrics": figures_of(scores),
            "seconds": time.perf_counter() - start if checkpoint is None else None,
            "steps": steps,
        }
        self._keep(folder, result, scores)
        return result

    def _fit(
        self,
        model: WordLSTM,
        training: Training,
        labels_T: npt.NDArray[np.int64],
        judges: Mapping[str, Judge],
        checkpoint: Path | None,
    ) -> tuple[dict[str, Scores], int]:
        """Train, log, and save checkpoints. Returns: scores after the last step, and how many steps there were."""
        tuning, read, log = self.tuning, self._read_vectors[""], self._folder(training) / logs.LOG
        labels_M = torch.from_numpy(labels_T[read.at])
        optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=tuning.weight_decay)
        sentences = len(read.lengths)
        an_epoch = -(-sentences // tuning.batch_size)
        steps = max(1, round(tuning.epochs * an_epoch))
        schedule = get_linear_schedule_with_warmup(optimizer, round(tuning.warmup * steps), steps)
        losses: list[float] = []  # since the last log
        norm = 0.0
        scores: dict[str, Scores] = {}
        first = 1
        if checkpoint is not None:
            first = 1 + checkpoints.step_of(checkpoint)
            losses, norm = _restore(checkpoint, model, optimizer, schedule)
            note(f"{training.name}: resumed at step {first - 1:,} of {steps:,}, of {checkpoint.name}")
        with progress("training", steps, "steps") as advance:
            advance(first - 1)
            for step in range(first, steps + 1):
                epoch, place = divmod(step - 1, an_epoch)
                order = np.random.default_rng([training.seed, epoch]).permutation(sentences)
                rows, lengths = read.of(order[place * tuning.batch_size : (place + 1) * tuning.batch_size])
                if lengths:
                    loss, norm = self._backward(model, read.values[rows], labels_M[rows], lengths)
                    if not math.isfinite(loss + norm):
                        raise InputError(f"the loss or its gradient is not finite at step {step:,}")
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(loss)
                record = {"learning_rate": schedule.get_last_lr()[0], "time": time.time()}
                schedule.step()
                advance(1)
                if losses and (step % tuning.log_every == 0 or step == steps):
                    logs.append(log, {"step": step, "loss": float(np.mean(losses)), "grad_norm": norm, **record})
                    losses = []
                if step == steps or step % (tuning.eval_every or an_epoch) == 0:
                    scores = self.judge(model, judges)
                    found = {f"eval_{name}": value for name, value in figures_of(scores).items()}
                    logs.append(log, {"step": step, **found, "time": time.time()})
                if step < steps and step % (tuning.save_every or an_epoch) == 0:
                    _save(log.parent, step, model, optimizer, schedule, losses, norm)
        return scores, steps

    def _backward(
        self, model: WordLSTM, values: npt.NDArray[np.float16], labels_M: torch.Tensor, lengths: list[int]
    ) -> tuple[float, float]:
        """Returns: the loss, a mean over words, and its gradient's norm before it is clipped."""
        model.train()
        logits_MC = model(torch.from_numpy(values).to(self._device).float(), lengths)
        loss = torch.nn.functional.cross_entropy(logits_MC, labels_M.to(self._device))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.tuning.clip or math.inf)
        return loss.item(), norm.item()

    def _vectors(self, tokens: Mapping[str, Any]) -> dict[str, Vectors]:
        engine = Engine(encoder_of(self.tuning.model, self._device), self.tokenizer, max_length=self.tuning.max_length)
        total = sum(len(each.ids) for each in tokens.values())
        layers = layers_of(self._kind, engine.model.config)
        with mixed(self._device, self.tuning.dtype), progress("encoding", total, "tokens") as advance:
            return {name: vectors(engine, each, layers, advance) for name, each in tokens.items()}

    def judge(self, model: Any, judges: Mapping[str, Judge]) -> dict[str, Scores]:
        """Scores of a BiLSTM on each of these."""
        known = self._read_vectors
        if not judges.keys() <= known.keys():
            known = self._vectors({name: judge.tokens for name, judge in judges.items()})
        return {name: scored(model, judge, known[name]) for name, judge in judges.items()}

    def _best(self) -> Any:
        return WordLSTM.load(self.output / files.MODEL).to(self._device)


def _save(
    folder: Path, step: int, model: WordLSTM, optimizer: Any, schedule: Any, losses: list[float], norm: float
) -> None:
    """A checkpoint, whole or not at all, in place of the one before. Raises: InputError, if it cannot be written."""
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}
    state |= {"losses": losses, "norm": norm, "random": torch.get_rng_state()}
    device = model.classifier.weight.device
    if device.type == "cuda":
        state["random_cuda"] = torch.cuda.get_rng_state(device)
    draft = folder / checkpoints.DRAFTS / f"checkpoint-{step}"
    try:
        draft.mkdir(parents=True, exist_ok=True)
        torch.save(state, draft / _STATE)
        checkpoints.publish(draft, folder / draft.name)
        checkpoints.rotate(folder, 1)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot write {draft.name}: {checkpoints.why_not_written(error)}") from error


def _restore(checkpoint: Path, model: WordLSTM, optimizer: Any, schedule: Any) -> tuple[list[float], float]:
    """Returns: the losses since the last log, and the last gradient's norm.

    Raises:
        InputError: if the checkpoint is damaged.
    """
    try:
        state = torch.load(checkpoint / _STATE, weights_only=True, map_location="cpu")
        for name, part in {"model": model, "optimizer": optimizer, "schedule": schedule}.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        device = model.classifier.weight.device
        if "random_cuda" in state and device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], device)
        found: tuple[list[float], float] = state["losses"], state["norm"]
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{checkpoint} is damaged: remove it, and the training goes on before it ({error})") from error
    return found
