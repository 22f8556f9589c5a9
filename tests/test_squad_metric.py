"""SQuAD's metrics: every case of the definition by hand, and files scored as the official evaluations score them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.errors import InputError
from fastbert.tasks.squad.metric import Graded, evaluate, exact_match, f1, grade, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Denver\tBroncos ", "denver broncos"),
        ("a an the", ""),
        ("An apple, a day.", "apple day"),
        ("theatre an-d", "theatre and"),  # articles are words; punctuation goes first, and leaves no blank
        ("the-cat", "thecat"),
        ("a.b", "ab"),
        ("$1,000.50", "100050"),
        ("U.S.A.", "usa"),
        ("«Éa» — ÀN", "«éa» — àn"),  # only ASCII's punctuation goes; letters keep their accents
        ("x\u00a0the\u3000y", "x y"),  # blanks of all kinds
        ("A`s", "as"),
        ("", ""),
        ("?!", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert words(text) == expected.split()


@pytest.mark.parametrize(
    ("predicted", "answer", "exact", "expected"),
    [
        ("the cat sat", "Cat sat.", 1, 1),
        ("big cat", "cat", 0, 2 * (1 / 2) * 1 / (1 / 2 + 1)),
        ("cat cat dog", "cat", 0, 2 * (1 / 3) * 1 / (1 / 3 + 1)),  # as bags: one of the two cats counts
        ("cat cat", "cat cat dog dog", 0, 2 * 1 * 0.5 / 1.5),
        ("dog", "cat", 0, 0),
        ("", "cat", 0, 0),
        ("the", "cat", 0, 0),
        ("naïve café", "NAÏVE café!", 1, 1),
        ("naive", "naïve", 0, 0),
    ],
)
@pytest.mark.parametrize("null_matches", [False, True])
def test_exact_match_and_f1(predicted: str, answer: str, exact: int, expected: float, null_matches: bool) -> None:
    ours, theirs = words(predicted), words(answer)
    assert exact_match(ours, theirs) == exact
    assert f1(ours, theirs, null_matches=null_matches) == pytest.approx(expected)


def test_two_texts_without_a_word_match_in_one_version_only() -> None:
    for unanswerable in (False, True):
        exact, f1s = grade(["the"], [["."]], unanswerable=unanswerable)
        assert exact.tolist() == [1]
        assert f1s.tolist() == [float(unanswerable)]


def test_the_nearest_answer_counts() -> None:
    exact, f1s = grade(
        ["red cat", "dog"], [["a big red cat", "cat", "red cat sat"], ["dogs", "dog"]], unanswerable=False
    )
    assert exact.tolist() == [0, 1]
    assert f1s.tolist() == pytest.approx([0.8, 1])


def test_answers_without_a_word_are_none_in_2_0() -> None:
    exact, f1s = grade(["", "the", "", "cat"], [["the", "cat"], ["the"], [], []], unanswerable=True)
    assert exact.tolist() == [0, 1, 1, 0]
    assert f1s.tolist() == [0, 1, 1, 0]
    assert grade([""], [["the", "cat"]], unanswerable=False)[0].tolist() == [1]


# By the odds: right, wrong, without answer, half right, without answer but "" is predicted, right.
ODDS = [-3.0, -2.0, -1.0, 0.5, 1.5, 4.0]
GRADED = Graded(
    np.array([1.0, 0, 0, 0, 1, 1]),
    np.array([1, 0, 0, 0.5, 1, 1]),
    np.array([True, True, False, True, False, True]),
    np.array([False, False, False, False, True, False]),
    np.array(ODDS),
)


def test_the_best_threshold_is_that_of_all() -> None:
    for name in ("exact", "f1"):
        every = {t: float(GRADED.at(t)[name == "f1"].mean()) for t in (-9.0, *ODDS)}
        best, threshold = GRADED.best(getattr(GRADED, name))
        assert best == pytest.approx(max(every.values()))
        assert every[threshold] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_the_best_threshold_of_random_predictions(seed: int) -> None:
    draw = np.random.default_rng(seed)
    answerable = draw.random(9) < 0.6
    scores = np.where(answerable, draw.integers(0, 3, 9) / 2, 0)
    graded = Graded(scores, scores, answerable, np.zeros(9, bool), draw.permutation(9).astype(float))
    reached = {t: float(graded.at(t)[0].mean()) for t in np.arange(-0.5, 9)}
    best, threshold = graded.best(graded.f1)
    assert best == pytest.approx(max(reached.values()))
    assert graded.at(graded.tuned())[0].mean() == pytest.approx(best)
    if best > reached[-0.5]:
        assert graded.at(threshold)[0].mean() == pytest.approx(best)


def test_a_tuned_threshold_is_between_two_questions() -> None:
    assert GRADED.best(GRADED.exact) == (pytest.approx(3 / 6), -3.0)
    assert GRADED.best(GRADED.f1) == (pytest.approx(3.5 / 6), 4.0)
    assert GRADED.tuned() == 5.0
    nothing = GRADED.take(np.array([1, 2]))
    assert nothing.best(nothing.f1) == (0.5, 0.0)
    assert nothing.tuned() < -2


def squad(path: Path, questions: list[dict[str, Any]], context: str = "The big cat sat on the mat .") -> Path:
    path.write_text(json.dumps({"version": "x", "data": [{"paragraphs": [{"context": context, "qas": questions}]}]}))
    return path


def question(id: str, *answers: str, **more: Any) -> dict[str, Any]:
    found = [{"text": text, "answer_start": 0} for text in answers]
    return {"id": id, "question": "what ?", "answers": found, **more}


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_files_of_1_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = squad(
        tmp_path / "d.json", [question("a", "The big cat"), question("b", "mat", "the mat ."), question("c", "The")]
    )
    said = written(tmp_path / "p.json", {"a": "cat", "b": "Mat", "more": "x"})
    found = evaluate(said, data)
    assert found == {"exact_match": pytest.approx(100 / 3), "f1": pytest.approx(100 * (2 / 3 + 1) / 3)}
    assert "lacks 1 of 3 questions, as c: they count 0" in capsys.readouterr().err


def test_files_of_2_0(tmp_path: Path) -> None:
    """Worked out by hand: c is answered though there is no answer, and odds above 1 take an answer back."""
    rows = [question("a", "The big cat"), question("b", "mat"), question("c"), question("d"), question("e", "mat")]
    data = squad(tmp_path / "d.json", rows)
    said = written(tmp_path / "p.json", {"a": "big cat", "b": "red mat", "c": "cat", "d": "", "e": "mat"})
    found = evaluate(said, data, "squad2")
    third = 2 / 3
    assert found == {
        "exact": 60.0, "f1": pytest.approx(100 * (3 + third) / 5), "total": 5,
        "HasAns_exact": pytest.approx(200 / 3), "HasAns_f1": pytest.approx(100 * (2 + third) / 3), "HasAns_total": 3,
        "NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2,
    }  # fmt: skip
    odds = written(tmp_path / "o.json", {"a": -4, "b": -1, "c": 0.5, "d": 3, "e": 2})
    found = evaluate(said, data, "squad2", odds)
    assert found["exact"] == 40.0  # e is taken back
    assert found["HasAns_exact"] == pytest.approx(100 / 3)
    assert (found["best_exact"], found["best_exact_thresh"]) == (60.0, -4)
    assert (found["best_f1"], found["best_f1_thresh"]) == (pytest.approx(100 * (3 + third) / 5), -1)


@pytest.mark.parametrize(
    ("predictions", "odds", "message"),
    [
        ({"a": "x"}, None, "lacks 1 of 2 questions, as b"),
        ({"a": "x", "b": 1}, None, "from each question's id to a text"),
        (["a"], None, "must be a JSON object"),
        ({"a": "x", "b": ""}, {"a": 1}, "o.json lacks 1 of 2 questions, as b"),
        ({"a": "x", "b": ""}, {"a": 1, "b": "1"}, "to a number"),
    ],
)
def test_files_that_cannot_be_scored(tmp_path: Path, predictions: Any, odds: Any, message: str) -> None:
    data = squad(tmp_path / "d.json", [question("a", "cat"), question("b")])
    said = written(tmp_path / "p.json", predictions)
    with pytest.raises(InputError, match=message):
        evaluate(said, data, "squad2", None if odds is None else written(tmp_path / "o.json", odds))
