"""Metrics by scikit-learn and SciPy, as GLUE defines them: https://gluebenchmark.com, https://arxiv.org/abs/1804.07461."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[Any]


def accuracy(labels: Numbers, predicted: Numbers) -> float:
    return float(np.mean(labels == predicted))


def matthews(labels: Numbers, predicted: Numbers) -> float:
    """Matthews' correlation; 0 where all are of one class."""
    from sklearn.metrics import matthews_corrcoef

    with _silent():
        return float(matthews_corrcoef(labels, predicted))


def f1(labels: Numbers, predicted: Numbers) -> float:
    """Of class 1 among 0 and 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def f1_average(labels: Numbers, predicted: Numbers, average: str) -> float:
    """Of classes, (n,), or of 0 and 1 for each, (n, C); as scikit-learn's f1_score, for intervals ask a thousand times.

    A class's F1 is 2 x hits / (true + predicted). Source: van Rijsbergen, 1979, Information Retrieval, chapter 7.

    Args:
        average: "macro", over the classes that are there or were predicted, or over all C; "micro", over all decisions.
    """
    if labels.ndim == 1:
        size = int(max(labels.max(), predicted.max())) + 1
        hits = np.bincount(labels[labels == predicted], minlength=size)
        said = np.bincount(labels, minlength=size) + np.bincount(predicted, minlength=size)
        hits, said = hits[said > 0], said[said > 0]
    else:
        hits, said = (labels * predicted).sum(0), labels.sum(0) + predicted.sum(0)
    if average == "micro":
        hits, said = hits.sum(keepdims=True), said.sum(keepdims=True)
    return float(np.mean(2 * hits / np.maximum(said, 1)))


def roc_auc(labels: Numbers, scores: Numbers) -> float:
    """Of two classes, scores of class 1, (n,); of several, (n, C), the mean of each against the rest.

    As scikit-learn's roc_auc_score, for intervals ask a thousand times; NaN where only one class is. By ranks, the
    share of pairs that are in order. Source: Hanley and McNeil, 1982, https://doi.org/10.1148/radiology.143.1.7063747.
    """
    from scipy.stats import rankdata

    if scores.ndim == 1:
        labels, scores = labels[:, None], scores[:, None]
    true = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(scores.shape[1])
    count, others = true.sum(0), (~true).sum(0)
    known = (count > 0) & (others > 0)
    if not known.any():
        return float("nan")
    count, others, true = count[known], others[known], true[:, known]
    ranks = rankdata(scores[:, known], axis=0)
    return float(np.mean(((ranks * true).sum(0) - count * (count + 1) / 2) / (count * others)))


def pearson(labels: Numbers, predicted: Numbers) -> float:
    """NaN where one of them is constant."""
    from scipy.stats import pearsonr

    with _silent():
        return float(pearsonr(labels, predicted).statistic) if len(labels) > 1 else float("nan")


def spearman(labels: Numbers, predicted: Numbers) -> float:
    """NaN where one of them is constant."""
    from scipy.stats import spearmanr

    with _silent():
        return float(spearmanr(labels, predicted).statistic) if len(labels) > 1 else float("nan")


def per_class(labels: Numbers, predicted: Numbers, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and how many there are, of each class; (n,) of classes, or (n, C) of 0 and 1."""
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(labels, predicted, labels=range(len(names)), zero_division=0.0)
    keys = ("precision", "recall", "f1", "count")
    return [
        {"class": name, **dict(zip(keys, (float(p), float(r), float(f), int(n)), strict=True))}
        for name, p, r, f, n in zip(names, *columns, strict=True)
    ]


def confusion(labels: Numbers, predicted: Numbers, classes: int) -> npt.NDArray[np.int64]:
    """(classes, classes): how many of class i were taken for j."""
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes)
    return counts.reshape(classes, classes)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Of constant input, what comes says it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
