"""Where a run's figures go: a JSON-lines file and TensorBoard. The terminal: live.py."""

import json
import os
from pathlib import Path
from typing import Any, TypeGuard

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastbert.training.files import LOG as LOG

TENSORBOARD = "tensorboard"


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


def are_figures(logs: dict[str, Any] | None) -> TypeGuard[dict[str, Any]]:
    """Not what the Trainer says at the end."""
    return logs is not None and ("loss" in logs or is_evaluation(logs))


def is_evaluation(logs: dict[str, Any]) -> bool:
    """Whether figures are of texts that are not trained on."""
    return any(key.startswith("eval_") for key in logs)


class LogLast(TrainerCallback):
    """The last step is logged, too: a run that is shorter than `logging_steps` has figures."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step == state.max_steps


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
        if not are_figures(logs) or not state.is_world_process_zero:
            return
        append(self._path, {"step": state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}})


class TensorBoard(TrainerCallback):
    """The same for TensorBoard. What it has of later steps is dropped when a run goes on."""

    def __init__(self, folder: Path, group: str = "pretraining") -> None:
        self._folder, self._group = folder, group
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
        if self._writer is None or not are_figures(logs):
            return
        for name, value in logs.items():
            if isinstance(value, int | float) and name not in ("epoch", "time"):
                self._writer.add_scalar(f"{self._group}/{name}", value, state.global_step)
        self._writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()
