"""A training of fastbert's and the same one by transformers' Trainer: what both reach, and the time that both take.

The same first weights, examples, batches and order; transformers' batches are padded to their longest row. Dropout
comes from the same seed by two generators that are not the same, so figures differ by chance. Both models are judged
alike; times are of the training alone.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

import fastbert
from bench.bench_finetuning import padded, rows_of
from bench.record import Run
from fastbert.tasks import registry
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Features
from fastbert.tasks.task import Given, Task
from fastbert.training.batches import ShuffledBatches
from fastbert.training.finetuning import Finetuning
from fastbert.training.frozen import FrozenRun
from fastbert.training.results import figures_of
from fastbert.training.tuning import Tuning, begin

STOCK, OURS = "transformers", "fastbert"


def main(
    task: str,
    given: Given,
    tuning: Tuning,
    results: Path,
    parts: tuple[int | None, int | None],
    dev_share: float,
    layers: str | None,
    data: str,
    command: str,
) -> None:
    """Train both, one after the other, and add what came to a file of results.

    Args:
        parts: so many examples of the training and of the dev data, or all.
        dev_share: of the training examples that is set aside, where there are no dev data.
        layers: the features that a BiLSTM is trained on, which transformers has no training of; None to tune the model.
        data, command: what is to be said of the data, and what was typed.
    """
    made = _some(registry.make(task, given), parts)
    with TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        run = (
            Finetuning(made, tuning, output, dev_share=dev_share)
            if layers is None
            else FrozenRun(made, tuning, output, layers, dev_share=dev_share)
        )
        features = made.features(run.train, run.tokenizing, run.config)
        judges = {name: made.judge(examples, run.tokenizing, run.config) for name, examples in run.dev.items()}
        run()
        ours = json.loads((output / "results.json").read_text())
        theirs, seconds = None, None
        if layers is None:
            model, _ = begin(made, run.tuning, run.config, tuning.seeds[0])
            fastbert.unpatch(model)
            start = time.perf_counter()
            _Stock.train_on(model, features, run.tuning, Path(folder))
            seconds = time.perf_counter() - start
            theirs = figures_of(run.judge(fastbert.patch(model.eval()), judges))
    here = Run.here("cuda" if torch.cuda.is_available() else "cpu", [])
    found = {
        "task": made.name,
        "features": layers,
        "data": data,
        "main": made.main,
        "train": len(run.train),
        "dev": {name: len(examples) for name, examples in run.dev.items()},
        "epochs": tuning.epochs,
        "batch_size": tuning.batch_size,
        "learning_rate": tuning.learning_rates[0],
        "seed": tuning.seeds[0],
        "model": Path(tuning.model).parent.name if Path(tuning.model).exists() else tuning.model,
        "figures": {OURS: ours["metrics"], STOCK: theirs},
        "intervals": ours["splits"][next(iter(run.dev))]["intervals"],
        "seconds": {OURS: ours["training_seconds" if layers is None else "seconds"], STOCK: seconds},
        "machine": here.machine,
        "versions": here.versions,
        "command": command,
        "commit": here.commit,
        "started": here.started,
    }
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))


class _Stock(Trainer):
    """On given batches."""

    batches: Sequence[Sequence[int]]

    def get_train_dataloader(self) -> Any:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=padded)  # type: ignore[arg-type]

    @classmethod
    def train_on(cls, model: Any, features: Features, tuning: Tuning, folder: Path) -> None:
        batches = ShuffledBatches(features, tuning.batch_size, tuning.epochs, tuning.seeds[0])
        arguments = TrainingArguments(
            output_dir=str(folder / "stock"),
            max_steps=batches.steps,
            learning_rate=tuning.learning_rates[0],
            weight_decay=tuning.weight_decay,
            max_grad_norm=tuning.clip,
            warmup_steps=round(tuning.warmup * batches.steps),
            lr_scheduler_type="linear",
            optim="adamw_torch_fused",
            bf16=tuning.dtype == "bf16",
            seed=tuning.seeds[0],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10**9,
            use_cpu=not torch.cuda.is_available(),
        )
        trains = cls(model, arguments, train_dataset=rows_of(features))
        trains.batches = [batches.items(step).tolist() for step in range(batches.steps)]
        for callback in (PrinterCallback, ProgressCallback):
            trains.remove_callback(callback)
        torch.manual_seed(tuning.seeds[0] * 100_003)
        trains.train()


def _some(task: Task, parts: tuple[int | None, int | None]) -> Task:
    """The first examples of each split."""
    read = task.read

    def some(split: str) -> dict[str, Examples]:
        part = parts[split != "train"]
        return {
            name: examples if part is None else examples.select(range(min(part, len(examples))))
            for name, examples in read(split).items()
        }

    task.read = some  # type: ignore[method-assign]
    return task
