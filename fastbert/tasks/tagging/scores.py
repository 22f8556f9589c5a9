"""How well words are tagged: entities that are found whole, and words whose tag is right.

An entity is right where its type, its first and its last word are. The figures are those of the CoNLL shared tasks'
conlleval, which seqeval gives without a mode; its strict mode counts an entity whose first tag is I- as none.
Source: https://aclanthology.org/W03-0419, https://github.com/chakki-works/seqeval.

Dimension key:  I sentences   C types   N words
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.tasks.tagging.schemes import OUTSIDE, Span, has_scheme, spans

Tags = Sequence[Sequence[str]]
_RIGHT, _PREDICTED, _TRUE = range(3)


def units(tags: Sequence[str], schemed: bool) -> list[Span]:
    """What is counted of a sentence: its entities, or each word where tags are of no scheme."""
    return spans(tags) if schemed else [Span(tag, i, i + 1) for i, tag in enumerate(tags)]


class TagCounts:
    """What is right, predicted and true in each sentence, from which all figures are sums.

    Args:
        true, predicted: the tags of each sentence.
        labels: the model's.

    Attributes:
        types: of entities, or all tags where they are of no scheme.
    """

    def __init__(self, true: Tags, predicted: Tags, labels: Sequence[str]) -> None:
        self.schemed = has_scheme(labels)
        counts: dict[str, list[tuple[int, int]]] = {}
        for i, pair in enumerate(zip(true, predicted, strict=True)):
            ours, theirs = (set(units(tags, self.schemed)) for tags in reversed(pair))
            for which, found in ((_RIGHT, ours & theirs), (_PREDICTED, ours), (_TRUE, theirs)):
                for unit in found:
                    counts.setdefault(unit.type, []).append((i, which))
        known = {unit.type for label in labels for unit in units([label], self.schemed)}
        self.types = sorted(known | counts.keys())
        self._counts_IC3 = np.zeros((len(true), len(self.types), 3), np.int64)
        for c, kind in enumerate(self.types):
            if places := counts.get(kind):
                np.add.at(self._counts_IC3[:, c], tuple(np.asarray(places).T), 1)
        self._units_I3 = self._counts_IC3.sum(1)
        right = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in zip(true, predicted, strict=True)]
        self._words_I2 = np.asarray([right, [len(tags) for tags in true]], np.int64).T

    def measure(self, rows: npt.NDArray[np.int64]) -> dict[str, float]:
        """The figures of these sentences: of entities, if there are any, and the share of words that are right."""
        right, words = self._words_I2[rows].sum(0).tolist()
        accuracy = {"accuracy": right / words if words else 0.0}
        if not self.schemed:
            return accuracy
        precision, recall, f1 = _ratios(self._units_I3[rows].sum(0))
        return {"f1": f1, "precision": precision, "recall": recall, **accuracy}

    def per_type(self) -> list[dict[str, Any]]:
        """Precision, recall, F1 and how many there are, of each type."""
        rows = []
        for kind, counts in zip(self.types, self._counts_IC3.sum(0), strict=True):
            precision, recall, f1 = _ratios(counts)
            rows.append(
                {"class": kind, "precision": precision, "recall": recall, "f1": f1, "count": int(counts[_TRUE])}
            )
        return rows


def confusion(true: Tags, predicted: Tags, labels: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Types, O among them, or tags where they are of no scheme; (C, C), how many words of type i were taken for j."""
    kind: Callable[[str], str] = (lambda tag: tag[2:] or tag) if has_scheme(labels) else str
    classes = list(dict.fromkeys([OUTSIDE] * (OUTSIDE in labels) + [kind(label) for label in labels]))
    index = {name: c for c, name in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), np.int64)
    for ours, theirs in zip(predicted, true, strict=True):
        for a, b in zip(theirs, ours, strict=True):
            if b in labels:  # a word that the model did not see may have none of these
                counts[index[kind(a)], index[kind(b)]] += 1
    return classes, counts


def _ratios(counts: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """Precision, recall and F1; 0 where there is nothing to divide by."""
    right, predicted, true = counts.tolist()
    precision, recall = (right / n if n else 0.0 for n in (predicted, true))
    return precision, recall, 2 * right / (predicted + true) if predicted + true else 0.0
