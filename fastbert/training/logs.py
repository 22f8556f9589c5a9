"""Where a run's figures go: the terminal, a JSON-lines file, TensorBoard."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastbert.training.checkpoints import LOG as LOG

TENSORBOARD = "tensorboard"
_SHORT = (
    ("loss", "loss", "{:.4f}"),
    ("mlm_loss", "mlm", "{:.4f}"),
    ("mlm_accuracy", "acc", "{:.1%}"),
    ("nsp_loss", "nsp", "{:.4f}"),
    ("nsp_accuracy", "acc", "{:.1%}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "|g|", "{:.2f}"),
    ("left_out", "steps left out", "{}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("mfu", "MFU", "{:.1%}"),
    ("data_wait", "waiting", "{:.1%}"),
    ("peak_memory_gib", "GiB", "{:.2f}"),
)


def cut(path: Path, step: int) -> None:
    """Leave out what a log says of the steps behind `step`: they will be made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that a kill cut off
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_text("".join(kept), encoding="utf-8")
    os.replace(draft, path)


def append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class LogFile(TrainerCallback):
    """A JSON object a line, flushed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        append(self._path, {"step": state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}})


class TensorBoard(TrainerCallback):
    """The same for TensorBoard. What it has of later steps is dropped when a run goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._writer is None or logs is None or "loss" not in logs:
            return
        for name, value in logs.items():
            if isinstance(value, int | float) and name not in ("epoch", "time"):
                self._writer.add_scalar(f"pretraining/{name}", value, state.global_step)
        self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()


class Terminal(TrainerCallback):
    """A line a log on stderr, under a progress bar where that is a terminal."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            shown = sys.stderr.isatty()
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", disable=not shown)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n if not self._bar.disable else 0)

    def close(self) -> None:
        """Of a run that stops, too: what is said of it then has a line of its own."""
        if self._bar is not None:
            self._bar.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is None or logs is None or "loss" not in logs:
            return
        shown = [f"{name} {form.format(logs[key])}" for key, name, form in _SHORT if logs.get(key) is not None]
        tqdm.write(f"step {state.global_step:,}: " + ", ".join(shown), file=sys.stderr)
