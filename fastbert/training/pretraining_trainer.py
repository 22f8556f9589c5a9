"""Pretraining on packed batches: losses of words and of sentence pairs, and evaluation on held-out text."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.data.pretraining import PretrainingBatches
from fastbert.data.store import read_json
from fastbert.training import files, metrics
from fastbert.training.evaluation import Evaluation
from fastbert.training.trainer import RunTrainer


class PretrainingTrainer(RunTrainer):
    """Trains on `PretrainingBatches`.

    The loss is the mean over all labels of an optimiser step, and the mean over all its sentence pairs.

    Args:
        batches: of this process.
        evaluation: on held-out text; the best model is kept. None for none.
        options: of `RunTrainer`.
    """

    _COUNTS = ("labels", "sequences", "tokens", "flops")
    _SUMS = ("loss", "nsp_loss", "nsp_right", "sequences", "right", "looked_at")

    def __init__(
        self, *args: Any, batches: PretrainingBatches, evaluation: Evaluation | None = None, **options: Any
    ) -> None:
        super().__init__(*args, batches=batches, **options)
        self._evaluation = evaluation
        self._pairs = batches.sampling.objective == "mlm+nsp"
        head: Any = self.model
        self._accuracy = metrics.Accuracy(head.cls.predictions)

    def _begin(self) -> None:
        if self._evaluation is not None and self.state.global_step == 0:
            self.evaluate()  # what training begins with

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        step = self.state.global_step + 1
        self._accuracy.armed = step % self.args.logging_steps == 0 or step == self.state.max_steps
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _count(self, batch: Any) -> Sequence[float]:
        lengths, labels = batch["cu_seq_lens_q"].diff(), len(batch["label_rows"])
        flops = metrics.training_flops(self._plain.config, lengths, labels)
        return labels, len(lengths), batch["input_ids"].shape[1], flops

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
        accuracy = self._accuracy.take()
        if accuracy is not None:
            self._step[4:] += accuracy
        return super()._get_grad_norm(model, grad_norm)

    def _figures(self, sums: Mapping[str, float], counts: Mapping[str, float], steps: int) -> dict[str, Any]:
        found = {}
        if steps:
            found["mlm_loss"] = (sums["loss"] - sums["nsp_loss"]) / steps
        if sums["looked_at"]:
            found["mlm_accuracy"] = sums["right"] / sums["looked_at"]
        if steps and self._pairs:
            found["nsp_loss"] = sums["nsp_loss"] / steps
            found["nsp_accuracy"] = sums["nsp_right"] / sums["sequences"]
        return found

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
