"""SQuAD's files: what is in them, and what is wrong with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.errors import InputError
from fastbert.tasks.squad.data import read_questions
from fastbert.tasks.task import DEV, TRAIN
from tests.optional import needs
from tests.squads import QUESTIONS, Question, content, examples_of, rows, task_of, write


def test_a_question_is_its_passage_and_all_its_answers(tmp_path: Path) -> None:
    examples = examples_of(tmp_path)
    by_id = dict(zip(examples.ids, zip(examples.inputs, examples.labels, strict=True), strict=True))
    assert len(by_id) == len(QUESTIONS)
    for i, (question, passage, answers) in enumerate(QUESTIONS):
        label = [{"text": text, "answer_start": start} for text, start in answers]
        assert by_id[f"q{i}"] == ((question, passage), label)
    assert dict(examples.problems.counts) == {"an empty question (kept)": 1}


@needs("datasets", "pyarrow")
def test_datasets_and_their_files_have_the_same(tmp_path: Path) -> None:
    import datasets

    dataset = datasets.Dataset.from_list(rows(QUESTIONS))
    datasets.DatasetDict({"train": dataset, "validation": dataset}).save_to_disk(str(tmp_path / "saved"))
    dataset.to_parquet(str(tmp_path / "q.parquet"))
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(QUESTIONS)))
    expected = examples_of(tmp_path)
    order = np.argsort(expected.ids)
    saved = f"dataset:{tmp_path / 'saved'}"
    for place in (saved, f"{saved}:validation", str(tmp_path / "q.parquet"), str(tmp_path / "q.jsonl")):
        for split, found in task_of(train=place, dev=place).read(DEV).items():
            assert split == DEV
            ours = np.argsort(found.ids)
            assert found.select(ours).inputs == expected.select(order).inputs
            assert found.select(ours).labels == expected.select(order).labels
    (dev,) = task_of(train=saved).read(DEV).values()
    assert dev.name == f"{saved}:validation"
    assert task_of(train=f"{saved}:train").read(DEV) == {}


def test_a_folder_has_the_official_files(tmp_path: Path) -> None:
    write(tmp_path / "train-v2.0.json", QUESTIONS)
    task = task_of(train=str(tmp_path))
    assert len(task.read(TRAIN)[TRAIN]) == len(QUESTIONS)
    assert task.read(DEV) == {}
    write(tmp_path / "dev-v2.0.json", QUESTIONS[:3])
    assert len(task.read(DEV)[DEV]) == 3


def test_answers_that_are_elsewhere_are_counted_and_not_learnt(tmp_path: Path) -> None:
    passage = "the cat sat"
    elsewhere = [
        Question("a", passage, (("cat", 3),)),
        Question("b", passage, (("sat", 9),)),
        Question("c", passage, (("the", -1),)),
        Question("d", passage, ((" ", 3),)),
        Question("e", passage, (("dog", 4), ("cat", 4))),
        Question("f", passage, (("sat", 8),)),
    ]
    train = examples_of(tmp_path, elsewhere, train=True)
    assert train.ids == ["q4", "q5"]
    assert dict(train.problems.counts) == {
        "an answer that does not stand where it is said to (left out)": 1,
        "an answer outside its passage (left out)": 2,
        "an answer without text (left out)": 1,
        "an answer that does not stand where it is said to (not learnt)": 1,
    }
    assert train.problems.first["an answer without text (left out)"] == [f"{tmp_path / 'questions.json'}, question q3"]
    dev = examples_of(tmp_path, elsewhere)
    assert len(dev) == 6
    assert dev.problems.counts["an answer outside its passage (its text alone counts)"] == 2


def test_files_that_contradict_themselves_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", QUESTIONS[:1] + QUESTIONS[-1:], is_impossible=True)
    problems = read_questions(path, unanswerable=True).problems
    assert dict(problems.counts) == {"is_impossible is otherwise than the answers (these are taken)": 1}


def broken(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A good file with a fault in the first question."""
    whole = content(QUESTIONS[:1])
    change(whole["data"][0]["paragraphs"][0]["qas"][0])
    return whole


TWICE = {"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "x", "question": "?", "answers": []}] * 2}]}]}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1], "is no SQuAD: .* has no list 'data'"),
        ({"data": [{"title": "x"}]}, "is no SQuAD: data 0 has no list 'paragraphs'"),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, "paragraphs 0 of data 0 has no list 'qas'"),
        ({"data": [{"paragraphs": [{"context": "a", "qas": ["x"]}]}]}, "qas 0 of .* is no object"),
        ({"data": []}, "has no question that can be used"),
        (TWICE, "question x: the id x is there twice"),
        (broken(lambda q: q.pop("id")), "a question has no id"),
        (broken(lambda q: q.update(answers="a")), "q0: answers must be a list of objects"),
        (broken(lambda q: q.update(answers=[{"text": "a"}])), "q0: an answer must have a text and an answer_start"),
        (broken(lambda q: q.pop("answers")), "q0: nothing says what the answers are"),
    ],
)
def test_what_is_no_squad_is_refused(tmp_path: Path, found: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=message):
        read_questions(path, unanswerable=True, train=True)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", QUESTIONS)
    with pytest.raises(InputError, match=r"question q15: a question without answer: that is SQuAD 2\.0"):
        read_questions(path, unanswerable=False)
    (tmp_path / "x.json").write_text('{"question": 1}\n{"question": 2}\n')
    with pytest.raises(InputError, match=r"x\.json is no SQuAD: it is no JSON"):
        read_questions(tmp_path / "x.json", unanswerable=True)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_questions(tmp_path / "y.json", unanswerable=True)
    with pytest.raises(InputError, match="--text is no option of squad"):
        task_of("squad", text="x")
