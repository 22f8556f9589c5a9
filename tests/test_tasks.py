"""Texts and pairs of texts of one's own: files, labels, bad input, scores, and training as transformers trains."""

import csv
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig

from fastbert.errors import InputError
from fastbert.tasks import registry
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Tokenizing
from fastbert.tasks.sequences import SequenceTask
from fastbert.tasks.task import DEV, TEST, TRAIN, Given
from fastbert.training.finetuning import Finetuning
from fastbert.training.tuning import Tuning
from tests.checkpoints import TEXTS, WORDS, tiny_checkpoint
from tests.command import is_one_line, runner
from tests.optional import needs
from tests.tuned import CPU, curve_of, transformers_curve, tuned


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def table(path: Path, *rows: list[str]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return str(path)


def read(name: str, path: str, split: str = TRAIN, **given: Any) -> Examples:
    return registry.make(name, Given(**{split: path}, **given)).read(split)[split]


def of_labels(*labels: Any) -> Examples:
    examples = Examples("made up")
    for i, label in enumerate(labels):
        examples.add(TEXTS[i % len(TEXTS)], label, f"made up, line {i + 1}")
    return examples


def config_of(task: SequenceTask, *labels: Any) -> Any:
    return BertConfig(**task.head_options(of_labels(*labels)))


def task_of(name: str, **given: Any) -> SequenceTask:
    task = registry.make(name, Given(**given))
    assert isinstance(task, SequenceTask)
    return task


class TestFiles:
    @pytest.mark.parametrize("suffix", ["csv", "tsv"])
    def test_tables(self, suffix: str, tmp_path: Path) -> None:
        path = table(
            tmp_path / f"own.{suffix}", ["id", "a", "b", "y"], ["1", "x, y", 'say "so"', "good"], ["2", "", "z", "bad"]
        )
        examples = read("classify", path, text="a", pair="b", label="y")
        assert examples.inputs == [("x, y", 'say "so"'), ("", "z")]
        assert examples.labels == ["good", "bad"]
        assert examples.places == [f"{path}, line {i}" for i in (2, 3)]
        assert dict(examples.problems.counts) == {"an empty text (kept)": 1}

    @needs("pyarrow")
    def test_parquet(self, tmp_path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        columns = {"text": ["a", "b", "c"], "label": [["x"], [], ["y", "x"]]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "own.parquet")
        examples = read("multilabel", str(tmp_path / "own.parquet"))
        assert (examples.inputs, examples.labels) == (["a", "b", "c"], [["x"], [], ["y", "x"]])

    def test_a_table_that_made_numbers_of_labels(self, tmp_path: Path) -> None:
        """pandas makes 1.0 of 1 where another cell is empty."""
        path = lines(tmp_path / "own.jsonl", *({"text": "a", "label": label} for label in (1, 2.0, "1", 10, True)))
        assert read("classify", path).labels == ["1", "2", "1", "10", "True"]

    def test_lists_and_separators(self, tmp_path: Path) -> None:
        rows = [{"text": "a", "label": label} for label in (["x", "y"], "x, y", "", None, "x,,", [])]
        path = lines(tmp_path / "own.jsonl", *rows)
        assert read("multilabel", path).labels == [["x", "y"], ["x", "y"], [], [], ["x"], []]
        path = table(tmp_path / "own.csv", ["text", "label"], ["a", "x, y|z"], ["b", ""])
        assert read("multilabel", path, separator="|").labels == [["x, y", "z"], []]

    def test_rows_without_a_label_are_counted(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "own.jsonl", *({"text": "a", "label": label} for label in (3, None, "", " ", 4)))
        for name, labels in (("classify", ["3", "4"]), ("regress", [3.0, 4.0])):
            for split in (TRAIN, DEV):
                examples = read(name, path, split)
                assert examples.labels == labels
                assert dict(examples.problems.counts) == {"no label at 'label' (left out)": 3}
                assert examples.problems.first["no label at 'label' (left out)"][0] == f"{path}, line 2"

    @pytest.mark.parametrize("name", ["classify", "multilabel", "regress"])
    def test_test_data_need_no_labels(self, name: str, tmp_path: Path) -> None:
        path = table(tmp_path / "own.csv", ["text"], ["a"], ["b"])
        examples = read(name, path, TEST)
        assert examples.labels == [None, None]
        assert not examples.labelled


class TestBadFiles:
    @pytest.mark.parametrize(
        ("name", "rows", "message"),
        [
            ("classify", [{"text": "a", "y": 1}], r"has no column 'label', but 'text', 'y': --label names another"),
            ("classify", [{"body": "a", "label": 1}], r"has no column 'text', but 'body', 'label': --text names"),
            ("classify", [{"text": "a", "label": ["x"]}], r"line 1: 'label' must be one label, but is \['x'\]: multi"),
            ("regress", [{"text": "a", "label": "high"}], r"line 1: 'label' must be a number, but is 'high'"),
            ("regress", [{"text": "a", "label": "inf"}], r"line 1: 'label' must be a number, but is 'inf'"),
            ("classify", [{"text": "a", "label": None}], r"has no row that can be used: 1 x no label at 'label'"),
        ],
    )
    def test_are_told(self, name: str, rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            read(name, lines(tmp_path / "own.jsonl", *rows))

    def test_what_is_no_text_is_empty_and_counted(self, tmp_path: Path) -> None:
        path = lines(tmp_path / "own.jsonl", {"text": "a", "label": 1}, {"text": 7, "label": 2})
        examples = read("classify", path)
        assert examples.inputs == ["a", ""]
        assert examples.problems.counts["no text at 'text' (taken as empty)"] == 1

    def test_rows_that_cannot_be_read_are_left_out_and_counted(self, tmp_path: Path) -> None:
        (tmp_path / "own.jsonl").write_text('{"text": "a", "label": 1}\n{"text": \n{"text": "b", "label": 2}\n')
        examples = read("classify", str(tmp_path / "own.jsonl"))
        assert examples.inputs == ["a", "b"]
        assert dict(examples.problems.counts) == {"not JSON (left out)": 1}


class TestClasses:
    def test_are_sorted_numbers_by_their_size(self) -> None:
        config = config_of(task_of("classify"), "10", "b", "2", "-1", "a", "2", "nan")
        assert list(config.id2label.values()) == ["-1", "2", "10", "a", "b", "nan"]
        assert config.label2id["10"] == 2
        assert config.problem_type == "single_label_classification"

    def test_are_those_that_were_named(self) -> None:
        task = task_of("classify", labels=("good", "bad", "so so"))
        config = config_of(task, "bad", "good")
        assert list(config.id2label.values()) == ["good", "bad", "so so"]
        assert task._numbers(of_labels("so so", "good"), config).tolist() == [2, 0]

    def test_of_several_a_text_may_have_none(self) -> None:
        task = task_of("multilabel")
        config = config_of(task, ["y"], [], ["x", "y"])
        numbers = task._numbers(of_labels(["y"], [], ["x", "y"]), config)
        assert numbers.tolist() == [[0, 1], [0, 0], [1, 1]]
        assert numbers.dtype == np.float32

    def test_a_number_has_none(self) -> None:
        config = config_of(task_of("regress"), 1.0, 2.5)
        assert (config.num_labels, config.problem_type) == (1, "regression")

    @pytest.mark.parametrize(
        ("name", "given", "labels", "message"),
        [
            ("classify", {}, ["a", "a"], "made up has 1 labels in 'label': there is nothing to tell apart"),
            ("multilabel", {}, [["a"], []], "made up has 1 labels in 'label': there is nothing to tell apart"),
            ("classify", {}, [f"{i}.5" for i in range(1001)], r"has 1,001 labels in 'label', as '0\.5': if these are"),
            (
                "classify",
                {"labels": ("a", "b", "a")},
                ["a", "b"],
                "--labels must be two names or more, none twice, but",
            ),
            ("classify", {"labels": ("a",)}, ["a", "b"], "--labels must be two names or more"),
        ],
    )
    def test_that_cannot_be_learnt(self, name: str, given: Any, labels: list[Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            task_of(name, **given).head_options(of_labels(*labels))

    @pytest.mark.parametrize(("name", "labels"), [("classify", ["a", "b", "c"]), ("multilabel", [["a"], ["b"], ["c"]])])
    def test_a_label_that_training_never_saw(self, name: str, labels: list[Any], checkpoint: str) -> None:
        task, made = task_of(name), tokenizing(checkpoint)
        config = config_of(task, *labels[:2])
        for call in (task.features, task.judge):
            with pytest.raises(
                InputError, match="made up, line 3: the label 'c' is none of those that the model has: 'a'"
            ):
                call(of_labels(*labels), made, config)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def tokenizing(checkpoint: str, length: int = 48) -> Tokenizing:
    return Tokenizing(AutoTokenizer.from_pretrained(checkpoint), length, True)


@pytest.mark.parametrize("pairs", [False, True])
def test_features_are_the_tokenizers(pairs: bool, checkpoint: str) -> None:
    task, made = task_of("classify"), tokenizing(checkpoint, 12)
    examples = of_labels("b", "a", "b", "a", "b")
    if pairs:
        examples.inputs[:] = [(text, TEXTS[3]) for text in examples.inputs]
    features = task.features(examples, made, config_of(task, "a", "b"))
    texts = [*zip(*examples.inputs, strict=True)] if pairs else [examples.inputs]
    expected = made.tokenizer(*map(list, texts), truncation=True, max_length=12)
    assert features.tokens.lengths.tolist() == [len(ids) for ids in expected["input_ids"]]
    assert features.tokens.ids.tolist() == [i for ids in expected["input_ids"] for i in ids]
    types = [i for ids in expected["token_type_ids"] for i in ids]
    assert (features.tokens.types.tolist() == types) if pairs else (features.tokens.types is None and not any(types))
    assert features.labels["labels"].tolist() == [1, 0, 1, 0, 1]
    assert features.tokens.cut == (5 if pairs else 1)
    assert features.tokens.unknown == sum(
        i == made.tokenizer.unk_token_id for ids in expected["input_ids"] for i in ids
    )


@needs("sklearn", "scipy")
class TestScores:
    def judged(self, checkpoint: str, name: str, labels: list[Any], logits: list[list[float]]) -> Any:
        task, examples = task_of(name), of_labels(*labels)
        config = config_of(task, *labels)
        judge = task.judge(examples, tokenizing(checkpoint), config)
        assert judge.width == len(logits[0])
        return judge.score(np.asarray(logits, np.float32))

    def test_of_classes(self, checkpoint: str) -> None:
        logits = [[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 4.0]]
        scores = self.judged(checkpoint, "classify", ["a", "b", "c", "c"], logits)
        assert scores.metrics["accuracy"] == 0.75
        assert scores.metrics["f1_macro"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
        assert list(scores.metrics) == ["accuracy", "f1_macro", "f1_micro", "roc_auc"]
        assert scores.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
        assert [row["class"] for row in scores.per_class] == scores.classes == ["a", "b", "c"]
        target = torch.tensor([0, 1, 2, 2])
        assert scores.loss == pytest.approx(float(torch.nn.functional.cross_entropy(torch.tensor(logits), target)))
        shares = torch.tensor(logits).softmax(-1)
        assert scores.predictions[2] == {
            "label": "a",
            "scores": pytest.approx(dict(zip("abc", shares[2].tolist(), strict=True))),
        }

    def test_of_several_labels(self, checkpoint: str) -> None:
        logits = [[2.0, -1.0], [-1.0, -2.0], [0.1, 0.1]]
        scores = self.judged(checkpoint, "multilabel", [["x"], ["y"], ["x", "y"]], logits)
        assert scores.metrics["accuracy"] == pytest.approx(2 / 3)
        assert scores.metrics["f1_micro"] == pytest.approx(2 * 3 / (4 + 3))
        assert [prediction["labels"] for prediction in scores.predictions] == [["x"], [], ["x", "y"]]
        assert scores.confusion is None
        target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), target)
        assert scores.loss == pytest.approx(float(expected))

    def test_of_numbers(self, checkpoint: str) -> None:
        scores = self.judged(checkpoint, "regress", [1.0, 2.0, 4.0], [[1.5], [2.0], [9.0]])
        assert scores.metrics == {
            "pearson": pytest.approx(np.corrcoef([1, 2, 4], [1.5, 2, 9])[0, 1]),
            "spearman": pytest.approx(1.0),
        }
        assert scores.loss == pytest.approx((0.5**2 + 5**2) / 3)
        assert scores.predictions[2] == {"score": 9.0}
        assert scores.per_class == ()

    def test_of_a_part_are_the_parts(self, checkpoint: str) -> None:
        logits = [[2.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]]
        scores = self.judged(checkpoint, "classify", ["a", "b", "b", "b"], logits)
        assert scores.measure(np.asarray([2, 2, 3]))["accuracy"] == pytest.approx(1 / 3)
        assert np.isnan(scores.measure(np.asarray([1, 3]))["roc_auc"])

    def test_without_labels_there_are_predictions_alone(self, checkpoint: str) -> None:
        task = task_of("classify")
        judge = task.judge(of_labels(None, None), tokenizing(checkpoint), config_of(task, "a", "b"))
        scores = judge.score(np.asarray([[0.0, 1.0], [1.0, 0.0]], np.float32))
        assert (scores.metrics, scores.loss) == ({}, None)
        assert [prediction["label"] for prediction in scores.predictions] == ["b", "a"]


def made_up(path: Path, name: str, count: int, seed: int) -> str:
    """Labels follow from which words a text has."""
    draw = Random(seed)
    words = [word for word in WORDS if not word.startswith("##")]

    def row() -> dict[str, Any]:
        text = draw.choices(words, k=draw.randint(1, 12))
        several = [word for word in ("cat", "dog", "the") if word in text]
        label = {"classify": "yes" if "cat" in text else "no", "multilabel": several, "regress": text.count("the") / 2}
        return {"text": " ".join(text), "pair": " ".join(draw.choices(words, k=3)), "label": label[name]}

    return lines(path, *(row() for _ in range(count)))


@needs("accelerate", "tensorboard", "sklearn", "scipy", "pyarrow")
class TestRun:
    @pytest.mark.parametrize(
        ("name", "pair"), [("classify", None), ("classify", "pair"), ("multilabel", None), ("regress", None)]
    )
    def test_the_curve_is_transformers(self, name: str, pair: str | None, checkpoint: str, tmp_path: Path) -> None:
        paths = {split: made_up(tmp_path / f"{split}.jsonl", name, n, n) for split, n in (("train", 40), ("dev", 12))}
        run = tuned(registry.make(name, Given(**paths, pair=pair)), checkpoint, tmp_path / "run", epochs=10)
        curve, expected = curve_of(run), transformers_curve(run, tmp_path)
        assert len(curve) == len(expected) == 50
        np.testing.assert_allclose(curve, expected, rtol=1e-4)
        assert np.mean(curve[-5:]) < 0.8 * np.mean(curve[:5])

    def test_dev_must_be_other_data(self, checkpoint: str, tmp_path: Path) -> None:
        path = made_up(tmp_path / "train.jsonl", "classify", 20, 1)
        copied = tmp_path / "copy.jsonl"
        copied.write_text(Path(path).read_text())
        task = registry.make("classify", Given(train=path, dev=str(copied)))
        with pytest.raises(
            InputError, match=r"copy\.jsonl has the very rows of .*train\.jsonl: dev data must be other"
        ):
            Finetuning(task, Tuning(checkpoint), tmp_path / "run", device=CPU)
        assert not (tmp_path / "run").exists()

    def test_a_dev_file_without_labels_is_told(
        self, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fastbert = runner(capsys, monkeypatch)
        train = made_up(tmp_path / "train.jsonl", "classify", 20, 1)
        dev = lines(tmp_path / "dev.jsonl", {"text": "a", "label": None})
        options = ("--model", checkpoint, "--data", train, "--dev", dev, "-o", tmp_path / "run", "--device", "cpu")
        status, _, said = fastbert("finetune", "classify", *options)
        assert status == 1
        assert is_one_line(said)
        assert "dev.jsonl has no row that can be used: 1 x no label at 'label' (left out)" in said
