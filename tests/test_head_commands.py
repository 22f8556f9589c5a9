"""fastbert rerank, classify, tag, answer: what they write is what the engines give."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import fastbert
from fastbert import cli
from tests.heads import DOCUMENTS, LONG, PAIRS, QUERY, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., tuple[int, str]]
KINDS = {
    "rerank": ("SequenceClassification", {"num_labels": 1}),
    "classify": ("SequenceClassification", {}),
    "tag": ("TokenClassification", {}),
    "answer": ("QuestionAnswering", {}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    make = tmp_path_factory.mktemp
    return {name: checkpoint(make(name), f"BertFor{kind}", **config) for name, (kind, config) in KINDS.items()}


@pytest.fixture
def run(folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command on its checkpoint: exit status and stderr."""

    def run(command: str, *arguments: object, model: str | None = None) -> tuple[int, str]:
        model = folders[model or command]
        monkeypatch.setattr(sys, "argv", ["fastbert", command, model, *map(str, arguments), "--device", "cpu"])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        return status, capsys.readouterr().err

    return run


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Queries and documents, which are questions and passages, too; each with an id."""
    path = tmp_path / "pairs.jsonl"
    names = (("query", "document"), ("question", "passage"))
    rows = [{"n": f"row {i}"} | {k: v for name in names for k, v in zip(name, PAIRS[i], strict=True)} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("".join(f"{text}\n" for text in (*DOCUMENTS, LONG)))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rerank_writes_a_score_for_each_pair(run: Run, folders: dict[str, str], pairs: Path, tmp_path: Path) -> None:
    scores = fastbert.Reranker.from_pretrained(folders["rerank"], max_length=30).score_pairs(PAIRS)
    options = ("--max-length", 30, "--batch-tokens", 60, "--window", 2)
    for suffix in ("jsonl", "npy", "parquet"):
        status, err = run("rerank", pairs, "-o", tmp_path / f"s.{suffix}", "--id-key", "n", *options)
        assert status == 0, err
        assert err.startswith("fastbert: 5 pairs, ")
        assert "1 cut at 30 tokens" in err
    rows = read(tmp_path / "s.jsonl")
    assert [row["id"] for row in rows] == [f"row {i}" for i in range(5)]
    for actual in (
        [row["score"] for row in rows],
        np.load(tmp_path / "s.npy"),
        parquet.read_table(tmp_path / "s.parquet")["score"].to_numpy(),
    ):
        np.testing.assert_allclose(actual, scores, atol=1e-6)


def test_classify_writes_labels(run: Run, folders: dict[str, str], texts: Path, pairs: Path, tmp_path: Path) -> None:
    status, err = run("classify", texts, "-o", tmp_path / "l.jsonl", "--top-k", 2)
    assert status == 0, err
    classifier = fastbert.Classifier.from_pretrained(folders["classify"], top_k=2)
    labels = classifier.predict([*DOCUMENTS, LONG])
    for i, (row, label) in enumerate(zip(read(tmp_path / "l.jsonl"), labels, strict=True)):
        assert row == {"id": i, **asdict(label)}
    status, err = run(
        "classify", pairs, "-o", tmp_path / "p.jsonl", "--text-key", "query", "--pair-key", "document", "--top-k", 1
    )
    assert status == 0, err
    assert [row["label"] for row in read(tmp_path / "p.jsonl")] == [label.label for label in classifier.predict(PAIRS)]


def test_tag_writes_entities(run: Run, folders: dict[str, str], texts: Path, tmp_path: Path) -> None:
    status, err = run("tag", texts, "-o", tmp_path / "t.jsonl", "--strategy", "average", "--stride", 10)
    assert status == 0, err
    tagger = fastbert.Tagger.from_pretrained(folders["tag"], strategy="average", stride=10)
    expected = tagger.predict([*DOCUMENTS, LONG])
    for i, (row, entities) in enumerate(zip(read(tmp_path / "t.jsonl"), expected, strict=True)):
        assert row["id"] == i
        assert [{**e, "score": 0} for e in row["entities"]] == [{**asdict(e), "score": 0} for e in entities]
    assert "cut" not in err


def test_answer_writes_answers(run: Run, folders: dict[str, str], pairs: Path, tmp_path: Path) -> None:
    options = ("--max-answer-length", 3, "--doc-stride", 10)
    status, err = run("answer", pairs, "-o", tmp_path / "a.jsonl", *options)
    assert status == 0, err
    answerer = fastbert.Answerer.from_pretrained(folders["answer"], max_answer_length=3, doc_stride=10)
    for row, (question, passage) in zip(read(tmp_path / "a.jsonl"), PAIRS, strict=True):
        best = answerer.answer(question, passage)
        assert (row["answer"], row["start"], row["end"]) == (best.text, best.start, best.end)
        assert row["score"] == pytest.approx(best.score, abs=1e-6)
    assert run("answer", pairs, "-o", tmp_path / "i.jsonl", "--impossible")[0] == 0
    assert read(tmp_path / "i.jsonl")[1] == {"id": 1, "answer": "", "start": 0, "end": 0, "score": 1.0}


def test_an_output_is_not_overwritten_unasked(run: Run, pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.jsonl"
    assert run("rerank", pairs, "-o", output)[0] == 0
    status, err = run("rerank", pairs, "-o", output)
    assert (status, err.count("\n")) == (1, 1)
    assert "--force" in err
    assert run("rerank", pairs, "-o", output, "--resume")[0] == 0
    assert run("rerank", pairs, "-o", output, "--force")[0] == 0
    assert len(read(output)) == 5


@pytest.mark.parametrize(
    ("command", "content", "model", "message"),
    [
        ("rerank", {"query": QUERY}, None, "has no column 'document', but 'query': --document-key names another"),
        ("rerank", {"query": QUERY, "document": ""}, "tag", "but Reranker needs a ...ForSequenceClassification"),
        ("answer", {"question": "", "passage": ""}, "tag", "but Answerer needs a ...ForQuestionAnswering"),
        ("classify", {"text": ""}, "answer", "but Classifier needs a ...ForSequenceClassification"),
        ("tag", {"words": []}, None, "has no column 'text'"),
    ],
)
def test_mistakes_are_one_line(
    run: Run, command: str, content: dict[str, Any], model: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(content))
    status, err = run(command, path, "-o", tmp_path / "out.jsonl", model=model)
    assert (status, err.count("\n")) == (1, 1)
    assert message in err
    assert not (tmp_path / "out.jsonl").exists()
