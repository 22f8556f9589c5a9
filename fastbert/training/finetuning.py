"""Fine-tuning, start to end: a task, a checkpoint, a run's folder."""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

import fastbert
from fastbert.data.store import read_json, write_json
from fastbert.errors import InputError, require
from fastbert.families._base import max_tokens
from fastbert.inference.encoding import takes_types
from fastbert.inference.engine import Engine
from fastbert.inference.loading import load_model, load_tokenizer, vocabulary_size
from fastbert.tasks import FILE
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.scores import Scores
from fastbert.tasks.split import held_out
from fastbert.tasks.task import DEV, TEST, TRAIN, Judge, Task, labels_of
from fastbert.terminal import counted, note
from fastbert.training import checkpoints, distributed, files, live, logs, summary, trainer
from fastbert.training.batches import ShuffledBatches
from fastbert.training.evaluation import Evaluate
from fastbert.training.finetuning_trainer import FinetuningTrainer
from fastbert.training.judging import judged, mixed
from fastbert.training.kernels import CompiledAhead
from fastbert.training.results import described, figures_of, table, write_predictions, write_whole
from fastbert.training.tuning import Training, Tuning, begin, best, configured

RUNS, RESULT, RESULTS, PREDICTIONS = "runs", "result.json", "results.json", "dev-predictions.jsonl"
FEATURES = "features.arrow"


class Finetuning:
    """A run in a folder; under torchrun all processes make one and call it.

    Args:
        dev_share: of the training data that is set aside where the task has no dev data.
        device: None for a GPU if there is one.
        report_to: callbacks of transformers that get the figures, too.

    Raises:
        InputError: naming what cannot be: an option, the data, the checkpoint, a folder of another run.
    """

    def __init__(
        self,
        task: Task,
        tuning: Tuning,
        output: Path,
        *,
        dev_share: float = 0.1,
        device: torch.device | None = None,
        reporters: Sequence[Any] = (),
    ) -> None:
        require("accelerate", "tensorboard", "sklearn", "scipy", "pyarrow", to="fine-tune")
        tuning.check()
        if device is not None and device.type == "cuda" and not torch.cuda.is_available():
            raise InputError("PyTorch sees no GPU here")
        transformers.utils.logging.disable_progress_bar()  # of every file it writes
        self.task, self.tuning, self.output, self._reporters = task, tuning, output, reporters
        self._on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
        distributed.join(self._on_cpu)
        arguments = self._arguments(output, Training(tuning.learning_rates[0], 0), 1, 1)
        self._rank, self._world_size = arguments.process_index, arguments.world_size
        self._device = arguments.device
        self._read(dev_share)

    def _read(self, dev_share: float) -> None:
        task, tuning = self.task, self.tuning
        (train,) = task.read(TRAIN).values()
        self.dev = task.read(DEV)
        self._notes = [words for examples in (train, *self.dev.values()) for words in examples.notes]
        if not any(examples.labelled for examples in self.dev.values()):
            train, dev = held_out(train, dev_share, task.unit)
            self.dev = {DEV: dev}
            self._notes.append(
                f"no dev data was given: {counted(len(dev), 'example')} of the training data are set aside"
            )
        self.train = train
        _check_apart(train, self.dev)
        self.config = configured(task, tuning, task.head_options(train))
        self.tokenizer = task.tokenizer(load_tokenizer(tuning.model))
        model, self._model_notes = begin(task, tuning, self.config, tuning.seeds[0])
        if len(self.tokenizer) > vocabulary_size(model):
            raise InputError(
                f"{tuning.model}: its tokenizer has {len(self.tokenizer):,} tokens, but the model a vocabulary of"
                f" {vocabulary_size(model):,}: it is another's"
            )
        length = length_of(tuning.max_length, task, model, self.tokenizer)
        self.tuning = replace(tuning, max_length=length)
        self._parameters = model.num_parameters()
        self.tokenizing = Tokenizing(self.tokenizer, length, takes_types(model, self.tokenizer), tuning.doc_stride)

    def __call__(self) -> Path:
        """Train, and write the best model to `output/model`.

        Returns:
            The model's folder, for `from_pretrained` of transformers or fastbert.

        Raises:
            InputError: if the folder is another run's, or something cannot be written.
        """
        files.check(self.output, self._saved())
        judges = {name: self.task.judge(examples, self.tokenizing, self.config) for name, examples in self.dev.items()}
        with distributed.rank_zero_first(self._world_size, self._rank):
            if self._rank == 0:
                made = None if self._kept() is not None else self._features()
                files.adopt(self.output, self._saved())
                checkpoints.remove_drafts(self.output)
                if made is not None:
                    made.write(self._arrow, self._made_of())
        features = self._kept()
        assert features is not None
        if self._rank == 0:
            note(f"fine-tuning in {self.output}\n{summary.aligned(self._summary(features, judges))}")
        results = []
        for training in self.tuning.trainings:
            result = read_json(self._folder(training) / RESULT)
            if result is None:
                result = self._train(training, features, judges)
            elif self._rank == 0:  # it may have been killed before that
                _tidy(self._folder(training))
            results.append(result)
            if self._rank == 0:
                self._tell(results)
        return self.output / files.MODEL

    # What it is made of.

    @property
    def _arrow(self) -> Path:
        return self.output / FEATURES

    def _features(self) -> Features:
        return self.task.features(self.train, self.tokenizing, self.config)

    def _kept(self) -> Features | None:
        return Features.read(self._arrow, self._made_of())

    def _made_of(self) -> dict[str, str]:
        """What the features depend on."""
        return {"made_of": _digest(self._saved()["fixed"])}

    def _saved(self) -> dict[str, Any]:
        saved = self.tuning.saved()
        saved["fixed"] |= {
            **self.task.saved(),
            "labels": labels_of(self.config),
            "train": {"name": self.train.name, "examples": len(self.train), "digest": _digest_of(self.train)},
            "dev": {name: {"examples": len(e), "digest": _digest_of(e)} for name, e in self.dev.items()},
        }
        saved["kind"] = "finetuning"
        saved["main"] = self.task.main
        return dict(json.loads(json.dumps(saved)))

    def _folder(self, training: Training) -> Path:
        return self.output / RUNS / training.name

    def _summary(self, features: Features, judges: Mapping[str, Judge]) -> list[tuple[str, str]]:
        tuning, lengths = self.tuning, features.tokens.lengths
        rates = ", ".join(f"{rate:g}" for rate in tuning.learning_rates)
        seeds = ", ".join(map(str, tuning.seeds))
        steps = ShuffledBatches(features, tuning.batch_size, tuning.epochs, 0).steps
        trainings = len(tuning.trainings)
        lines = [
            ("task", f"{self.task.name}: {self._labels()}"),
            ("model", f"{tuning.model}: {self._parameters:,} parameters"),
            *(("", words) for words in self._model_notes),
            ("train", f"{self.train.name}: {counted(len(self.train), 'example')}, {counted(len(lengths), 'sequence')}"
                      f" of {lengths.mean():.0f} tokens, at most {lengths.max():,}"),
            *((DEV if i == 0 else "", f"{self.dev[name].name}: {counted(len(self.dev[name]), 'example')}")
              for i, name in enumerate(judges)),
            *(("", words) for words in self._notes),
            ("steps", f"{counted(steps, 'step')} of {counted(tuning.batch_size, 'example')}, {tuning.epochs:g}"
                      f" epoch{'' if tuning.epochs == 1 else 's'}"
                      + (f"; {trainings} trainings" if trainings > 1 else "")),
            ("learning rate", f"{rates} after a warm-up of {tuning.warmup:.0%}, falling linearly to 0; seed {seeds}"),
            ("device", summary.devices(self._device, self._world_size) + f"; {tuning.dtype}"),
        ]  # fmt: skip
        odd = [*_odd(self.train), *(words for examples in self.dev.values() for words in _odd(examples))]
        cut = features.tokens.cut
        if cut:
            odd.append(f"cut at {tuning.max_length} tokens: {counted(cut, 'sequence')} to train on")
        return [*lines, *(("odd" if i == 0 else "", words) for i, words in enumerate(odd))]

    def _labels(self) -> str:
        names = labels_of(self.config)
        if len(names) == 1:
            return "a number"
        return f"{counted(len(names), 'label')}, {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}"

    # One training.

    def _arguments(self, folder: Path, training: Training, steps: int, an_epoch: int) -> Any:
        tuning = self.tuning
        return trainer.arguments(
            folder,
            self._on_cpu,
            max_steps=steps,
            gradient_accumulation_steps=tuning.accumulation,
            learning_rate=training.learning_rate,
            weight_decay=tuning.weight_decay,
            max_grad_norm=tuning.clip,
            warmup_steps=round(tuning.warmup * steps),
            bf16=tuning.dtype == "bf16",
            save_steps=tuning.save_every or an_epoch,
            logging_steps=tuning.log_every,
            seed=training.seed,
        )

    def _train(self, training: Training, features: Features, judges: Mapping[str, Judge]) -> dict[str, Any]:
        folder, tuning = self._folder(training), self.tuning
        batches = ShuffledBatches(
            features,
            tuning.batch_size,
            tuning.epochs,
            training.seed,
            rank=self._rank,
            world_size=self._world_size,
            accumulation=tuning.accumulation,
        )
        folder.mkdir(parents=True, exist_ok=True)
        with distributed.rank_zero_first(self._world_size, self._rank):
            if self._rank == 0:
                checkpoints.remove_drafts(folder)
        checkpoint = checkpoints.last_checkpoint(folder)
        step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
        if self._rank == 0:
            logs.cut(folder / logs.LOG, -1 if checkpoint is None else step)
            if checkpoint is not None:
                note(f"{training.name}: resumed at step {step:,} of {batches.steps:,}, of {checkpoint.name}")
        model, _ = begin(self.task, tuning, self.config, training.seed)
        arguments = self._arguments(folder, training, batches.steps, batches.steps_an_epoch)
        terminal = live.Terminal(live.of_finetuning(self.task.main), batches.steps)
        scores: dict[str, Scores] = {}

        def evaluate(model: Any) -> dict[str, float]:
            scores.update(self.judge(model, judges))
            return figures_of(scores)

        trains = FinetuningTrainer(
            model=model,
            args=arguments,
            processing_class=self.tokenizer,
            callbacks=[
                CompiledAhead(int(features.tokens.lengths.max()), folder / logs.LOG),
                terminal,
                logs.LogFile(folder / logs.LOG),
                logs.TensorBoard(folder / logs.TENSORBOARD, "finetuning"),
                Evaluate(tuning.eval_every or batches.steps_an_epoch),
                *self._reporters,
            ],
            batches=batches,
            keep=tuning.keep,
            stop=tuning.non_finite_loss == "stop",
            evaluation=evaluate,
        )
        torch.manual_seed((training.seed * 100_003 + self._rank) % 2**63)  # other dropout masks in every process
        if checkpoint is not None:
            trains.load_data_state(checkpoint)
        start = time.perf_counter()
        with contextlib.closing(terminal), trainer.without_words():
            trains.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - start
        trains.save_final(folder / files.MODEL)
        result = {
            "training": training.name,
            **asdict(training),
            "metrics": figures_of(scores),
            "seconds": seconds if checkpoint is None else None,
            "training_seconds": seconds - trains.paused if checkpoint is None else None,
            "steps": batches.steps,
        }
        with distributed.rank_zero_first(self._world_size, self._rank):
            if self._rank == 0:
                self._keep(folder, result, scores)
        return result

    def judge(self, model: Any, judges: Mapping[str, Judge]) -> dict[str, Scores]:
        """Scores of a model on each of these, the same in every process."""
        engine = Engine(getattr(model, "module", model), self.tokenizer, max_length=self.tuning.max_length)
        with mixed(self._device, self.tuning.dtype):
            return {name: judged(engine, judge, self._rank, self._world_size) for name, judge in judges.items()}

    def _keep(self, folder: Path, result: dict[str, Any], scores: Mapping[str, Scores]) -> None:
        """The model, if it is the best so far; then the training is done."""
        done = [r for r in (read_json(self._folder(t) / RESULT) for t in self.tuning.trainings) if r is not None]
        if best([*done, result], self.task.main) == len(done):
            about = {**self.task.saved(), **self.saved_of_model(), "training": result["training"]}
            about["decided"] = dict(next(iter(scores.values())).decided)
            write_json(folder / files.MODEL / FILE, about)
            write_json(self.output / RESULTS, described(scores, result))
            write_predictions(self.output / PREDICTIONS, self.task, self.dev, scores)
            draft = self.output / checkpoints.DRAFTS / files.MODEL
            draft.parent.mkdir(exist_ok=True)
            shutil.rmtree(draft, ignore_errors=True)
            (folder / files.MODEL).rename(draft)
            checkpoints.publish(draft, self.output / files.MODEL)
            checkpoints.remove_drafts(self.output)
        write_json(folder / RESULT, result)
        _tidy(folder)

    def saved_of_model(self) -> dict[str, Any]:
        """What else a tuned model's folder says, for `evaluate` and `predict`."""
        return {"max_length": self.tuning.max_length, "doc_stride": self.tuning.doc_stride, "base": self.tuning.model}

    def write_tests(self) -> None:
        """Predictions of the best model for the task's test data, as they are submitted, in the run's folder.

        Raises:
            InputError: if the task has no test data, or none that is submitted.
        """
        tests = self.task.read(TEST)
        if not tests:
            raise InputError(f"{self.task.name}: there is no test data")
        model = self._best()
        self.task.decided = (read_json(self.output / files.MODEL / FILE) or {}).get("decided", {})
        judges = {name: self.task.judge(examples, self.tokenizing, self.config) for name, examples in tests.items()}
        scores = self.judge(model, judges)
        if self._rank:
            return
        for name, examples in tests.items():
            file, content = self.task.write_test(examples, scores[name])
            write_whole(self.output / file, content)
            note(f"{self.output / file}: predictions of {examples.name}")

    def _best(self) -> Any:
        """The model that was kept."""
        return fastbert.patch(load_model(self.task.auto, str(self.output / files.MODEL), may_miss=())).to(self._device)

    def _tell(self, results: Sequence[dict[str, Any]]) -> None:
        if len(results) < len(self.tuning.trainings):
            return
        chosen = best(results, self.task.main)
        if len(results) > 1:
            note(f"{counted(len(results), 'training')}\n{table(results, chosen)}")
        found = ", ".join(f"{name} {100 * value:.2f}" for name, value in results[chosen]["metrics"].items()
                          if not name.endswith("loss"))  # fmt: skip
        note(f"{self.output / files.MODEL} is the model: on dev {found}")


def _tidy(folder: Path) -> None:
    """Remove what a training that is done does not need."""
    for old in (folder / files.MODEL, *folder.glob("checkpoint-*")):
        shutil.rmtree(old, ignore_errors=True)


def length_of(given: int | None, task: Task, model: Any, tokenizer: Any) -> int:
    """Tokens of a sequence: what is given, or the task's own, or what the model takes where that is less.

    Raises:
        InputError: if the model does not take what is given.
    """
    longest = min(max_tokens(model), tokenizer.model_max_length)
    if given is not None and given > longest:
        raise InputError(f"max_length is {given}, but the model takes at most {longest} tokens")
    return given or min(longest, task.recipe.max_length or longest)


def _check_apart(train: Examples, dev: Mapping[str, Examples]) -> None:
    """Raises: InputError, if a dev file is the training file."""
    for examples in dev.values():
        if _digest_of(examples) == _digest_of(train):
            raise InputError(f"{examples.name} has the very rows of {train.name}: dev data must be other data")


def _digest_of(examples: Examples) -> str:
    return _digest([examples.inputs, examples.labels])


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _odd(examples: Examples) -> list[str]:
    """What was left out, or odd, and where the first of each was."""
    problems = examples.problems
    return [f"{count:,} x {reason}, as {problems.first[reason][0]}" for reason, count in problems.counts.items()]
