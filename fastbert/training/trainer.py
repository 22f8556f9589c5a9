"""transformers' Trainer as fastbert's runs have it: packed batches, losses of whole steps, whole checkpoints."""

import abc
import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments

from fastbert.data.store import write_json
from fastbert.errors import InputError
from fastbert.terminal import note
from fastbert.training import checkpoints, files, metrics
from fastbert.training.finite import BEGIN, FiniteSteps, check_weights
from fastbert.training.logs import LogLast


def arguments(output: Path, on_cpu: bool, **options: Any) -> TrainingArguments:
    """Of a run in that folder.

    Raises:
        InputError: if the folder cannot be one.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder")
    if dist.is_initialized():
        options["ddp_backend"] = dist.get_backend()
    made = TrainingArguments(
        output_dir=str(output),
        optim="adamw_torch_fused",
        lr_scheduler_type="linear",
        save_strategy="steps",
        logging_nan_inf_filter=False,  # it waits for the GPU in every step
        ignore_data_skip=True,  # the batches know where they are
        average_tokens_across_devices=False,  # the trainer counts by itself
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        **options,
    )
    if made.n_gpu > 1:
        made._n_gpu = 1  # DataParallel would cut packed batches; torchrun is for several GPUs
    return made


class Batches(Protocol):
    """What a run trains on: this process's own batches, in order."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self, step: int) -> dict[str, int]:
        """Where optimiser step `step` begins."""

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there. Raises: InputError, if it is none that `state_dict` gave."""


class RunTrainer(Trainer, abc.ABC):
    """What training runs share.

    The loss is a mean over a whole optimiser step, of all processes and accumulated batches: how a step is divided
    changes nothing. Nothing is read from a GPU but at logging steps. A step that is not finite changes nothing; a
    checkpoint is there whole or not at all.

    Args:
        batches: of this process.
        keep: checkpoints.
        stop: when a step's loss or gradient is not finite; else such steps are left out.

    Attributes:
        _COUNTS: of batches, what `_count` counts of each; summed over a step, and between logs.
        _SUMS: of finite steps: what `compute_loss` adds to `_step`. The first is the loss.
        _BEGIN: the command's option that names a checkpoint to begin with.
    """

    _COUNTS: ClassVar[Sequence[str]]
    _SUMS: ClassVar[Sequence[str]]
    _BEGIN: ClassVar[str] = BEGIN

    def __init__(self, *args: Any, batches: Batches, keep: int, stop: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loss_is_scaled_for_ga = True
        self._batches = batches
        self._keep = keep
        self._stop = stop
        self._finite = FiniteSteps(self.args.device)
        self._left_out = 0  # steps, until the last log
        self._bad = torch.zeros((), dtype=torch.int64, device=self.args.device)  # since then
        self._run = Path(str(self.args.output_dir))
        self._saving = False
        self._failure: Exception | None = None
        self._window_step: int | None = None
        self.paused = 0.0  # seconds of all that was no training
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(LogLast())

    # What a run has of its own.

    @abc.abstractmethod
    def _count(self, batch: Any) -> Sequence[float]:
        """What a batch has of each of `_COUNTS`."""

    @abc.abstractmethod
    def _figures(self, sums: Mapping[str, float], counts: Mapping[str, float], steps: int) -> dict[str, Any]:
        """What is logged of so many finite steps, besides what all runs log."""

    def _begin(self) -> None:
        """Called before the first step."""

    # What the Trainer asks for.

    def get_train_dataloader(self) -> Any:
        """The batches as they are: they are this process's own already."""
        return self._batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if self._window_step is None:
            self.state.compute_steps(self.args, self.state.max_steps)  # a checkpoint's are those of its own run
            self._begin()
            self._begin_window()
        start = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - start
        return samples

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """(counts,) float64 on the device: `_COUNTS` of the step, over all processes."""
        here = [0.0] * len(self._COUNTS)
        for batch in batch_samples:
            for i, n in enumerate(self._count(batch)):
                here[i] += n
        counts = torch.tensor(here, dtype=torch.float64)
        counts = (counts.pin_memory() if device.type == "cuda" else counts).to(device, non_blocking=True)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        self._counts += counts
        return counts

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not transformers' estimate, which walks all parameters in every step."""
        return 0

    def _prepare_input(self, data: Any) -> Any:
        """To the device, without waiting for it."""
        if isinstance(data, Mapping):
            return {name: self._prepare_input(value) for name, value in data.items()}
        return data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else data

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, between its gradient and its update: the step is looked at here."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if self.args.world_size > 1:
            dist.all_reduce(self._step)
        bad = self._finite.look(self.state.global_step + 1, self._step[0], norm, self.optimizer)
        self._sums += torch.where(bad, 0.0, self._step)
        self._bad += bad
        self._step.zero_()
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._measured()}
            if not math.isfinite(logs.get("grad_norm", 0.0)):  # JSON has no such number
                del logs["grad_norm"]
        super().log(logs, start_time)
        self.state.log_history.clear()  # the run's log has it, and every checkpoint would have it again

    # What is measured between two logs.

    @property
    def _plain(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _begin_window(self) -> None:
        self._counts = torch.zeros(len(self._COUNTS), dtype=torch.float64, device=self.args.device)
        self._step = torch.zeros(len(self._SUMS), dtype=torch.float64, device=self.args.device)
        self._sums = torch.zeros_like(self._step)
        self._bad.zero_()
        self._window_step = self.state.global_step
        self._window_start = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """For what is no training: it counts in no speed."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._paused += seconds
        self.paused += seconds

    def _check_steps(self) -> int:
        """How many steps were left out since the last log. Raises: CommonError, if the run is to stop at one."""
        bad = int(self._bad.item())
        if bad and self._stop:
            raise self._finite.error(self._run, self._BEGIN)
        return bad

    def _measured(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._window_start - self._paused
        bad = self._check_steps()
        sums = dict(zip(self._SUMS, self._sums.tolist(), strict=True))
        counts = dict(zip(self._COUNTS, self._counts.tolist(), strict=True))
        assert self._window_step is not None
        steps = self.state.global_step - self._window_step - bad
        found: dict[str, Any] = {"loss": None}
        if bad:
            self._left_out += bad
            found["left_out"] = bad
        if steps:
            found["loss"] = sums["loss"] / steps
        found |= self._figures(sums, counts, steps)
        found["tokens_per_second"] = counts["tokens"] / seconds
        found["sequences_per_second"] = counts["sequences"] / seconds
        peak = metrics.peak_flops(self.args.device) if self.args.bf16 else None
        if peak is not None and "flops" in counts:
            found["mfu"] = counts["flops"] / seconds / peak / self.args.world_size
        found["data_wait"] = self._waited / seconds
        peak_memory = metrics.peak_memory(self.args.device)
        if peak_memory is not None:
            found["peak_memory_gib"] = peak_memory
        found["time"] = time.time()
        self._begin_window()
        return found

    # Checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run / checkpoints.DRAFTS if self._saving else self._run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Under another name until all processes have written all of it."""
        with self._pause():
            self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        self._check_steps()
        check_weights(model, self.state.global_step, self._run, self.args.world_size, self._BEGIN)
        name = f"checkpoint-{self.state.global_step}"
        draft = self._run / checkpoints.DRAFTS / name
        self._saving = True
        with self._noting_failure():
            super()._save_checkpoint(model, trial)
            if self.is_world_process_zero():
                write_json(draft / checkpoints.STATE, self._batches.state_dict(self.state.global_step))
        self._saving = False
        self._agree(name)
        if self.is_world_process_zero():
            with self._noting_failure():
                checkpoints.publish(draft, self._run / name)
                checkpoints.rotate(self._run, self._keep)
        self._agree(name)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self._noting_failure():
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With FSDP in two: each gathers before process 0 writes, and the others must not be left in the second."""
        if self.is_fsdp_enabled:
            from accelerate.utils import save_fsdp_model, save_fsdp_optimizer

            plugin = self.accelerator.state.fsdp_plugin
            with self._noting_failure():
                save_fsdp_model(plugin, self.accelerator, self.model, output_dir)
            with self._noting_failure():
                save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
            if self.is_world_process_zero() and self.lr_scheduler is not None:
                with self._noting_failure():
                    torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
            return
        with self._noting_failure():
            super()._save_optimizer_and_scheduler(output_dir)

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        """What cannot be written is told in `_agree`, where all processes meet: each library has its own exception."""
        try:
            yield
        except Exception as error:
            self._failure = self._failure or error

    def _agree(self, name: str) -> None:
        """All processes go on, or none. Raises: InputError, if one of them could not write."""
        failure, self._failure = self._failure, None
        failed = torch.tensor(float(failure is not None), device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(failed)
        if failed.item() == 0:
            return
        if self.is_world_process_zero():
            checkpoints.remove_drafts(self._run)
        last = checkpoints.last_checkpoint(self._run)
        reason = "another process failed" if failure is None else checkpoints.why_not_written(failure)
        raise InputError(
            f"cannot write {name} ({reason}); {'there is none before it' if last is None else f'{last} is whole'}"
        ) from failure

    def save_final(self, target: Path) -> None:
        """The model and its tokenizer, whole."""
        left_out = self._left_out + self._check_steps()
        if left_out and self.is_world_process_zero():
            note(f"steps left out, for their loss or gradient was not finite: {left_out:,}")
        self._save_model(target)
        if self.is_world_process_zero():
            checkpoints.remove_drafts(self._run)

    def _save_model(self, target: Path, about: Mapping[str, Any] | None = None) -> None:
        assert isinstance(self.model, nn.Module)
        check_weights(self.model, self.state.global_step, self._run, self.args.world_size, self._BEGIN)
        name = "the model" if about is None else "the best model"
        draft = self._run / checkpoints.DRAFTS / target.name
        self.save_model(str(draft), _internal_call=True)
        self._agree(name)
        if self.is_world_process_zero():
            with self._noting_failure():
                (draft / "training_args.bin").unlink(missing_ok=True)
                if about is not None:
                    write_json(draft / files.EVALUATION, about)
                checkpoints.publish(draft, target)
        self._agree(name)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises: InputError, if weights are lacking, but for tied ones, of which transformers warns: they are one."""
        tied = set(self._plain.all_tied_weights_keys)
        wrong = [name for name in (*load_result.missing_keys, *load_result.unexpected_keys) if name not in tied]
        if wrong:
            raise InputError(f"the checkpoint that the run goes on from is not of this model: {wrong[0]}")

    def load_data_state(self, checkpoint: Path) -> None:
        """Let the batches go on where the checkpoint's next step begins."""
        try:
            state = json.loads((checkpoint / checkpoints.STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{checkpoint / checkpoints.STATE} cannot be read: {error}") from error
        self._batches.load_state_dict(state)


@contextlib.contextmanager
def without_words() -> Iterator[None]:
    """Of the Trainer on what is in order: a run whose model alone is to be written, or that saves more often now."""

    def matters(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        return not any(words in said for words in ("not to be a single sample", "the ones in the `trainer_state.json`"))

    loggers = [logging.getLogger(f"transformers.{module}") for module in ("trainer", "trainer_utils")]
    for logger in loggers:
        logger.addFilter(matters)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(matters)
