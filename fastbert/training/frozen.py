"""Training a BiLSTM over a frozen encoder's hidden states, which are computed once."""

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import get_linear_schedule_with_warmup

from fastbert.errors import InputError
from fastbert.inference.engine import Engine
from fastbert.tasks.features import Features
from fastbert.tasks.frozen import BYTES, Vectors, WordLSTM, about_of, encoder_of, layers_of, scored, vectors
from fastbert.tasks.scores import Scores
from fastbert.tasks.task import Judge, Task
from fastbert.tasks.words import firsts
from fastbert.terminal import progress
from fastbert.training import files, logs
from fastbert.training.finetuning import Finetuning, figures_of
from fastbert.training.judging import mixed
from fastbert.training.tuning import Training, Tuning

_GIB = 1 << 30
_DROPOUT = 0.1


class FrozenRun(Finetuning):
    """A run that trains no weight of the checkpoint. A training that was cut off begins anew.

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
        words = sum(len(firsts(read.tokens)) for read in (features, *judges.values()))  # type: ignore[arg-type]
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
        folder, tuning = self._folder(training), self.tuning
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        if not self._read_vectors:
            self._read_vectors = self._vectors({"": features.tokens, **{n: j.tokens for n, j in judges.items()}})
        read = self._read_vectors[""]
        labels_M = torch.from_numpy(features.labels["labels"][read.at])
        torch.manual_seed(training.seed)
        model = WordLSTM(self._about, _DROPOUT if tuning.dropout is None else tuning.dropout).to(self._device)
        optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=tuning.weight_decay)
        an_epoch = -(-len(read.lengths) // tuning.batch_size)
        steps = max(1, round(tuning.epochs * an_epoch))
        schedule = get_linear_schedule_with_warmup(optimizer, round(tuning.warmup * steps), steps)
        total, since, words = 0.0, 0, 0
        with progress("training", steps, "steps") as advance:
            for step in range(steps):
                order = np.random.default_rng([training.seed, step // an_epoch]).permutation(len(read.lengths))
                place = step % an_epoch * tuning.batch_size
                rows, lengths = read.of(order[place : place + tuning.batch_size])
                if lengths:
                    model.train()
                    values = torch.from_numpy(read.values[rows]).to(self._device).float()
                    logits = model(values, lengths)
                    loss = torch.nn.functional.cross_entropy(logits, labels_M[rows].to(self._device))
                    loss.backward()  # type: ignore[no-untyped-call]
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), tuning.clip or math.inf)
                    if not math.isfinite(loss.item() + norm.item()):
                        raise InputError(f"the loss or its gradient is not finite at step {step + 1:,}")
                    optimizer.step()
                    optimizer.zero_grad()
                    total, since, words = total + loss.item(), since + 1, words + len(rows)
                rate = schedule.get_last_lr()[0]
                schedule.step()
                advance(1)
                if since and (step + 1) % tuning.log_every == 0:
                    record = {"loss": total / since, "learning_rate": rate, "grad_norm": norm.item(), "words": words}
                    logs.append(folder / logs.LOG, {"step": step + 1, **record, "time": time.time()})
                    total, since, words = 0.0, 0, 0
                if step + 1 == steps or (step + 1) % (tuning.eval_every or an_epoch) == 0:
                    scores = self.judge(model, judges)
                    found = {f"eval_{name}": value for name, value in figures_of(scores).items()}
                    logs.append(folder / logs.LOG, {"step": step + 1, **found, "time": time.time()})
        model.save(folder / files.MODEL)
        result = {
            "training": training.name,
            **asdict(training),
            "metrics": figures_of(scores),
            "seconds": time.perf_counter() - start,
            "steps": steps,
        }
        self._keep(folder, result, scores)
        return result

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
