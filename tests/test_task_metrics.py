"""Metrics with formulas of their own are scikit-learn's."""

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from sklearn.metrics import f1_score, roc_auc_score

from fastbert.tasks import metrics


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("seed", range(5))
def test_f1(average: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    for size in ((40,), (6,), (30, 4)):  # of few examples some of the classes are not there
        labels, predicted = draw.integers(0, 2 if len(size) > 1 else 5, (2, *size))
        expected = f1_score(labels, predicted, average=average, zero_division=0.0)
        assert metrics.f1_average(labels, predicted, average) == pytest.approx(expected, abs=1e-12)
    none = np.zeros((3, 2), np.int64)
    assert metrics.f1_average(none, none, average) == 0


@pytest.mark.parametrize("seed", range(5))
def test_roc_auc(seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(4), draw.integers(0, 4, 40)])
    scores = draw.integers(1, 6, (44, 4)) / 5  # with ties
    ours = metrics.roc_auc(labels, scores)
    assert ours == pytest.approx(roc_auc_score(np.eye(4)[labels], scores), abs=1e-12)
    assert metrics.roc_auc(np.eye(4, dtype=int)[labels], scores) == pytest.approx(ours, abs=1e-12)
    binary = (labels > 1).astype(int)
    assert metrics.roc_auc(binary, scores[:, 0]) == pytest.approx(roc_auc_score(binary, scores[:, 0]), abs=1e-12)


def test_a_class_that_is_not_there_has_no_roc() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.6, 0.4, 0.0]])
    labels = np.array([0, 1, 0])
    assert metrics.roc_auc(labels, scores) == 1
    assert np.isnan(metrics.roc_auc(np.zeros(3, np.int64), scores[:, 0]))
