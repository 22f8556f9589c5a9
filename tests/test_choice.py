"""Multiple choice: files in every layout, bad ones, judging, and training as transformers trains."""

import csv
import json
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from fastbert.errors import InputError
from fastbert.tasks import FILE, registry
from fastbert.tasks.choice import ChoiceTask
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Tokenizing
from fastbert.tasks.task import DEV, TEST, TRAIN, Given
from tests.checkpoints import WORDS, tiny_checkpoint
from tests.command import is_one_line, runner
from tests.optional import needs
from tests.tuned import curve_of, transformers_curve, tuned

SWAG = ["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source", *(f"ending{i}" for i in range(4))]
SWAG_ROWS = [
    ["0", "v", "1", "A cat sat. It", "A cat sat.", "It", "gold", "ran, fast.", "sang.", 'said "a".', "was red.", "2"],
    ["1", "v", "2", "Dogs ran. A dog", "Dogs ran.", "A dog", "gen", "sat.", "is a tree.", "sang.", "ran on.", "0"],
]
SWAG_INPUTS = [
    ("A cat sat.", ("It ran, fast.", "It sang.", 'It said "a".', "It was red.")),
    ("Dogs ran.", ("A dog sat.", "A dog is a tree.", "A dog sang.", "A dog ran on.")),
]


def table(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(name: str, split: str = TRAIN, **given: Any) -> Examples:
    (examples,) = registry.make(name, Given(**given)).read(split).values()
    return examples


class TestFiles:
    def test_swag(self, tmp_path: Path) -> None:
        examples = read("swag", train=str(table(tmp_path / "train.csv", [*SWAG, "label"], *SWAG_ROWS)))
        assert (examples.inputs, examples.labels) == (SWAG_INPUTS, [2, 0])
        assert examples.places == [f"{tmp_path}/train.csv, line {i}" for i in (2, 3)]

    def test_swag_with_its_right_endings_apart(self, tmp_path: Path) -> None:
        """The fourth wrong one, which not all have, is left out; the right one is not always the first."""
        header = ["video-id", "startphrase", "sent1", "sent2", "gold-ending", *(f"distractor-{i}" for i in range(4))]
        rows = [["v", f"Cat {i}. It", f"Cat {i}.", "It", "ran", "a", "b", "c", ""] for i in range(50)]
        examples = read("swag", train=str(table(tmp_path / "train_full.csv", header, *rows)))
        assert {len(choices) for _, choices in examples.inputs} == {4}
        for (_, choices), label in zip(examples.inputs, examples.labels, strict=True):
            assert choices[label] == "It ran"
            assert [choice for choice in choices if choice != "It ran"] == ["It a", "It b", "It c"]
        assert set(examples.labels) == {0, 1, 2, 3}

    def test_a_folder_has_all_splits(self, tmp_path: Path) -> None:
        for name, labels in (
            ("train", [["label"], ["2"], ["0"]]),
            ("val", [["label"], ["1"], ["3"]]),
            ("test", [[]] * 3),
        ):
            rows = [[*cells[:11], *label] for cells, label in zip([SWAG, *SWAG_ROWS], labels, strict=True)]
            table(tmp_path / f"{name}.csv", *rows)
        for split, labels in ((TRAIN, [2, 0]), (DEV, [1, 3]), (TEST, [None, None])):
            assert read("swag", split, train=str(tmp_path)).labels == labels
        assert read("swag", DEV, dev=str(tmp_path)).labels == [1, 3]
        (tmp_path / "val.csv").unlink()
        task = registry.make("swag", Given(train=str(tmp_path)))
        assert task.read(DEV) == {}
        (tmp_path / "train.csv").unlink()
        with pytest.raises(InputError, match=r"has no train\.csv"):
            task.read(TRAIN)

    def test_hellaswag(self, tmp_path: Path) -> None:
        row = {
            "ind": 4,
            "ctx_a": "A man sits.",
            "ctx_b": "he",
            "ctx": "A man sits. he",
            "endings": ["a", "b", "c", "d"],
        }
        path = lines(tmp_path / "h.jsonl", {**row, "label": "3"}, {**row, "ctx_b": "", "label": 0})
        examples = read("hellaswag", train=str(path))
        assert examples.inputs[0] == ("A man sits.", ("he a", "he b", "he c", "he d"))
        assert examples.inputs[1] == ("A man sits.", ("a", "b", "c", "d"))
        assert examples.labels == [3, 0]

    @needs("datasets")
    @pytest.mark.parametrize("prefix", ["", "dataset:"])
    def test_a_dataset(self, prefix: str, tmp_path: Path) -> None:
        import datasets

        def part(label: int) -> Any:
            rows = [dict(zip(SWAG[1:], cells[1:11], strict=True), label=label) for cells in SWAG_ROWS]
            return datasets.Dataset.from_list(rows)

        whole = datasets.DatasetDict({"train": part(1), "validation": part(3), "test": part(-1)})
        whole.save_to_disk(tmp_path / "all")
        for split, label in ((TRAIN, 1), (DEV, 3), (TEST, None)):
            examples = read("swag", split, train=f"{prefix}{tmp_path}/all")
            assert (examples.inputs, examples.labels) == (SWAG_INPUTS, [label] * 2)
        assert read("swag", DEV, dev=f"dataset:{tmp_path}/all:train").labels == [1, 1]
        part(2).save_to_disk(tmp_path / "one")
        assert read("swag", train=f"{prefix}{tmp_path}/one").labels == [2, 2]
        assert registry.make("swag", Given(train=f"{prefix}{tmp_path}/one")).read(DEV) == {}

    @pytest.mark.parametrize(
        ("name", "data", "expected"),
        [
            ("swag", "dataset:allenai/swag", "dataset:allenai/swag:regular:validation"),
            ("swag", "dataset:allenai/swag@v1:full:validation", None),
            ("hellaswag", "dataset:Rowan/hellaswag@v1", "dataset:Rowan/hellaswag@v1:validation"),
            ("choice", "dataset:me/questions", "dataset:me/questions:validation"),
            ("choice", "own.jsonl", None),
        ],
    )
    def test_what_is_judged_on_where_only_one_place_is_given(self, name: str, data: str, expected: str | None) -> None:
        task = registry.make(name, Given(train=data))
        assert isinstance(task, ChoiceTask)
        assert task._source(DEV) == expected
        assert task._source(TRAIN) == (data if expected is None else expected.replace("validation", "train"))

    @pytest.mark.parametrize("labels", [[2, "0"], ["C", "a"], ["big trees", "dogs"], [2.0, 0]], ids=str)
    def test_labels_of_ones_own_file(self, labels: list[Any], tmp_path: Path) -> None:
        rows = [{"text": "t", "choices": ["dogs", "cats", "big trees"], "label": label} for label in labels]
        assert read("choice", train=str(lines(tmp_path / "own.jsonl", *rows))).labels == [2, 0]

    def test_columns_of_ones_own_file(self, tmp_path: Path) -> None:
        path = table(tmp_path / "own.csv", ["q", "one", "two", "right"], ["who", "a, b", "c", "B"], ["", "d", "", "A"])
        given = {"text": "q", "choices": ("one", "two"), "label": "right"}
        examples = read("choice", train=str(path), **given)
        assert examples.inputs == [("who", ("a, b", "c")), ("", ("d", ""))]
        assert examples.labels == [1, 0]
        assert dict(examples.problems.counts) == {"an empty text (kept)": 1}

    def test_a_list_in_a_cell_is_json(self, tmp_path: Path) -> None:
        path = table(tmp_path / "own.csv", ["text", "choices", "label"], ["who", '["a, b", 7, "c"]', "1"])
        assert read("choice", train=str(path)).inputs == [("who", ("a, b", "7", "c"))]

    def test_rows_without_a_label_are_counted(self, tmp_path: Path) -> None:
        rows = [{"text": "t", "choices": ["a", "b"], "label": label} for label in (1, None, "", 0)]
        path = str(lines(tmp_path / "own.jsonl", *rows))
        for split in (TRAIN, DEV):
            examples = read("choice", split, **{split: path})
            assert examples.labels == [1, 0]
            assert dict(examples.problems.counts) == {"no label at 'label' (left out)": 2}
            assert examples.problems.first["no label at 'label' (left out)"][0] == f"{path}, line 2"


BAD = [
    (
        {"choices": ["a", "b"], "label": 2},
        "line 3: the label 2 is none of the 2 choices: an index from 0 is wanted, as",
    ),
    ({"choices": ["a", "b"], "label": -1}, "line 3: the label -1 is none of the 2 choices"),
    ({"choices": ["a", "b"], "label": "C"}, "line 3: the label 'C' is none of the 2 choices"),
    ({"choices": ["a"], "label": 0}, "line 3: a question needs two choices at least, but has 1"),
    ({"choices": [], "label": 0}, "line 3: a question needs two choices at least, but has 0"),
    ({"choices": "a, b", "label": 0}, "line 3: 'choices' must be a list of choices, but is 'a, b': --choices takes"),
    ({"label": 0}, "line 3: 'choices' must be a list of choices, but is None"),
]


class TestBadInput:
    @pytest.mark.parametrize(("row", "message"), BAD, ids=lambda value: str(value)[:40])
    def test_a_row(self, row: dict[str, Any], message: str, tmp_path: Path) -> None:
        good = {"text": "t", "choices": ["a", "b"], "label": 1}
        path = lines(tmp_path / "own.jsonl", good, good, {"text": "t", **row})
        with pytest.raises(InputError, match=r"own\.jsonl, ") as raised:
            read("choice", train=str(path))
        assert message in str(raised.value)

    def test_a_label_that_may_be_two_choices(self, tmp_path: Path) -> None:
        rows = [{"text": "t", "choices": ["1", "0"], "label": label} for label in ("0", "1")]
        with pytest.raises(InputError, match=r"line 1: the label '0' may be an index from 0 or the text of one"):
            read("choice", train=str(lines(tmp_path / "own.jsonl", *rows)))
        rows = [{"text": "t", "choices": ["0", "1"], "label": label} for label in ("0", "1")]
        assert read("choice", train=str(lines(tmp_path / "own.jsonl", *rows))).labels == [0, 1]

    @pytest.mark.parametrize("missing", ["sent1", "sent2", "ending3", "label"])
    def test_a_missing_column(self, missing: str, tmp_path: Path) -> None:
        header = ["other" if name == missing else name for name in [*SWAG, "label"]]
        with pytest.raises(InputError, match=rf"train\.csv has no column '{missing}', but '', 'video-id'"):
            read("swag", train=str(table(tmp_path / "train.csv", header, *SWAG_ROWS)))

    def test_options_of_other_tasks(self) -> None:
        with pytest.raises(InputError, match="--choices is no option of swag, which has none"):
            registry.make("swag", Given(train="x", choices=("a", "b")))
        with pytest.raises(InputError, match="--pair is no option of choice, which has only --choices and --label and"):
            registry.make("choice", Given(train="x", pair="a"))

    def test_training_questions_of_different_numbers_of_choices(self, tmp_path: Path) -> None:
        rows = [{"text": "t", "choices": ["a", "b", "c"][:n], "label": 1} for n in (3, 3, 2)]
        task = registry.make("choice", Given(train=str(lines(tmp_path / "own.jsonl", *rows))))
        with pytest.raises(InputError, match=r"line 3: a question of 2 choices, where others have 3: to train, all"):
            task.head_options(task.read(TRAIN)[TRAIN])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def tokenizing(checkpoint: str) -> Tokenizing:
    return Tokenizing(AutoTokenizer.from_pretrained(checkpoint), 48, True)


def examples_of(*questions: tuple[str, tuple[str, ...], int | None]) -> Examples:
    examples = Examples("made up")
    for context, choices, label in questions:
        examples.add((context, choices), label, f"made up, line {len(examples) + 1}")
    return examples


class TestFeatures:
    def test_are_pairs_of_a_question_together(self, checkpoint: str) -> None:
        examples = examples_of(("the cat", ("sat", "ran on a mat"), 1), ("dogs", ("", "sang"), 0))
        task, made = ChoiceTask("choice", Given()), tokenizing(checkpoint)
        features = task.features(examples, made, None)
        expected = made.tokenizer(
            [c for c, of, _ in _rows(examples) for _ in of], [x for _, of, _ in _rows(examples) for x in of]
        )
        assert features.tokens.ids.tolist() == flat(expected["input_ids"])
        assert features.tokens.types.tolist() == flat(expected["token_type_ids"])
        assert (features.group, len(features), features.labels["labels"].tolist()) == (2, 2, [1, 0])
        batch = features.batch(np.asarray([1]))
        assert batch["input_ids"][0].tolist() == flat(expected["input_ids"][2:])
        assert batch["labels"].tolist() == [0]

    def test_judge_takes_any_number_of_choices(self, checkpoint: str) -> None:
        logits = [[0.0, 2.0], [1.0, -1.0, 0.0], [3.0, 1.0, 4.0, 1.0]]
        examples = examples_of(*(("cat", ("a",) * len(of), label) for of, label in zip(logits, (1, 2, 2), strict=True)))
        judge = ChoiceTask("choice", Given()).judge(examples, tokenizing(checkpoint), None)
        scores = judge.score(np.asarray(flat(logits), np.float32)[:, None])
        assert scores.metrics == {"accuracy": pytest.approx(2 / 3)}
        each = [torch.tensor(of).log_softmax(-1)[label] for of, label in zip(logits, (1, 2, 2), strict=True)]
        assert scores.loss == pytest.approx(-float(sum(each)) / 3, rel=1e-6)
        assert [prediction["index"] for prediction in scores.predictions] == [1, 0, 2]
        assert scores.predictions[1]["scores"] == pytest.approx(torch.tensor(logits[1]).softmax(-1).tolist())
        assert scores.measure(np.asarray([1, 1])) == {"accuracy": 0.0}

    def test_without_labels_there_are_predictions_alone(self, checkpoint: str) -> None:
        examples = examples_of(("cat", ("a", "b"), None))
        judge = ChoiceTask("choice", Given()).judge(examples, tokenizing(checkpoint), None)
        scores = judge.score(np.asarray([[0.0], [1.0]], np.float32))
        assert (scores.metrics, scores.loss, len(scores.predictions)) == ({}, None, 1)


def flat(rows: list[list[Any]]) -> list[Any]:
    return [*chain.from_iterable(rows)]


def _rows(examples: Examples) -> list[tuple[str, tuple[str, ...], Any]]:
    return [(*question, label) for question, label in zip(examples.inputs, examples.labels, strict=True)]


def made_up(path: Path, count: int, seed: int) -> Path:
    """The right choice has the context's animal."""
    draw = Random(seed)
    words = [word for word in WORDS if word not in ("cat", "dog", "##s", "##ing")]

    def row() -> dict[str, Any]:
        animal, other = draw.sample(["cat", "dog"], 2)
        right = draw.randrange(3)
        some = [
            " ".join([*draw.choices(words, k=draw.randint(0, 5)), animal if i == right else other]) for i in range(3)
        ]
        return {
            "text": " ".join([animal, *draw.choices(words, k=draw.randint(0, 9))]),
            "choices": some,
            "label": "ABC"[right],
        }

    return lines(path, *(row() for _ in range(count)))


@needs("accelerate", "tensorboard", "sklearn", "scipy", "pyarrow")
class TestRun:
    def test_the_curve_is_transformers(self, checkpoint: str, tmp_path: Path) -> None:
        train, dev = (str(made_up(tmp_path / f"{name}.jsonl", n, n)) for name, n in (("train", 40), ("dev", 6)))
        task = registry.make("choice", Given(train=train, dev=dev))
        run = tuned(task, checkpoint, tmp_path / "run", epochs=10)
        curve, expected = curve_of(run), transformers_curve(run, tmp_path)
        assert len(curve) == len(expected) == 50
        np.testing.assert_allclose(curve, expected, rtol=1e-4)
        assert curve[-1] < 0.8 * curve[0]

    def test_from_a_checkpoint_to_predictions(
        self, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fastbert = runner(capsys, monkeypatch)
        train, dev = made_up(tmp_path / "train.jsonl", 160, 1), made_up(tmp_path / "dev.jsonl", 60, 2)
        options = ("--dev", dev, "--epochs", 8, "--learning-rate", "3e-3", "--dropout", 0, "--device", "cpu")
        status, _, said = fastbert(
            "finetune", "choice", "--model", checkpoint, "--data", train, "-o", tmp_path / "run", *options
        )
        assert status == 0, said
        model = tmp_path / "run" / "model"
        status, found, said = fastbert("evaluate", tmp_path / "run", "--data", dev, "--json")
        assert status == 0, said
        split = json.loads(found)["splits"]["dev"]
        assert split["metrics"]["accuracy"] > 0.9, "chance is 0.33"
        status, _, said = fastbert("predict", model, dev, "-o", tmp_path / "p.jsonl")
        assert status == 0, said
        predicted = [json.loads(line)["index"] for line in (tmp_path / "p.jsonl").read_text().splitlines()]
        true = [json.loads(line)["label"] for line in dev.read_text().splitlines()]
        agree = np.mean(["ABC".index(label) == index for label, index in zip(true, predicted, strict=True)])
        assert agree == pytest.approx(split["metrics"]["accuracy"])
        status, _, said = fastbert("evaluate", model, "--data", dev, "--choices", "endings")
        assert status == 1
        assert is_one_line(said)
        assert "has no column 'endings'" in said

    def test_a_model_says_its_columns(self, tmp_path: Path) -> None:
        task = registry.make("choice", Given(train="x", text="q", choices=("a", "b")))
        (tmp_path / FILE).write_text(json.dumps(task.saved()))
        found = registry.load(str(tmp_path), Given(dev="y", label="l"))
        assert found is not None
        assert found[0].given == Given(dev="y", text="q", choices=("a", "b"), label="l")
        assert list(found[0].columns.values()) == ["q", "a", "b"]
