"""Fine-tuning on packed batches, and evaluation on the task's dev data."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.training.trainer import RunTrainer


class FinetuningTrainer(RunTrainer):
    """Trains on `ShuffledBatches`.

    The loss is what the model's own head makes of the labels: a mean over a step's items, or its labelled tokens.

    Args:
        evaluation: from the model to figures on the dev data, by the names that they have in the log.
        options: of `RunTrainer`.
    """

    _COUNTS = ("weight", "sequences", "tokens")
    _SUMS = ("loss",)
    _BEGIN = "--model"

    def __init__(self, *args: Any, evaluation: Callable[[Any], dict[str, float]], **options: Any) -> None:
        super().__init__(*args, **options)
        self._evaluation = evaluation

    def _count(self, batch: Any) -> Sequence[float]:
        return batch["weight"], len(batch["cu_seq_lens_q"]) - 1, batch["input_ids"].shape[1]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over this batch as its share of the mean over the step's."""
        assert isinstance(num_items_in_batch, Tensor)
        inputs = dict(inputs)
        weight = inputs.pop("weight")
        outputs = model(**inputs)
        share = weight / num_items_in_batch[0].clamp(min=1).to(outputs.loss.dtype)
        loss = outputs.loss * share if weight else torch.nan_to_num(outputs.loss) * 0.0
        self._step[0] += loss.detach()
        loss = loss * self.args.world_size  # gradients are averaged over processes
        return (loss, outputs) if return_outputs else loss

    def _figures(self, sums: Mapping[str, float], counts: Mapping[str, float], steps: int) -> dict[str, Any]:
        return {}

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """On the dev data; figures go to the log."""
        with self._pause():
            self._check_steps()
            found = self._evaluation(self.model)
            self.log({**{f"eval_{name}": value for name, value in found.items()}, "time": time.time()})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """But for the last step's, behind which the model itself is written."""
        if self.state.global_step < self.state.max_steps:
            super()._save_checkpoint(model, trial)
