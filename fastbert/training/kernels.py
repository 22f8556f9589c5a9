"""Kernels that are compiled before a run's first step."""

import contextlib
import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastbert.terminal import note
from fastbert.training import logs
from fastbert.warmup import warm_up


class CompiledAhead(TrainerCallback):
    """Those that sequences of up to max_length need; how many, and how long it took, goes to stderr and to the log."""

    def __init__(self, max_length: int, log: Path) -> None:
        self._max_length = max_length
        self._log = log

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """One process of a machine compiles, and the others read what it wrote; with FSDP all must go at once."""
        assert model is not None
        with contextlib.nullcontext() if isinstance(model, FSDPModule) else args.main_process_first(desc="compiling"):
            done = warm_up(model, training=True, max_length=self._max_length)
        if not done.threads or not state.is_world_process_zero:
            return
        note(str(done))
        record = {"kernels": done.kernels, "compile_seconds": done.seconds, "compile_threads": done.threads}
        logs.append(self._log, {"step": state.global_step, **record, "time": time.time()})
