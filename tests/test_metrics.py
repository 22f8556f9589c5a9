"""Figures, against scikit-learn and SciPy asked in another way, and cases that are counted by hand."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

import scipy.stats
import sklearn.metrics

from fastbert.tasks import metrics

# True: 3 x 0, 2 x 1, 1 x 2; of those 2, 1 and 0 are found.
TRUE, SAID = np.asarray([0, 0, 0, 1, 1, 2]), np.asarray([0, 0, 1, 1, 0, 0])
SEVERAL = np.asarray([[1, 0, 1], [0, 0, 0], [1, 1, 0], [0, 0, 1]])
SAID_OF_SEVERAL = np.asarray([[1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1]])


def test_by_hand() -> None:
    assert metrics.accuracy(TRUE, SAID) == 0.5
    # Of 0: 2 of 4 said, 2 of 3 true. Of 1: 1 of 2, 1 of 2. Of 2: none.
    assert metrics.f1_average(TRUE, SAID, "macro") == pytest.approx((4 / 7 + 1 / 2 + 0) / 3)
    assert metrics.f1_average(TRUE, SAID, "micro") == 0.5
    assert metrics.confusion(TRUE, SAID, 4).tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert metrics.per_class(TRUE, SAID, ["a", "b", "c", "d"])[:2] == [
        {"class": "a", "precision": 0.5, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7), "count": 3},
        {"class": "b", "precision": 0.5, "recall": 0.5, "f1": 0.5, "count": 2},
    ]
    assert [row["count"] for row in metrics.per_class(TRUE, SAID, ["a", "b", "c", "d"])] == [3, 2, 1, 0]


def test_of_several_labels_by_hand() -> None:
    # Found: 2, 1, 1; said: 2, 2, 1; true: 2, 1, 2.
    assert metrics.f1_average(SEVERAL, SAID_OF_SEVERAL, "micro") == pytest.approx(2 * 4 / (5 + 5))
    assert metrics.f1_average(SEVERAL, SAID_OF_SEVERAL, "macro") == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    rows = metrics.per_class(SEVERAL, SAID_OF_SEVERAL, ["a", "b", "c"])
    assert [(row["precision"], row["recall"], row["count"]) for row in rows] == [(1, 1, 2), (0.5, 1, 1), (1, 0.5, 2)]


def test_roc_auc_by_hand() -> None:
    """The share of pairs of one of each class that are in order; half of one where they are equal."""
    assert metrics.roc_auc(np.asarray([0, 0, 1, 1]), np.asarray([0.1, 0.6, 0.6, 0.9])) == pytest.approx(3.5 / 4)
    scores = np.asarray([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.2, 0.3, 0.5], [0.5, 0.3, 0.2]])
    labels = np.asarray([0, 1, 2, 1])
    each = [sklearn.metrics.roc_auc_score(labels == c, scores[:, c]) for c in range(3)]
    assert metrics.roc_auc(labels, scores) == pytest.approx(np.mean(each))
    labels = np.asarray([0, 1, 0, 1])  # none of class 2: it has no curve
    assert metrics.roc_auc(labels, scores) == pytest.approx(
        np.mean([sklearn.metrics.roc_auc_score(labels == c, scores[:, c]) for c in range(2)])
    )
    assert metrics.roc_auc(SEVERAL, SAID_OF_SEVERAL.astype(float)) == pytest.approx(
        sklearn.metrics.roc_auc_score(SEVERAL, SAID_OF_SEVERAL, average="macro")
    )


def test_against_the_libraries() -> None:
    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(2, size=200), draw.integers(2, size=200)
    TP, FP, FN, TN = ((labels == a) & (predicted == b) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0)))
    tp, fp, fn, tn = (int(which.sum()) for which in (TP, FP, FN, TN))
    assert metrics.f1(labels, predicted) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert metrics.matthews(labels, predicted) == pytest.approx((tp * tn - fp * fn) / root)
    x, y = draw.normal(size=50), draw.normal(size=50)
    assert metrics.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = (scipy.stats.rankdata(values) for values in (x.round(1), y.round(1)))
    assert metrics.spearman(x.round(1), y.round(1)) == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_what_has_no_figure_says_so_quietly() -> None:
    one, some = np.ones(4), np.asarray([1.0, 2.0, 3.0, 4.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for correlation in (metrics.pearson, metrics.spearman):
            assert np.isnan(correlation(one, some))
            assert np.isnan(correlation(some, one))
            assert np.isnan(correlation(some[:1], some[:1]))
        assert metrics.matthews(np.zeros(4, int), np.zeros(4, int)) == 0.0
        assert metrics.matthews(np.zeros(4, int), np.asarray([0, 1, 0, 1])) == 0.0
        assert metrics.f1(np.zeros(4, int), np.zeros(4, int)) == 0.0
        assert np.isnan(metrics.roc_auc(np.zeros(4, int), some))
        assert np.isnan(metrics.roc_auc(np.zeros(2, int), np.ones((2, 1))))
        assert metrics.f1_average(np.zeros((3, 2), int), np.zeros((3, 2), int), "macro") == 0.0
