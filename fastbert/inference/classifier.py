"""Texts, or pairs of texts, to labels, by any model for sequence classification."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.engine import Progress
from fastbert.inference.heads import HeadEngine
from fastbert.inference.tokens import Tokens


@dataclass(frozen=True)
class Label:
    """The label of a text with the best score.

    Attributes:
        scores: of all labels, or of the best `top_k`, best first.
    """

    label: str
    score: float
    scores: dict[str, float]


class Classifier(HeadEngine):
    """Labels of texts, or of pairs of texts, as transformers' text-classification pipeline has them.

    Scores are what the checkpoint's `problem_type` makes of logits: a softmax over the labels; a sigmoid of each, where
    a text may have several or there is one label; nothing for regression.

    Args:
        top_k: how many labels a result's `scores` have; all where it is None.
        options: of `Engine`.

    Raises:
        InputError: if an option is out of range, or the model has another head.
    """

    _auto = AutoModelForSequenceClassification
    _head = "ForSequenceClassification"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        top_k: int | None = None,
        **options: Any,
    ) -> None:
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, but is {top_k}")
        super().__init__(model, tokenizer, **options)
        self.top_k = top_k

    def predict(self, items: Iterable[str] | Iterable[tuple[str, str]]) -> list[Label]:
        """A label for each text or pair of texts, in their order.

        Raises:
            InputError: naming an item that is neither.
        """
        return self.results(self.tokenize(items))

    def results(self, tokens: Tokens, progress: Progress | None = None) -> list[Label]:
        """As `predict`, of tokenised items; `progress` as in `Engine.gather`."""
        names, scored = self.labels, scoring(self.model.config)
        scores_BC = self.gather(tokens, len(names), lambda b: scored(self.model(**b.inputs()).logits.float()), progress)
        best_BK = (-scores_BC).argsort(axis=-1, kind="stable")[:, : self.top_k].tolist()
        labels = []
        for row, best in zip(scores_BC.tolist(), best_BK, strict=True):
            scores = {names[i]: row[i] for i in best}
            labels.append(Label(names[best[0]], row[best[0]], scores))
        return labels


def scoring(config: Any) -> Callable[[Tensor], Tensor]:
    """From logits, (B, C), to scores, as the checkpoint's `problem_type` says."""
    if config.problem_type == "regression":
        return lambda logits: logits
    if config.problem_type == "multi_label_classification" or config.num_labels == 1:
        return torch.sigmoid
    return lambda logits: logits.softmax(-1)
