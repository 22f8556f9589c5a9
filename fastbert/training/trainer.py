"""transformers' Trainer for pretraining on packed batches: losses of whole steps, exact resume, whole checkpoints."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from fastbert.data.pretraining import PretrainingBatches
from fastbert.data.store import read_json, write_json
from fastbert.errors import InputError
from fastbert.terminal import note
from fastbert.training import checkpoints, files, metrics
from fastbert.training.evaluation import Evaluation
from fastbert.training.finite import FiniteSteps, check_weights

_COUNTS = ("labels", "sequences", "tokens", "flops")
_SUMS = ("loss", "nsp_loss", "nsp_right", "sequences", "right", "looked_at")  # of finite steps


class PretrainingTrainer(Trainer):
    """Trains on `PretrainingBatches`.

    The loss is the mean over all labels of an optimiser step, of all processes and accumulated batches, and the mean
    over all its sentence pairs: how a step is divided changes nothing. Nothing is read from a GPU but at logging steps.

    Args:
        batches: of this process.
        keep: checkpoints.
        stop: when a step's loss or gradient is not finite; else such steps are left out.
        evaluation: on held-out text; the best model is kept. None for none.
    """

    def __init__(
        self,
        *args: Any,
        batches: PretrainingBatches,
        keep: int,
        stop: bool = True,
        evaluation: Evaluation | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._evaluation = evaluation
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
        self._pairs = batches.sampling.objective == "mlm+nsp"
        head: Any = self.model
        self._accuracy = metrics.Accuracy(head.cls.predictions)
        self._window_step: int | None = None

    # What the Trainer asks for.

    def get_train_dataloader(self) -> Any:
        """The batches as they are: they are this process's own already."""
        return self._batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if self._window_step is None:
            self.state.compute_steps(self.args, self.state.max_steps)  # a checkpoint's are those of its own run
            if self._evaluation is not None and self.state.global_step == 0:
                self.evaluate()  # what training begins with
            self._begin_window()
        start = time.perf_counter()
        self._accuracy.armed = (self.state.global_step + 1) % self.args.logging_steps == 0
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - start
        return samples

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """(4,) float64 on the device: labels, sequences, tokens and FLOP of the step, over all processes."""
        here = [0.0] * len(_COUNTS)
        for batch in batch_samples:
            lengths, labels = batch["cu_seq_lens_q"].diff(), len(batch["label_rows"])
            flops = metrics.training_flops(self._config, lengths, labels)
            for i, n in enumerate((labels, len(lengths), batch["input_ids"].shape[1], flops)):
                here[i] += n
        counts = torch.tensor(here, dtype=torch.float64)
        counts = (counts.pin_memory() if device.type == "cuda" else counts).to(device, non_blocking=True)
        if self.args.world_size > 1:
            dist.all_reduce(counts)
        self._counts += counts
        return counts

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not transformers' estimate, which walks all parameters in every step: `metrics.training_flops` counts."""
        return 0

    def _prepare_input(self, data: Any) -> Any:
        """To the device, without waiting for it."""
        if isinstance(data, Mapping):
            return {name: self._prepare_input(value) for name, value in data.items()}
        return data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else data

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert isinstance(num_items_in_batch, Tensor)
        labels, sequences = num_items_in_batch[:2].float().clamp(min=1)  # without a label, that loss is 0
        divisors = {"num_items_in_batch": labels}
        if self._pairs:
            divisors["num_sequences_in_batch"] = sequences
        outputs = model(**inputs, **divisors)
        loss = outputs.loss
        with torch.no_grad():
            self._step[0] += loss.detach()
            if self._pairs:
                logits, answers = outputs.seq_relationship_logits.float(), inputs["next_sentence_label"]
                self._step[1] += F.cross_entropy(logits, answers, reduction="sum") / sequences
                self._step[2] += (logits.argmax(-1) == answers).sum()
                self._step[3] += len(answers)
        loss = loss * self.args.world_size  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once a step, between its gradient and its update: the step is looked at here."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        accuracy = self._accuracy.take()
        if accuracy is not None:
            self._step[4:] += accuracy
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

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """On held-out text; the model is kept if none before was better there."""
        assert self._evaluation is not None
        assert isinstance(self.model, nn.Module)
        start = time.perf_counter()
        step = self.state.global_step
        if step:
            self._check_steps()
        found = self._evaluation(self.model)
        about = {"sequences": self._evaluation.sequences, "max_length": self._evaluation.max_length}
        before = read_json(self._run / files.BEST / files.EVALUATION) or {}
        known = all(before.get(name) == value for name, value in about.items())
        loss = found["eval_mlm_loss"]
        if step and (not known or loss < before["eval_mlm_loss"]):
            self._save_model(self._run / files.BEST, {"step": step, **about, **found})
        self.log({**found, "time": time.time()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        if step:
            self._paused += time.perf_counter() - start
        return found

    # What is measured between two logs.

    @property
    def _config(self) -> Any:
        return self._plain.config

    @property
    def _plain(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _begin_window(self) -> None:
        self._counts = torch.zeros(len(_COUNTS), dtype=torch.float64, device=self.args.device)
        self._step = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.args.device)
        self._sums = torch.zeros_like(self._step)
        self._bad.zero_()
        self._window_step = self.state.global_step
        self._window_start = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0

    def _check_steps(self) -> int:
        """How many steps were left out since the last log. Raises: CommonError, if the run is to stop at one."""
        bad = int(self._bad.item())
        if bad and self._stop:
            raise self._finite.error(self._run)
        return bad

    def _measured(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._window_start - self._paused
        bad = self._check_steps()
        loss, nsp_loss, nsp_right, sequences, right, looked_at = self._sums.tolist()
        counts = dict(zip(_COUNTS, self._counts.tolist(), strict=True))
        assert self._window_step is not None
        steps = self.state.global_step - self._window_step - bad
        found: dict[str, Any] = {"loss": None}
        if bad:
            self._left_out += bad
            found["left_out"] = bad
        if steps:
            found |= {"loss": loss / steps, "mlm_loss": (loss - nsp_loss) / steps}
        if looked_at:
            found["mlm_accuracy"] = right / looked_at
        if steps and self._pairs:
            found["nsp_loss"] = nsp_loss / steps
            found["nsp_accuracy"] = nsp_right / sequences
        found["tokens_per_second"] = counts["tokens"] / seconds
        found["sequences_per_second"] = counts["sequences"] / seconds
        peak = metrics.peak_flops(self.args.device) if self.args.bf16 else None
        if peak is not None:
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
        start = time.perf_counter()
        self._check_steps()
        check_weights(model, self.state.global_step, self._run, self.args.world_size)
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
        self._paused += time.perf_counter() - start

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
        check_weights(self.model, self.state.global_step, self._run, self.args.world_size)
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
