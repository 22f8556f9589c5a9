"""Losses of all families: transformers' own, that honour gradient accumulation and learn nothing from no labels.

Where nothing has a label, a loss is NaN, as PyTorch's mean of nothing is, and its gradients are zeros.

Dimension key:  B batch   L padded length   V classes
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from fastbert import functional


def cross_entropy(logits: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
    """Of logits (..., V) and labels (...), -100 for none; their sum divided by num_items, or by how many there are."""
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    if num_items is None:
        return F.cross_entropy(logits, labels)
    return functional.divide(F.cross_entropy(logits, labels, reduction="sum"), num_items)


def span_loss(logits_BL: Tensor, positions: Tensor) -> Tensor:
    """Positions outside of the row are left out, as in transformers."""
    outside = logits_BL.shape[1]
    return F.cross_entropy(logits_BL, positions.reshape(-1).clamp(0, outside), ignore_index=outside)


def mean_over_items(mean: Tensor, labels: Tensor, num_items: Tensor | int) -> Tensor:
    """The mean over this batch's labels as a share of the mean over all batches that are accumulated."""
    here = (labels != -100).sum()
    return functional.divide(torch.where(here > 0, mean, 0.0) * here, num_items)


def honour_num_items(stock: type[PreTrainedModel]) -> Callable[..., Any]:
    """A head's forward whose loss is divided by `num_items_in_batch` where that is given.

    transformers' Trainer passes it and then leaves the division by the accumulation steps to the model, but BERT's
    heads ignore it: https://github.com/huggingface/transformers/issues/47688.
    """
    parameters = inspect.signature(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        num_items = kwargs.pop("num_items_in_batch", None)
        if num_items is None:
            return stock.forward(self, *args, **kwargs)
        labels = parameters.bind(self, *args, **kwargs).arguments.get("labels")
        return_dict = kwargs.pop("return_dict", None)
        output = stock.forward(self, *args, **kwargs, return_dict=True)
        if labels is not None:
            output["loss"] = mean_over_items(output.loss, labels, num_items)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    return forward
