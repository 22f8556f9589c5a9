"""Texts, and pairs of texts, to a class, to several, or to a number.

Dimension key:  I examples   C classes
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from fastbert.data.documents import Problems
from fastbert.errors import InputError
from fastbert.inference.classifier import scoring
from fastbert.inference.encoding import Encoder
from fastbert.inference.engine import Batch
from fastbert.inference.tokens import Tokens, joined
from fastbert.tasks import metrics
from fastbert.tasks.examples import EMPTY, Examples, is_missing, name_of, read_table
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.scores import Scores
from fastbert.tasks.task import TEST, Given, Judge, Recipe, Task, head_of, labels_of

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
_MOST_CLASSES = 1000
_CHUNK = 1024  # texts tokenised at once
THRESHOLD = 0.5  # of the probability that a text has a label


PROBLEMS = {"classify": SINGLE, "multilabel": MULTI, "regress": REGRESSION}


class SequenceTask(Task):
    """One value for a text or a pair of texts, on the user's own files: "classify", "multilabel" or "regress".

    Classes are those that are in the training data, sorted, where `labels` does not name them.
    """

    kind = "sequence"
    auto = AutoModelForSequenceClassification
    takes = frozenset({"text", "pair", "label", "labels", "separator"})

    def __init__(self, name: str, given: Given, problem_type: str | None = None) -> None:
        super().__init__(name, given)
        self.recipe = Recipe(max_length=None)
        self.problem_type = problem_type or PROBLEMS[name]
        self.columns = {"--text": given.text or "text"} | ({} if given.pair is None else {"--pair": given.pair})
        self._label = given.label or "label"
        self._separator = given.separator or ","
        self._labels = None if given.labels is None else list(given.labels)
        self.main = {SINGLE: "accuracy", MULTI: "f1_micro", REGRESSION: "pearson"}[self.problem_type]

    def read(self, split: str) -> dict[str, Examples]:
        path = self.given.path(split)
        if path is None:
            return {}
        needs_label = split != TEST
        columns = {**self.columns, **({"--label": self._label} if split != TEST else {})}
        return {split: read_table(path, columns, lambda *row: self._row(*row, needs_label=needs_label))}

    def _row(
        self, record: Mapping[str, Any], place: str, problems: Problems, *, needs_label: bool
    ) -> tuple[Any, Any] | None:
        texts = self.texts(record, place, problems)
        value = record.get(self._label)
        if needs_label and is_missing(value) and self.problem_type != MULTI:
            problems.add(f"no label at {self._label!r} (left out)", place)
            return None
        if not all(text.strip() for text in texts):
            problems.add(EMPTY, place)
        label = self._parsed(value, place) if needs_label or self._label in record else None
        return texts[0] if len(texts) == 1 else texts, label

    def _parsed(self, value: Any, place: str) -> Any:
        """A number, a name, or a list of names; None for none."""
        if self.problem_type == MULTI:
            if not isinstance(value, list | tuple | np.ndarray):
                value = [] if is_missing(value) else name_of(value).split(self._separator)
            return [name_of(each) for each in value if not is_missing(each)]
        if is_missing(value):
            return None
        if self.problem_type == SINGLE:
            if isinstance(value, list | dict):
                raise InputError(
                    f"{place}: {self._label!r} must be one label, but is {value!r}: multilabel takes lists"
                )
            return name_of(value)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{place}: {self._label!r} must be a number, but is {value!r}")
        return number

    def head_options(self, train: Examples) -> dict[str, Any]:
        if self.problem_type == REGRESSION:
            return {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}, "problem_type": REGRESSION}
        found = {name for label in train.labels for name in (label if isinstance(label, list) else [label])}
        found.discard(None)
        if self._labels is not None and not 2 <= len(self._labels) == len(set(self._labels)):
            raise InputError(f"--labels must be two names or more, none twice, but is {','.join(self._labels)}")
        names = self._labels or sorted(found, key=_by_number)
        if len(found) < 2 and not (found and self._labels and self.problem_type == MULTI):
            raise InputError(f"{train.name} has {len(found)} labels in {self._label!r}: there is nothing to tell apart")
        if len(found) > _MOST_CLASSES and self._labels is None:
            raise InputError(
                f"{train.name} has {len(found):,} labels in {self._label!r}, as {names[0]!r}: if these are numbers to"
                " predict, that is `finetune regress`; --labels names more classes"
            )
        return head_of(names, self.problem_type)

    def features(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Features:
        labels = {"labels": self._numbers(examples, config)}
        return Features(encode(examples.inputs, tokenizing), labels, np.ones(len(examples), np.int64))

    def judge(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Judge:
        def score(logits_IC: npt.NDArray[np.float32]) -> Scores:
            return self._score(examples, logits_IC, config)

        if examples.labelled:
            self._numbers(examples, config)
        return Judge(encode(examples.inputs, tokenizing), config.num_labels, _logits, score)

    def _numbers(self, examples: Examples, config: Any) -> npt.NDArray[Any]:
        """(I,) int64 or float32, or (I, C) float32, as the head wants labels."""
        if config.problem_type == REGRESSION:
            return np.asarray(examples.labels, np.float32)
        index = {name: i for i, name in enumerate(labels_of(config))}
        for label, place in zip(examples.labels, examples.places, strict=True):
            for name in label if isinstance(label, list) else [label]:
                if name not in index:
                    known = ", ".join(map(repr, list(index)[:10]))
                    raise InputError(f"{place}: the label {name!r} is none of those that the model has: {known}")
        if config.problem_type == MULTI:
            several = np.zeros((len(examples), len(index)), np.float32)
            for i, label in enumerate(examples.labels):
                several[i, [index[name] for name in label]] = 1
            return several
        return np.asarray([index[label] for label in examples.labels], np.int64)

    def _score(self, examples: Examples, logits_IC: npt.NDArray[np.float32], config: Any) -> Scores:
        scores_IC = scoring(config)(torch.from_numpy(logits_IC)).numpy()
        names = labels_of(config)
        predictions = [self._prediction(row, names) for row in scores_IC]
        if not examples.labelled:
            return Scores(lambda rows: {}, len(examples), predictions=predictions)
        labels = self._numbers(examples, config)
        loss = _loss(logits_IC, labels, self.problem_type)
        if self.problem_type == REGRESSION:
            return Scores(self._measure(labels, scores_IC[:, 0]), len(examples), predictions=predictions, loss=loss)
        several = self.problem_type == MULTI
        predicted = (scores_IC >= THRESHOLD).astype(np.int64) if several else scores_IC.argmax(1)
        measure = self._measure(labels.astype(np.int64), predicted, scores_IC)
        return Scores(
            measure,
            len(examples),
            per_class=metrics.per_class(labels.astype(np.int64), predicted, names),
            classes=names,
            confusion=None if several else metrics.confusion(labels, predicted, len(names)),
            predictions=predictions,
            loss=loss,
        )

    def _prediction(self, scores_C: npt.NDArray[np.float32], names: Sequence[str]) -> dict[str, Any]:
        if self.problem_type == REGRESSION:
            return {"score": float(scores_C[0])}
        scores = {name: float(score) for name, score in zip(names, scores_C, strict=True)}
        if self.problem_type == MULTI:
            return {"labels": [name for name, score in scores.items() if score >= THRESHOLD], "scores": scores}
        return {"label": names[int(scores_C.argmax())], "scores": scores}

    def _measure(self, labels: npt.NDArray[Any], predicted: npt.NDArray[Any], scores: Any = None) -> Any:
        """`Scores.measure` of a user's own task."""

        def measure(rows: npt.NDArray[np.int64]) -> dict[str, float]:
            true, ours = labels[rows], predicted[rows]
            if self.problem_type == REGRESSION:
                return {"pearson": metrics.pearson(true, ours), "spearman": metrics.spearman(true, ours)}
            sure = scores[rows, 1] if self.problem_type == SINGLE and scores.shape[1] == 2 else scores[rows]
            exact = (true == ours).all(1) if self.problem_type == MULTI else true == ours
            return {
                "accuracy": float(exact.mean()),
                "f1_macro": metrics.f1_average(true, ours, "macro"),
                "f1_micro": metrics.f1_average(true, ours, "micro"),
                "roc_auc": metrics.roc_auc(true, sure),
            }

        return measure


def encode(inputs: Sequence[Any], tokenizing: Tokenizing) -> Tokens:
    """Texts, or pairs of texts, cut at max_length."""
    encoder = Encoder(tokenizing.tokenizer, tokenizing.max_length, types=tokenizing.types)
    unknown = tokenizing.tokenizer.unk_token_id
    parts = []
    for start in range(0, len(inputs), _CHUNK):
        e = encoder(inputs[start : start + _CHUNK])
        count = 0 if unknown is None else int((e.ids == unknown).sum())
        parts.append(Tokens(e.ids, e.lengths, count, e.types, e.cut))
    return joined(parts)


def _logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch.inputs()).logits
    return logits.float()


def _loss(logits_IC: npt.NDArray[np.float32], labels: npt.NDArray[Any], problem_type: str) -> float:
    """As transformers' heads have it."""
    logits, target = torch.from_numpy(logits_IC), torch.from_numpy(labels)
    losses: dict[str, Callable[..., Tensor]] = {
        SINGLE: torch.nn.functional.cross_entropy,
        MULTI: torch.nn.functional.binary_cross_entropy_with_logits,
        REGRESSION: lambda x, y: torch.nn.functional.mse_loss(x.squeeze(1), y),
    }
    return float(losses[problem_type](logits, target))


def _by_number(name: str) -> tuple[bool, float, str]:
    """2 before 10, and numbers before names."""
    try:
        number = float(name)
    except ValueError:
        number = math.nan
    return not math.isfinite(number), number if math.isfinite(number) else 0.0, name
