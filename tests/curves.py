"""Loss curves of transformers' Trainer, for models to be compared by."""

import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments


def losses(model: nn.Module, features: list[Any], collator: Any, folder: Path, **arguments: Any) -> list[float]:
    """Of each step, on a CPU; the same batches in the same order whatever the accumulation."""
    arguments = {
        "output_dir": str(folder / "run"),
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "seed": 1,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "disable_tqdm": True,
        **arguments,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=features, data_collator=collator)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
