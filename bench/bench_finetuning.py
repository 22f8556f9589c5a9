"""Fine-tuning from the same checkpoint: some steps and an evaluation, against transformers' own Trainer.

transformers pads to a fixed length, as BERT's own code does, to the longest of a batch, or groups texts by length
before, which changes the order of the batches. All train on the same items, tokenised before; a batch has the recipe's
number of them. An evaluation is what each does after an epoch: transformers' in batches of as many items.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

pytest.importorskip("accelerate", reason="needs accelerate")
pytest.importorskip("pyarrow", reason="needs pyarrow")

from bench import texts
from bench.harness import Bench, Ready
from bench.record import OURS, Work
from fastbert.demo import find_model
from fastbert.inference.encoding import takes_types
from fastbert.inference.engine import Engine
from fastbert.inference.loading import load_tokenizer
from fastbert.tasks import registry
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.task import TRAIN, Given
from fastbert.training import trainer
from fastbert.training.batches import ShuffledBatches
from fastbert.training.finetuning_trainer import FinetuningTrainer
from fastbert.training.judging import judged
from fastbert.training.tuning import Tuning, begin, configured

FIXED, DYNAMIC, GROUPED = "transformers, padded", "transformers, dynamic padding", "transformers, grouped by length"
SEED = 1
LEARNING_RATE = 5e-5
TOLERANCE = 1e-4  # of the first batch's loss
_PADDING = {"input_ids": 0, "token_type_ids": 0, "attention_mask": 0}
_DATA = {"squad": "squad/train-v1.1.json"}  # of the other tasks, GLUE's folder


def case_of(task: str, steps: int, judged: int, S: int, batch: int = 32) -> dict[str, Any]:
    """`steps` of `batch` items, then `judged` items are evaluated.  S: tokens of the longest sequence."""
    return {
        "task": task,
        "model": "MiniLM",
        "steps": steps,
        "batch": batch,
        "judged": judged,
        "S": S,
        "dtype": "float32",
    }


SMALLEST = [case_of("cola", 2, 4, 128, 4)]
CASES = {
    device: [
        case_of("sst2", steps, 256, 128),
        case_of("mrpc", steps, 128, 128),
        case_of("cola", steps, 256, 128),
        case_of("squad", max(2, steps // 4), 32, 384),
    ]
    for device, steps in (("cpu", 5), ("cuda", 100))
}


def test_finetuning(case: dict[str, Any], bench: Bench, tmp_path: Path) -> None:
    if not texts.DATA.is_dir():
        pytest.skip("needs ../shared/data")
    setting = Setting(case, bench.device, tmp_path)
    providers: dict[str, Callable[[], Ready]] = {OURS: setting.ours}
    providers |= {name: partial(setting.stock, name) for name in (FIXED, DYNAMIC, GROUPED)}
    bench.steps("finetuning", case, providers, setting.work)


class Setting:
    """A checkpoint, and what is trained and judged: the same for all."""

    def __init__(self, case: dict[str, Any], device: str, folder: Path) -> None:
        self._case, self._device, self._folder = case, torch.device(device), folder
        name = str(find_model())
        task = registry.make(case["task"], Given(train=str(texts.DATA / _DATA.get(case["task"], "glue"))))
        (examples,) = task.read(TRAIN).values()
        count = case["steps"] * case["batch"]
        rows = np.random.default_rng(SEED).choice(len(examples), count + case["judged"], replace=False)
        train, dev = examples.select(rows[:count]), examples.select(rows[count:])
        tuning = Tuning(name, learning_rates=(LEARNING_RATE,))
        config = configured(task, tuning, task.head_options(examples))
        self._tokenizer = load_tokenizer(name)
        self._model, _ = begin(task, tuning, config, SEED)
        self._theirs = task.auto.from_config(config, dtype=torch.float32)
        self._first = {key: t.clone() for key, t in self._model.state_dict().items()}
        for model in (self._model, self._theirs):
            model.load_state_dict(self._first)
            model.to(self._device)
        tokenizing = Tokenizing(self._tokenizer, case["S"], takes_types(self._model, self._tokenizer))
        self._features = task.features(train, tokenizing, config)
        self._judged = task.features(dev, tokenizing, config)
        self._judge = task.judge(dev, tokenizing, config)
        self._batches = ShuffledBatches(self._features, case["batch"], 1, SEED)
        steps = min(case["steps"], self._batches.steps)
        used = np.concatenate([self._batches.items(step) for step in range(steps)])
        self._steps = steps
        self.work = Work(
            tokens=int(self._features.lengths[used].sum() + self._judged.tokens.lengths.sum()),
            sequences=len(used) + len(self._judged),
        )

    def ours(self) -> Ready:
        def step() -> Any:
            self._model.load_state_dict(self._first)
            engine = Engine(self._model, self._tokenizer, max_length=self._case["S"])
            trains = FinetuningTrainer(
                model=self._model,
                args=trainer.arguments(self._folder, self._on_cpu, save_steps=10**9, **self._options()),
                batches=self._batches,
                keep=1,
                evaluation=lambda _: judged(engine, self._judge).metrics,
            )
            trains.train()
            return trains.evaluate()

        return Ready([step], self._wrong())

    def stock(self, how: str) -> Ready:
        arguments = TrainingArguments(
            output_dir=str(self._folder),
            optim="adamw_torch_fused",
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=self._on_cpu,
            per_device_train_batch_size=self._case["batch"],
            per_device_eval_batch_size=self._case["batch"],
            label_names=list(self._features.labels),
            train_sampling_strategy="group_by_length" if how == GROUPED else "random",
            **self._options(),
        )
        collate = partial(padded, to=self._case["S"] if how == FIXED else None)
        train, dev = rows_of(self._features), rows_of(self._judged)

        def step() -> Any:
            self._theirs.load_state_dict(self._first)
            stock = Trainer(self._theirs, arguments, data_collator=collate, train_dataset=train, eval_dataset=dev)
            for callback in (PrinterCallback, ProgressCallback):
                stock.remove_callback(callback)
            stock.train()
            return stock.evaluate()

        return Ready([step])

    @property
    def _on_cpu(self) -> bool:
        return self._device.type == "cpu"

    def _options(self) -> dict[str, Any]:
        bf16 = not self._on_cpu
        return {"max_steps": self._steps, "learning_rate": LEARNING_RATE, "warmup_steps": 1, "seed": SEED, "bf16": bf16,
                "logging_steps": 10**9}  # fmt: skip

    def _wrong(self) -> str | None:
        """Of the first batch's loss, without dropout, what is off from transformers', which gets each item alone: in
        its loss of spans padding has a share, so that an item's loss depends on the longest of its batch."""
        items, rows = self._batches.items(0), rows_of(self._features)
        batch = {k: v.to(self._device) if isinstance(v, Tensor) else v for k, v in self._features.batch(items).items()}
        alone = [{k: v.to(self._device) for k, v in padded([rows[i]]).items()} for i in items]
        self._model.eval()
        self._theirs.eval()
        with torch.no_grad():
            ours = self._model(**batch).loss
            expected = torch.stack([self._theirs(**row).loss for row in alone]).mean()
        self._model.train()
        self._theirs.train()
        error = float((ours - expected).abs() / expected)
        return None if error <= TOLERANCE else f"loss {ours:.5f}, not {expected:.5f}"


def rows_of(features: Features) -> list[dict[str, Any]]:
    """As transformers' own datasets have them: a dict an item, lists of its sequences in it."""
    tokens, group, rows = features.tokens, features.group, []
    own = [slice(int(start), int(start + length)) for start, length in zip(tokens.starts, tokens.lengths, strict=True)]
    for i in range(len(features)):
        sequences = own[i * group : (i + 1) * group]
        row: dict[str, Any] = {"input_ids": [tokens.ids[it].tolist() for it in sequences]}
        row["attention_mask"] = [[1] * len(ids) for ids in row["input_ids"]]
        if tokens.types is not None:
            row["token_type_ids"] = [tokens.types[it].tolist() for it in sequences]
        for name, values in features.labels.items():
            row[name] = [values[it].tolist() for it in sequences] if features.per_token else values[i].tolist()
        rows.append(row)
    return rows


def padded(rows: list[dict[str, Any]], to: int | None = None) -> dict[str, Tensor]:
    """A batch, padded to the longest sequence, or to a length: (B, S), or (B, C, S) of items with C sequences."""
    longest = to or max(len(ids) for row in rows for ids in row["input_ids"])
    batch = {}
    for name, first in rows[0].items():
        if isinstance(first, list) and isinstance(first[0], list):
            filling = _PADDING.get(name, -100)  # of labels of tokens
            values = [[it + [filling] * (longest - len(it)) for it in row[name]] for row in rows]
            batch[name] = torch.tensor(values).squeeze(1)
        else:
            batch[name] = torch.tensor([row[name] for row in rows])
    return batch
