"""SQuAD 1.1 and 2.0: the piece of a passage that answers a question, or that there is none.

Source: https://arxiv.org/abs/1810.04805, sections 4.2 and 4.3, and its code, run_squad.py. Like there, a window that
has not the whole answer points to [CLS], in 1.1 too. Unlike there, `doc_stride` is what two windows have in common, as
transformers' examples have it, and not how far one is from the next.

Dimension key:  I questions   W windows   T tokens
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoModelForQuestionAnswering

from fastbert.data.datasets import PREFIX, Dataset, is_saved
from fastbert.errors import InputError
from fastbert.inference.spans import Answer, Found, Reading, null_tokens, span_logits
from fastbert.inference.windows import Windower, Windows
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.predicting import of_answer
from fastbert.tasks.scores import Scores
from fastbert.tasks.squad import metric as squad_metric
from fastbert.tasks.squad.data import read_questions, stands
from fastbert.tasks.squad.metric import Graded
from fastbert.tasks.task import DEV, TRAIN, Given, Judge, Recipe, Task

LONGEST_ANSWER, LONGEST_QUESTION = 30, 64  # tokens
NULL_ODDS, THRESHOLD = ".null-odds.json", "null_threshold"
RECIPES = {
    "squad": Recipe(epochs=3, batch_size=32, learning_rate=5e-5, max_length=384),
    "squad2": Recipe(epochs=2, batch_size=48, learning_rate=5e-5, max_length=384),
}
_Floats = npt.NDArray[np.float64]
_Measure = Callable[[npt.NDArray[np.int64]], dict[str, float]]
_VERSIONS = {"squad": "1.1", "squad2": "2.0"}


class SquadTask(Task):
    """One of them: "squad" is 1.1, "squad2" 2.0, where a question may have no answer.

    Its data are files, as `read_questions` takes them; a folder with the official ones; or dataset:NAME.
    """

    kind = "span"
    auto = AutoModelForQuestionAnswering
    takes = frozenset({"question", "passage"})
    main = "f1"

    def __init__(self, name: str, given: Given) -> None:
        super().__init__(name, given)
        self.recipe = RECIPES[name]
        self.columns = {"--question": given.question or "question", "--passage": given.passage or "context"}
        self._unanswerable = name == "squad2"

    # Its data.

    def read(self, split: str) -> dict[str, Examples]:
        path = self._path(split)
        if path is None:
            return {}
        return {split: read_questions(path, unanswerable=self._unanswerable, train=split == TRAIN)}

    def unit(self, item: Any) -> Any:
        """The passage: another question on it has its answer nearby."""
        return item[1]

    def _path(self, split: str) -> str | None:
        """What is given, or, where a folder or a whole dataset is, its split."""
        given = self.given.path(split)
        place = given or (self.given.train if split == DEV else None)
        if place is None:
            return None
        if place.startswith(PREFIX):
            dataset = Dataset.parse(place)
            one = dataset.split is not None or (Path(dataset.place) / "state.json").is_file()  # a split, saved alone
            return given if one else f"{place}:{'validation' if split == DEV else split}"
        if Path(place).is_dir():
            if is_saved(Path(place)):
                raise InputError(f"{place} is a saved dataset: give {PREFIX}{place}")
            path = Path(place) / f"{split}-v{_VERSIONS[self.name]}.json"
            return str(path) if given or path.exists() else None
        return given

    # What is learnt.

    def head_options(self, train: Examples) -> dict[str, Any]:
        names = ("start", "end")
        return {
            "num_labels": 2,
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": None,
        }

    def features(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Features:
        """A window an item."""
        windows = self._windows(examples, tokenizing)
        positions_W2, has_W, known_W = _positions(windows, examples, tokenizing.tokenizer.cls_token_id)
        problems = examples.problems
        if windows.cut:
            reason = f"a question of more than {LONGEST_QUESTION} tokens, or half a window (cut)"
            problems.update({reason: windows.cut}, {reason: [examples.name]})
        answered = np.asarray([bool(label) for label in examples.labels])
        answered[windows.text_of[has_W]] = False
        unknown = np.unique(windows.text_of[~known_W])
        for i in np.flatnonzero(answered):
            lost = "an answer without a token (left out)" if i in unknown else "an answer longer than a window ([CLS])"
            problems.add(lost, examples.places[i])
        kept = np.flatnonzero(known_W)
        starts, ends = (np.ascontiguousarray(column) for column in positions_W2[kept].T)
        tokens = replace(windows.select(kept), unknown=windows.unknown)
        return Features(tokens, {"start_positions": starts, "end_positions": ends}, np.ones(len(kept), np.int64))

    def _windows(self, examples: Examples, tokenizing: Tokenizing) -> Windows:
        tokenizer = tokenizing.tokenizer
        windower = Windower(tokenizer, pairs=True, types=tokenizing.types, needed_by=self.name)

        def unknown(ids: npt.NDArray[np.int32]) -> int:
            return 0 if tokenizer.unk_token_id is None else int((ids == tokenizer.unk_token_id).sum())

        return windower.of_pairs(
            examples.inputs,
            tokenizing.max_length,
            tokenizing.doc_stride,
            longest_question=LONGEST_QUESTION,
            unknown=unknown,
        )

    # How it is judged.

    def judge(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Judge:
        windows, cls_id = self._windows(examples, tokenizing), tokenizing.tokenizer.cls_token_id

        def score(logits_T2: npt.NDArray[np.float32]) -> Scores:
            return self._score(examples, windows, cls_id, logits_T2)

        return Judge(windows, 2, span_logits, score, per_token=True)

    def _score(
        self, examples: Examples, windows: Windows, cls_id: int | None, logits_T2: npt.NDArray[np.float32]
    ) -> Scores:
        reading = Reading(LONGEST_ANSWER, null=self._unanswerable, summed=True)
        found = reading.spans(logits_T2, windows, cls_id)
        graded = self._graded(examples, found) if self._unanswerable and examples.labelled else None
        threshold = float(self.decided.get(THRESHOLD, 0.0 if graded is None else graded.tuned()))
        reading = replace(reading, threshold=threshold)
        predictions = [self._prediction(reading.ranked(each), each) for each in found]
        if not examples.labelled:
            return Scores(lambda rows: {}, len(examples), unit="question", predictions=predictions)
        exact, f1 = self._grade(examples, [prediction["answer"] for prediction in predictions])
        return Scores(
            _measure(exact, f1) if graded is None else _measure_both(exact, f1, graded),
            len(examples),
            unit="question",
            predictions=predictions,
            loss=_loss(logits_T2, windows, examples, cls_id),
            decided={} if graded is None else {THRESHOLD: threshold},
        )

    def _graded(self, examples: Examples, found: Sequence[Found]) -> Graded:
        """Of the best pieces, whatever the threshold."""
        texts = [each.best for each in found]
        return Graded(
            *self._grade(examples, texts),
            np.asarray([bool(label) for label in examples.labels]),
            np.asarray([not text for text in texts]),
            np.asarray([each.odds for each in found]),
        )

    def _grade(self, examples: Examples, texts: Sequence[str]) -> tuple[_Floats, _Floats]:
        answers = [[answer["text"] for answer in label] for label in examples.labels]
        return squad_metric.grade(texts, answers, unanswerable=self._unanswerable)

    def _prediction(self, ranked: Sequence[Answer], found: Found) -> dict[str, Any]:
        """As `predict` has it, with the score of no answer, `Found.odds`, and the other answers."""
        none = {"null_score": found.null, "null_odds": found.odds} if self._unanswerable else {}
        return {**of_answer(ranked[0]), **none, "n_best": [of_answer(answer) for answer in ranked]}

    # What is kept, for predictions and for the official evaluation.

    def engine_options(self, about: Mapping[str, Any], config: Any) -> dict[str, Any]:
        return {
            "doc_stride": about["doc_stride"],
            "max_question_length": LONGEST_QUESTION,
            "max_answer_length": LONGEST_ANSWER,
            "align_to_words": False,
            "summed": True,
            "handle_impossible_answer": self._unanswerable,
            "null_threshold": float(self.decided.get(THRESHOLD, 0.0)),
        }

    def official(self, examples: Examples, scores: Scores) -> dict[str, str]:
        """The answers, {id: text}, and of 2.0 by how much no answer has more than the best piece."""
        names = {".json": "answer", **({NULL_ODDS: "null_odds"} if self._unanswerable else {})}
        return {
            ending: json.dumps(
                {id: said[name] for id, said in zip(examples.ids, scores.predictions, strict=True)}, ensure_ascii=False
            )
            + "\n"
            for ending, name in names.items()
        }

    def write_test(self, examples: Examples, scores: Scores) -> tuple[str, str]:
        return "predictions.json", self.official(examples, scores)[".json"]


def _measure(exact: _Floats, f1: _Floats) -> _Measure:
    """As the evaluation of 1.1 names them."""
    return lambda rows: {"exact_match": float(exact[rows].mean()), "f1": float(f1[rows].mean())}


def _measure_both(exact: _Floats, f1: _Floats, graded: Graded) -> _Measure:
    """As the evaluation of 2.0 names them: of all, of those with and without an answer, and with the best thresholds.

    NaN for a part that a draw has none of.

    Args:
        exact, f1: (I,) of what is predicted.
        graded: the best pieces.
    """
    order = np.argsort(graded.odds, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ordered, exact, f1 = graded.take(order), exact[order], f1[order]  # a draw's ranks in order are its odds in order
    parts: dict[str, npt.NDArray[np.bool_]] = {"": np.ones_like(ordered.answerable)}
    parts |= {"HasAns_": ordered.answerable} if ordered.answerable.any() else {}
    parts |= {"NoAns_": ~ordered.answerable} if not ordered.answerable.all() else {}

    def measure(rows: npt.NDArray[np.int64]) -> dict[str, float]:
        ranks = np.sort(rank[rows])
        figures = {}
        for prefix, part in parts.items():
            some = ranks[part[ranks]]
            for name, scores in (("exact", exact), ("f1", f1)):
                figures[f"{prefix}{name}"] = float(scores[some].mean()) if len(some) else math.nan
        drawn = ordered.take(ranks)
        return {**figures, **{f"best_{name}": drawn.best(getattr(drawn, name))[0] for name in ("exact", "f1")}}

    return measure


def _positions(
    windows: Windows, examples: Examples, cls_id: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Where the answer of each window's question is: of several the first one that stands where it is said to.

    Returns:
        (W, 2) first and last token, counted in the window, of [CLS] where the window has not the whole answer; (W,)
        whether it has; (W,) whether the answer is known, or it is known that there is none.
    """
    spans_I2 = np.full((len(examples), 2), -1, np.int32)  # in characters, without blanks around
    for i, ((_, passage), label) in enumerate(zip(examples.inputs, examples.labels, strict=True)):
        for answer in label or ():
            if stands(answer, passage):
                text, start = answer["text"], answer["answer_start"]
                spans_I2[i] = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
                break
    window_T = np.repeat(np.arange(len(windows.lengths), dtype=np.int32), windows.lengths)
    begin_W, end_W = spans_I2[windows.text_of].T
    inside_T = (windows.offsets[:, 1] > begin_W[window_T]) & (windows.offsets[:, 0] < end_W[window_T])
    hits = np.flatnonzero(windows.read & inside_T)

    # Its tokens among those of the passage: a window has all of them, or a neighbour of it has the others.
    read = np.flatnonzero(windows.read)
    first_W = np.append(read, 0)[np.searchsorted(window_T[read], np.arange(len(windows.lengths)))]
    window = window_T[hits]
    number, text = windows.begins[window] + hits - first_W[window], windows.text_of[window]
    first_I, last_I = np.full(len(examples), len(windows.ids)), np.full(len(examples), -1)
    np.minimum.at(first_I, text, number)
    np.maximum.at(last_I, text, number)

    starts = windows.starts
    at_cls = null_tokens(windows, cls_id) - starts
    positions_W2 = np.stack([at_cls, at_cls], 1)
    has_W = np.zeros(len(windows.lengths), bool)
    begins = np.flatnonzero(np.diff(window, prepend=-1))
    for first, last in zip(begins, np.append(begins[1:], len(hits)) - 1, strict=True):
        if number[first] == first_I[text[first]] and number[last] == last_I[text[last]]:
            w = window[first]
            has_W[w] = True
            positions_W2[w] = hits[first] - starts[w], hits[last] - starts[w]
    lost_I = np.asarray([bool(label) for label in examples.labels]) & (last_I < 0)
    return positions_W2, has_W, ~lost_I[windows.text_of]


def _loss(logits_T2: npt.NDArray[np.float32], windows: Windows, examples: Examples, cls_id: int | None) -> float | None:
    """As transformers' heads have it, over windows whose answer is known."""
    positions_W2, _, known_W = _positions(windows, examples, cls_id)
    starts = windows.starts
    of_all_W2 = np.logaddexp.reduceat(logits_T2, starts, axis=0)
    of_true_W2 = np.stack([logits_T2[starts + positions_W2[:, i], i] for i in range(2)], 1)
    return float((of_all_W2 - of_true_W2)[known_W].mean()) if known_W.any() else None
