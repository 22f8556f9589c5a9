"""Exact match and F1 of SQuAD 1.1 and 2.0, as its evaluations define them.

Source: https://arxiv.org/abs/1606.05250, section 6.1; https://arxiv.org/abs/1806.03822;
https://rajpurkar.github.io/SQuAD-explorer/ (evaluate-v1.1.py, evaluate-v2.0.py).

Dimension key:  I questions
"""

import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.errors import InputError
from fastbert.tasks.squad.data import read_questions
from fastbert.terminal import note

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
_Floats = npt.NDArray[np.float64]


def words(text: str) -> list[str]:
    """Of a text in lower case, without ASCII's punctuation, then without articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def exact_match(predicted: Sequence[str], answer: Sequence[str]) -> float:
    """1 if both have the same words, in the same order, else 0."""
    return float(predicted == answer)


def f1(predicted: Sequence[str], answer: Sequence[str], *, null_matches: bool) -> float:
    """The harmonic mean of precision and recall of words, as bags.

    Args:
        null_matches: whether the F1 of two texts without a word is 1, as in 2.0; in 1.1 it is 0.
    """
    if null_matches and not (predicted and answer):
        return float(predicted == answer)
    common = (Counter(predicted) & Counter(answer)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def grade(predicted: Sequence[str], answers: Sequence[Sequence[str]], *, unanswerable: bool) -> tuple[_Floats, _Floats]:
    """(I,) exact match and (I,) F1 of each prediction with the answer that it is nearest to.

    Args:
        answers: to each question.
        unanswerable: whether there are questions without answer, whose answer is "", as in 2.0; answers without a word
            are none there.
    """
    exact, f1s = np.zeros(len(predicted)), np.zeros(len(predicted))
    for i, (text, texts) in enumerate(zip(predicted, answers, strict=True)):
        ours, known = words(text), [words(answer) for answer in dict.fromkeys(texts)]
        if unanswerable:
            known = [answer for answer in known if answer] or [[]]
        exact[i] = max(exact_match(ours, answer) for answer in known)
        f1s[i] = max(f1(ours, answer, null_matches=unanswerable) for answer in known)
    return exact, f1s


@dataclass(frozen=True, eq=False)
class Graded:
    """Predictions for questions that may have no answer, and how sure it is that they have none.

    Attributes:
        exact, f1: (I,) of what is predicted.
        answerable: (I,) bool, whether the question has an answer.
        blank: (I,) bool, whether "" is predicted.
        odds: (I,) the more, the surer it is that there is no answer: a score of none less that of the best piece.
    """

    exact: _Floats
    f1: _Floats
    answerable: npt.NDArray[np.bool_]
    blank: npt.NDArray[np.bool_]
    odds: _Floats

    def take(self, rows: npt.NDArray[np.int64]) -> "Graded":
        return Graded(self.exact[rows], self.f1[rows], self.answerable[rows], self.blank[rows], self.odds[rows])

    def at(self, threshold: float) -> tuple[_Floats, _Floats]:
        """(I,) exact match and (I,) F1 if "" is predicted wherever the odds are above."""
        none = self.odds > threshold
        return np.where(none, ~self.answerable, self.exact), np.where(none, ~self.answerable, self.f1)

    def best(self, scores: _Floats) -> tuple[float, float]:
        """The best mean of scores, `exact` or `f1`, and the threshold that gives it; 0 where none is answered."""
        order, sums = self._answering(scores)
        answered = int(sums.argmax())
        return float(sums[answered]) / len(order), float(self.odds[order[answered - 1]]) if answered else 0.0

    def tuned(self) -> float:
        """A threshold that has the best F1, for later predictions.

        It lies in the middle between the last odds with an answer and the first without, so that rounding moves no
        question over it.
        """
        order, sums = self._answering(self.f1)
        answered = int(sums.argmax())
        odds = self.odds[order]
        below = odds[answered - 1] if answered else odds[0] - 2
        above = odds[answered] if answered < len(odds) else odds[-1] + 2
        return float((below + above) / 2)

    def _answering(self, scores: _Floats) -> tuple[npt.NDArray[np.int64], _Floats]:
        """Questions by their odds, and the sum of scores if none, one, ... (I + 1,) of them are answered."""
        order = np.argsort(self.odds, kind="stable")
        gains = np.where(self.answerable, scores, np.where(self.blank, 0.0, -1.0))
        return order, np.cumsum([float((~self.answerable).sum()), *gains[order]])


def evaluate(
    predictions: Path | str, data: Path | str, task: str = "squad", null_odds: Path | str | None = None
) -> dict[str, float]:
    """A file of predictions against a data file: what the official evaluation says, figures in percent.

    A question without prediction counts 0 in 1.1; in 2.0, whose evaluation does not take that, it is an error.

    Args:
        predictions: JSON, {id: text}.
        data: as `fastbert finetune squad --data` takes it.
        task: "squad" or "squad2".
        null_odds: of 2.0: JSON, {id: how sure it is that there is no answer}; best thresholds come with it alone.

    Raises:
        InputError: if a file is none of these, or 2.0 lacks a prediction.
    """
    unanswerable = task == "squad2"
    questions = read_questions(data, unanswerable=unanswerable)
    if any(label is None for label in questions.labels):
        raise InputError(f"{questions.name} has questions whose answers are not known")
    said = _by_id(predictions, str)
    missing = [id for id in questions.ids if id not in said]
    if missing and unanswerable:
        raise InputError(f"{predictions} lacks {len(missing):,} of {len(questions):,} questions, as {missing[0]}")
    texts = [said.get(id, "") for id in questions.ids]
    answers = [[answer["text"] for answer in label] for label in questions.labels]
    exact, f1s = grade(texts, answers, unanswerable=unanswerable)
    if not unanswerable:
        if missing:
            note(f"{predictions} lacks {len(missing):,} of {len(questions):,} questions, as {missing[0]}: they count 0")
        there = np.asarray([id in said for id in questions.ids])
        return {"exact_match": 100 * float((exact * there).mean()), "f1": 100 * float((f1s * there).mean())}
    odds = None if null_odds is None else _by_id(null_odds, (int, float))
    if odds is not None and (lost := [id for id in questions.ids if id not in odds]):
        raise InputError(f"{null_odds} lacks {len(lost):,} of {len(questions):,} questions, as {lost[0]}")
    graded = Graded(
        exact,
        f1s,
        np.asarray([bool(label) for label in questions.labels]),
        np.asarray([not text for text in texts]),
        np.zeros(len(texts)) if odds is None else np.asarray([odds[id] for id in questions.ids], float),
    )
    return _official(graded, with_best=odds is not None)


def _official(graded: Graded, *, with_best: bool) -> dict[str, float]:
    exact, f1s = graded.at(1.0)  # na_prob_thresh where nothing else is said
    found: dict[str, float] = {}
    parts = {"": np.ones_like(graded.answerable), "HasAns_": graded.answerable, "NoAns_": ~graded.answerable}
    for prefix, rows in parts.items():
        if rows.any():
            found[f"{prefix}exact"] = 100 * float(exact[rows].mean())
            found[f"{prefix}f1"] = 100 * float(f1s[rows].mean())
            found[f"{prefix}total"] = int(rows.sum())
    if with_best:
        for name in ("exact", "f1"):
            best, threshold = graded.best(getattr(graded, name))
            found |= {f"best_{name}": 100 * best, f"best_{name}_thresh": threshold}
    return found


def _by_id(path: Path | str, kind: Any) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, kind) for value in content.values()):
        what = "text" if kind is str else "number"
        raise InputError(f"{path} must be a JSON object, from each question's id to a {what}")
    return content
