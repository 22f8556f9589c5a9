"""SQuAD: labels and answers against loops over transformers' windows, and a run from files to files."""

import json
import math
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding

import fastbert
from fastbert.inference.encoding import takes_types
from fastbert.inference.engine import Engine
from fastbert.inference.spans import Reading
from fastbert.inference.windows import Windows
from fastbert.tasks import FILE
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Tokenizing
from fastbert.tasks.scores import Scores
from fastbert.tasks.squad.metric import evaluate
from fastbert.tasks.squad.task import LONGEST_ANSWER, SquadTask
from fastbert.tasks.task import labels_of
from fastbert.training.judging import judged
from tests.heads import DOCUMENTS, LONG, checkpoint
from tests.squads import QUESTIONS, Question, asked, examples_of, rows, task_of, windows_of, write
from tests.tuned import curve_of, transformers_curve, tuned

pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = ("Bert", "Roberta", "DistilBert")
LENGTH, STRIDE = 48, 10
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: checkpoint(tmp_path_factory.mktemp(family), f"{family}ForQuestionAnswering") for family in FAMILIES}


def tokenizing_of(folder: str) -> Tokenizing:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.from_pretrained(folder))
    return Tokenizing(tokenizer, LENGTH, takes_types(model, tokenizer), STRIDE)


def judge(folder: str, task: SquadTask, examples: Examples) -> Scores:
    model = fastbert.patch(AutoModelForQuestionAnswering.from_pretrained(folder).eval())
    tokenizing = tokenizing_of(folder)
    engine = Engine(model, tokenizing.tokenizer, max_length=LENGTH)
    return judged(engine, task.judge(examples, tokenizing, model.config))


# What is learnt.


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_a_loops(folders: dict[str, str], tmp_path: Path, family: str) -> None:
    tokenizing = tokenizing_of(folders[family])
    examples = examples_of(tmp_path, train=True)
    features = task_of().features(examples, tokenizing, None)
    order = [int(id[1:]) for id in examples.ids]
    expected = [w for i in order for w in windows_of(tokenizing.tokenizer, QUESTIONS[i], LENGTH, STRIDE)]
    assert len(features) == len(expected) == features.weights.sum()
    ids = np.split(features.tokens.ids, features.tokens.starts[1:])
    assert [row.tolist() for row in ids] == [item["input_ids"] for item in expected]
    for name in ("start_positions", "end_positions"):
        assert features.labels[name].dtype == np.int64
        assert features.labels[name].tolist() == [item[name] for item in expected]
    assert examples.problems.counts["an answer longer than a window ([CLS])"] == 1
    questions = np.repeat(order, [len(windows_of(tokenizing.tokenizer, QUESTIONS[i], LENGTH, STRIDE)) for i in order])
    found = np.bincount(questions[features.labels["start_positions"] > 0], minlength=len(QUESTIONS))
    assert found[4] == 2  # windows
    assert np.flatnonzero(found == 0).tolist() == [7, 14, 15]


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_labels_cut_out_the_answer(folders: dict[str, str], tmp_path: Path, family: str) -> None:
    """By the offsets of a fresh tokenizer, each answer is found whole, and no token more than it needs."""
    tokenizing = tokenizing_of(folders[family])
    for question in (q for q in QUESTIONS if q.answers and len(q.answers[0][0]) < 40):
        features = task_of().features(examples_of(tmp_path, [question], train=True), tokenizing, None)
        batch = tokenizing.tokenizer(
            question.question, question.passage, truncation="only_second", max_length=LENGTH, stride=STRIDE,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        starts, ends = features.labels["start_positions"], features.labels["end_positions"]
        found = [
            (batch["offset_mapping"][w][s][0], batch["offset_mapping"][w][e][1])
            for w, (s, e) in enumerate(zip(starts, ends, strict=True))
            if s
        ]
        assert found
        begin, end = question.span or (0, 0)
        for a, b in found:
            assert a <= begin < end <= b
            assert (b - a) - (end - begin) <= (4 if question.answers[0][0] == "aïv" else 1)


def test_an_answer_without_a_token_is_left_out(folders: dict[str, str], tmp_path: Path) -> None:
    """WordPiece drops control characters."""
    passage = "the cat \u0007\u0007 sat"
    examples = examples_of(tmp_path, [Question("a", passage, (("\u0007", 8),)), asked("b", passage, 1, 2)], train=True)
    features = task_of().features(examples, tokenizing_of(folders["Bert"]), None)
    assert len(features) == 1
    assert examples.problems.counts["an answer without a token (left out)"] == 1


def test_a_long_question_is_cut_and_counted(folders: dict[str, str], tmp_path: Path) -> None:
    examples = examples_of(tmp_path, [asked(LONG, "the cat sat", 0, 1)], train=True)
    features = task_of().features(examples, tokenizing_of(folders["Bert"]), None)
    assert features.tokens.lengths.tolist() == [22 + 3 + 3]
    (reason,) = examples.problems.counts
    assert reason == "a question of more than 64 tokens, or half a window (cut)"


# How it is judged.


def answers_by_loops(folder: str, question: Question) -> tuple[dict[tuple[int, int], float], float]:
    """Official decoding with a stock model: the score of each span, and the least one of none."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    found: dict[tuple[int, int], float] = {}
    null = math.inf
    batch = tokenizer(
        question.question, question.passage, truncation="only_second", max_length=LENGTH, stride=STRIDE,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    for i in range(len(batch["input_ids"])):
        names = [name for name in tokenizer.model_input_names if name in batch]
        with torch.no_grad():
            output = model(**{name: torch.tensor([batch[name][i]]) for name in names})
        start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
        null = min(null, start[0] + end[0])
        passage = [t for t, sequence in enumerate(batch.sequence_ids(i)) if sequence == 1]
        for s in sorted(passage, key=lambda t: -start[t])[:20]:
            for e in sorted(passage, key=lambda t: -end[t])[:20]:
                if s <= e < s + LONGEST_ANSWER:
                    where = batch["offset_mapping"][i][s][0], batch["offset_mapping"][i][e][1]
                    if where[0] < where[1]:
                        found[where] = max(found.get(where, -math.inf), start[s] + end[e])
    return found, null


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_official_decodings(folders: dict[str, str], tmp_path: Path, family: str) -> None:
    examples = examples_of(tmp_path)
    scores = judge(folders[family], task_of(), examples)
    threshold = scores.decided["null_threshold"]
    for id, ((_, passage), prediction) in zip(
        examples.ids, zip(examples.inputs, scores.predictions, strict=True), strict=True
    ):
        expected, null = answers_by_loops(folders[family], QUESTIONS[int(id[1:])])
        assert prediction["null_score"] == pytest.approx(null, rel=1e-4, abs=1e-4)
        spans = [answer for answer in prediction["n_best"] if answer["answer"]]
        best = sorted(expected.values(), reverse=True)[:20]
        np.testing.assert_allclose([span["score"] for span in spans], best, rtol=1e-4, atol=1e-4)
        for span in spans:
            where = span["start"], span["end"]
            assert span["answer"] == passage[slice(*where)]
            assert span["score"] == pytest.approx(expected[where], rel=1e-4, abs=1e-4)
        assert (prediction["answer"] == "") == (null - best[0] > threshold)
        assert sum(answer["probability"] for answer in prediction["n_best"]) == pytest.approx(1)


def test_only_the_best_starts_and_ends_are_looked_at_where_logits_are_summed() -> None:
    """Of 70 tokens the last 30 are good starts, the first 30 good ends: no span of these is one."""
    T = 71
    offsets = np.stack([np.arange(-1, T - 1), np.arange(T)], 1).astype(np.int32)
    windows = Windows(
        np.zeros(T, np.int32), np.array([T]), texts=["x" * (T - 1)], text_of=np.zeros(1, np.int64),
        begins=np.zeros(1, np.int64), read=np.arange(T) > 0, offsets=offsets,
    )  # fmt: skip
    logits_T2 = np.zeros((T, 2), np.float32)
    logits_T2[41:, 0] = logits_T2[1:31, 1] = 5
    logits_T2[0] = 1, 2
    (found,) = Reading(30, summed=True).spans(logits_T2, windows, 0)
    assert found.spans == []
    assert (found.null, found.best, found.odds) == (3.0, "", 0.0)
    (found,) = Reading(30).spans(logits_T2, windows, 0)
    assert len(found.spans) == 1
    logits_T2[20, 0], logits_T2[50, 1] = 7, 6  # 31 tokens: one too many
    (found,) = Reading(30, summed=True).spans(logits_T2, windows, 0)
    assert found.spans[0][::2] == (19, 12.0)
    assert {end for _, end, score in found.spans if score == 11} == {50}
    assert max(end - begin for begin, end, _ in found.spans) <= 30


def test_figures_are_those_of_the_official_files(folders: dict[str, str], tmp_path: Path) -> None:
    examples = examples_of(tmp_path)
    task = task_of()
    task.decided = {"null_threshold": 0.25}
    scores = judge(folders["Bert"], task, examples)
    files = task.official(examples, scores)
    for ending, text in files.items():
        (tmp_path / f"p{ending}").write_text(text)
    data = tmp_path / "questions.json"
    found = evaluate(tmp_path / "p.json", data, "squad2")
    for name in ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1"):
        assert 100 * scores.metrics[name] == pytest.approx(found[name])
    assert scores.decided == {"null_threshold": 0.25}
    odds = json.loads((tmp_path / "p.null-odds.json").read_text())
    answers = json.loads((tmp_path / "p.json").read_text())
    assert {id for id, odd in odds.items() if odd > 0.25} == {id for id, text in answers.items() if text == ""}
    best = {id: next(a["answer"] for a in p["n_best"] if a["answer"])
            for id, p in zip(examples.ids, scores.predictions, strict=True)}  # fmt: skip
    (tmp_path / "best.json").write_text(json.dumps(best))
    found = evaluate(tmp_path / "best.json", data, "squad2", tmp_path / "p.null-odds.json")
    assert 100 * scores.metrics["best_f1"] == pytest.approx(found["best_f1"])
    assert 100 * scores.metrics["best_exact"] == pytest.approx(found["best_exact"])
    low, high = scores.intervals(200)["f1"]
    assert low <= scores.metrics["f1"] <= high


def test_a_threshold_is_tuned_where_none_is_decided(folders: dict[str, str], tmp_path: Path) -> None:
    scores = judge(folders["Bert"], task_of(), examples_of(tmp_path))
    assert scores.metrics["f1"] == pytest.approx(scores.metrics["best_f1"])
    assert math.isfinite(scores.decided["null_threshold"])


def test_the_loss_is_the_heads(folders: dict[str, str], tmp_path: Path) -> None:
    examples = examples_of(tmp_path)
    scores = judge(folders["Bert"], task_of(), examples)
    tokenizer = AutoTokenizer.from_pretrained(folders["Bert"])
    model = AutoModelForQuestionAnswering.from_pretrained(folders["Bert"]).eval()
    items = list(chain.from_iterable(windows_of(tokenizer, question, LENGTH, STRIDE) for question in QUESTIONS))
    with torch.no_grad():
        losses = [float(model(**{name: torch.tensor([v]) for name, v in item.items()}).loss) for item in items]
    assert scores.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_questions_without_known_answers_are_predicted(folders: dict[str, str], tmp_path: Path) -> None:
    known = examples_of(tmp_path, QUESTIONS[:4])
    unknown = Examples("x")
    for item, place, id in zip(known.inputs, known.places, known.ids, strict=True):
        unknown.add(item, None, place, id)
    task = task_of("squad")
    scores, expected = (judge(folders["Bert"], task, examples) for examples in (unknown, known))
    assert scores.metrics == {}
    assert scores.predictions == expected.predictions
    assert set(expected.metrics) == {"exact_match", "f1"}
    assert "null_score" not in expected.predictions[0]
    assert json.loads(task.write_test(unknown, scores)[1]) == {
        id: prediction["answer"] for id, prediction in zip(known.ids, expected.predictions, strict=True)
    }


def test_an_empty_passage_has_no_answer(folders: dict[str, str], tmp_path: Path) -> None:
    scores = judge(folders["Bert"], task_of(), examples_of(tmp_path, [Question("a", "", ()), QUESTIONS[0]]))
    assert scores.predictions[0]["answer"] == ""
    assert "NaN" not in json.dumps(scores.predictions)


# A run.


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of another task."""
    return checkpoint(tmp_path_factory.mktemp("base"), "BertForSequenceClassification", num_labels=3)


def test_a_run_evaluates_and_predicts_alike(base: str, tmp_path: Path, run: Run) -> None:
    train = [
        asked(f"the {word} ?", passage, i, i + 2)
        for passage in (DOCUMENTS[0], DOCUMENTS[3])
        for i, word in enumerate("ab")
    ]
    dev = write(tmp_path / "dev.json", QUESTIONS)
    output = tmp_path / "run"
    status, _, err = run(
        "finetune", "squad2", "--model", base, "--data", write(tmp_path / "train.json", train + QUESTIONS[-2:]),
        "--dev", dev, "-o", output, "--epochs", 2, "--batch-size", 4, "--max-length", LENGTH, "--doc-stride", STRIDE,
        "--learning-rate", "1e-3", "--device", "cpu",
    )  # fmt: skip
    assert status == 0, err
    assert "squad2: 2 labels, start, end" in err
    config = AutoConfig.from_pretrained(output / "model")
    assert labels_of(config) == ["start", "end"]
    results = json.loads((output / "results.json").read_text())["splits"]["dev"]
    found = evaluate(output / "dev-predictions.json", dev, "squad2")
    assert 100 * results["metrics"]["f1"] == pytest.approx(found["f1"])
    about = json.loads((output / "model" / FILE).read_text())
    assert (
        about["decided"] == results["decided"] == {"null_threshold": pytest.approx(about["decided"]["null_threshold"])}
    )

    # Some are to have an answer and some none, whatever was learnt.
    odds = json.loads((output / "dev-predictions.null-odds.json").read_text())
    threshold = float(np.mean(sorted(odds.values())[7:9]))
    (output / "model" / FILE).write_text(json.dumps({**about, "decided": {"null_threshold": threshold}}))
    status, out, err = run("evaluate", output, "--data", dev, "--predictions", tmp_path / "p.jsonl", "--json")
    assert status == 0, err
    assert json.loads(out)["splits"]["dev"]["decided"] == {"null_threshold": threshold}
    evaluated = json.loads((tmp_path / "p.json").read_text())
    assert sum(text == "" for text in evaluated.values()) == len(QUESTIONS) // 2
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(QUESTIONS)))
    status, _, err = run(
        "predict", output / "model", tmp_path / "q.jsonl", "-o", tmp_path / "out.jsonl", "--id-key", "id"
    )
    assert status == 0, err
    predicted = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {row["id"]: row["answer"] for row in predicted} == evaluated
    details = {row["id"]: row for row in map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())}
    for row in predicted:
        assert row["score"] == pytest.approx(details[row["id"]]["score"], rel=1e-4, abs=1e-4)
        assert row["probability"] == pytest.approx(details[row["id"]]["probability"], rel=1e-3)


def test_predict_reads_other_columns(folders: dict[str, str], tmp_path: Path, run: Run) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"q": "the cat", "p": "a dog ran"}) + "\n")
    options = ("-o", tmp_path / "o.jsonl", "--question", "q", "--passage", "p")
    status, _, err = run("predict", folders["Bert"], tmp_path / "q.jsonl", *options)
    assert status == 0, err
    answer = fastbert.Answerer.from_pretrained(folders["Bert"]).answer("the cat", "a dog ran")
    assert json.loads((tmp_path / "o.jsonl").read_text())["answer"] == answer.text


def without_padding(model: Any) -> None:
    """Padding takes no share of the softmax, as in ours; else a loss depends on the longest row of its batch."""
    masks: list[torch.Tensor] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model.qa_outputs.register_forward_hook(
        lambda module, args, logits: logits.masked_fill(masks[-1][..., None] == 0, -1000.0)
    )


@pytest.mark.parametrize("padded", [False, True])
def test_fifty_steps_are_those_of_stock_transformers(base: str, tmp_path: Path, padded: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    passages = (DOCUMENTS[0], DOCUMENTS[3]) if padded else DOCUMENTS[:1]
    questions = [
        asked(f"the {word} ?", passage, i, i + 2)
        for passage in passages
        for i, word in enumerate(("a", "cat", "dog", "ran"))
    ]
    if padded:
        questions += [asked("what", LONG.strip(), i, i + 3) for i in (0, 30, 60, 90)]
    items = [w for question in questions for w in windows_of(tokenizer, question, LENGTH, STRIDE)]
    assert (len({len(item["input_ids"]) for item in items}) > 1) == padded
    dev = write(tmp_path / "dev.json", QUESTIONS[:2])
    task = task_of("squad", train=str(write(tmp_path / "train.json", questions)), dev=str(dev))
    options: dict[str, Any] = {"max_length": LENGTH, "doc_stride": STRIDE, "epochs": 200 / len(items), "batch_size": 4}
    tuning_run = tuned(task, base, tmp_path / "run", learning_rates=(5e-4,), **options)
    change = without_padding if padded else lambda model: None
    packed = curve_of(tuning_run)
    stock = transformers_curve(tuning_run, tmp_path, items, DataCollatorWithPadding(tokenizer), change)
    assert len(packed) == len(stock) == 50
    assert np.mean(packed[-10:]) < 0.9 * np.mean(packed[:10])
    np.testing.assert_allclose(packed, stock, rtol=1e-4)
