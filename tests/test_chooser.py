"""Choices, against transformers' own models one question at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForMultipleChoice, AutoTokenizer

import fastbert
from fastbert.errors import InputError
from fastbert.inference.stream import Stream
from tests.checkpoints import tiny_checkpoint
from tests.command import is_one_line, runner
from tests.heads import DOCUMENTS, LENGTH, LONG, QUERY, checkpoint

FAMILIES = ("Bert", "Roberta", "DistilBert", "Albert", "Electra")
QUESTIONS = [
    (QUERY, ["a dog ran", "the cat sang on the mat"]),
    ("", ["birds", "", "dogs and cats"]),
    (LONG, DOCUMENTS),
    ("the red house", ["and the tree"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("model"), "BertForMultipleChoice")


@torch.no_grad()
def by_transformers(folder: str) -> list[list[float]]:
    model, tokenizer = AutoModelForMultipleChoice.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for context, choices in QUESTIONS:
        contexts = [context] * len(choices)
        batch = tokenizer(contexts, choices, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        found.append(model(**{key: t[None] for key, t in batch.items()}).logits.softmax(-1)[0].tolist())
    return found


@pytest.mark.parametrize("name", [f"{family}ForMultipleChoice" for family in FAMILIES])
def test_choices_are_transformers(name: str, tmp_path: Path) -> None:
    """Of questions with different numbers of choices, in batches that cut them."""
    folder = checkpoint(tmp_path, name)
    chooser = fastbert.Chooser.from_pretrained(folder, batch_tokens=60, max_length=LENGTH)
    expected = by_transformers(folder)
    for (_, choices), actual, scores in zip(QUESTIONS, chooser.predict(QUESTIONS), expected, strict=True):
        np.testing.assert_allclose(actual.scores, scores, atol=1e-5)
        assert actual.index == int(np.argmax(scores))
        assert (actual.choice, actual.score) == (choices[actual.index], actual.scores[actual.index])
    assert len({len(scores) for scores in expected}) > 2
    assert fastbert.report(chooser.model).fallbacks.total() == 0


def test_one_question(folder: str) -> None:
    chooser = fastbert.Chooser.from_pretrained(folder)
    assert chooser.choose(*QUESTIONS[1]) == chooser.predict(QUESTIONS[1:2])[0]
    assert chooser.predict([]) == []
    assert chooser.choose(*QUESTIONS[3]).scores == [1.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.choose("a", []), "a question is a context, a string, and its choices, a list of strings"),
        (lambda c: c.choose("a", "b"), "a question is a context"),
        (lambda c: c.choose(["a"], ["b"]), "a question is a context"),
        (
            lambda c: c.predict([QUESTIONS[0], ("a", [])]),
            r"item 1 must be a question \(context, choices\), but is \('a'",
        ),
        (lambda c: c.predict([("a", ["b", 3])]), "item 0 must be a question"),
        (lambda c: c.predict("a"), "one string is given where a list is needed"),
    ],
)
def test_what_is_no_question_is_named(folder: str, call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(fastbert.Chooser.from_pretrained(folder))


def test_another_head_is_refused(tmp_path: Path) -> None:
    name = tiny_checkpoint(tmp_path, "BertForSequenceClassification")
    with pytest.raises(InputError, match=r"BertForSequenceClassification, but Chooser needs a \.\.\.ForMultipleChoice"):
        fastbert.Chooser.from_pretrained(name)


def test_questions_stream(folder: str) -> None:
    chooser = fastbert.Chooser.from_pretrained(folder, max_length=LENGTH)
    windows = list(Stream(chooser, [*QUESTIONS, ("", ["", " "])], window=2))
    assert [len(window.rows) for window in windows] == [2, 2, 1]
    assert [window.empty for window in windows] == [0, 0, 1]
    found = [choice for window in windows for choice in window.results]
    for actual, expected in zip(found, chooser.predict(QUESTIONS), strict=False):
        np.testing.assert_allclose(actual.scores, expected.scores, atol=1e-6)


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
        return runner(capsys, monkeypatch)

    def predicted(self, path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    def test_of_a_column_with_a_list(self, folder: str, run: Any, tmp_path: Path) -> None:
        rows = [{"text": context, "choices": choices} for context, choices in QUESTIONS]
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows) + '"no row"\n{"text": "a"}\n')
        status, _, said = run("predict", folder, source, "-o", target, "--max-length", LENGTH)
        assert status == 0, said
        found = self.predicted(target)
        expected = fastbert.Chooser.from_pretrained(folder, max_length=LENGTH).predict(QUESTIONS)
        for row, choice in zip(found, expected, strict=False):
            assert (row["index"], row["choice"]) == (choice.index, choice.choice)
            np.testing.assert_allclose(row["scores"], choice.scores, atol=1e-6)
        assert [row["id"] for row in found] == list(range(6))
        assert [row["choice"] for row in found[4:]] == ["", ""]
        assert "not a JSON object" in said
        assert "no list of choices at 'choices' (taken as an empty one)" in said

    def test_of_several_columns(self, folder: str, run: Any, tmp_path: Path) -> None:
        source, target = tmp_path / "in.csv", tmp_path / "out.jsonl"
        source.write_text('question,A,B\nthe cat,sat,"ran, and sang"\n')
        options = ("--text", "question", "--choices", "A,B")
        status, _, said = run("predict", folder, source, "-o", target, *options)
        assert status == 0, said
        expected = fastbert.Chooser.from_pretrained(folder).choose("the cat", ["sat", "ran, and sang"])
        assert self.predicted(target)[0]["choice"] == expected.choice
        status, _, said = run("predict", folder, source, "-o", tmp_path / "x.jsonl", "--text", "question")
        assert status == 1
        assert is_one_line(said)
        assert "has no column 'choices', but 'question', 'A', 'B': --choices choices names another" in said
