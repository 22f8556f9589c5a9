"""GLUE's tasks: a few made-up lines of each in its official layout, `datasets`, and what is submitted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastbert.errors import InputError
from fastbert.tasks import registry
from fastbert.tasks.examples import Examples
from fastbert.tasks.glue import TASKS, GlueTask
from fastbert.tasks.scores import Scores
from fastbert.tasks.task import DEV, TEST, TRAIN, Given
from tests.optional import needs

# By task: the header of train and dev, two rows, and what is in them; the header and a row of test.
CASES: dict[str, tuple[str | None, list[str], list[Any], list[Any], str, str, Any]] = {
    "cola": (
        None,
        ['gj04\t1\t\tThe cat said "no.', "gj04\t0\t*\tCat the sat."],
        ['The cat said "no.', "Cat the sat."],
        ["acceptable", "unacceptable"],
        "index\tsentence",
        "0\tA dog ran.",
        "A dog ran.",
    ),
    "sst2": (
        "sentence\tlabel",
        ['a "fine film \t1', "dull , \"' \t0"],
        ['a "fine film ', "dull , \"' "],
        ["positive", "negative"],
        "index\tsentence",
        "0\tso so",
        "so so",
    ),
    "mrpc": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t7\t8\t"Yes , he said .\tHe said yes .', "0\t9\t10\tA b .\tC d ."],
        [('"Yes , he said .', "He said yes ."), ("A b .", "C d .")],
        ["equivalent", "not_equivalent"],
        "index\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "0\t1\t2\tE .\tF .",
        ("E .", "F ."),
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        ["0\tm\tf\t2012\t1\tn\tn\tA cat.\tA dog.\t2.750", "1\tm\tf\t2012\t2\tn\tn\tA.\tA.\t5.000"],
        [("A cat.", "A dog."), ("A.", "A.")],
        [2.75, 5.0],
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2",
        "0\tm\tf\t2012\t3\tn\tn\tB.\tC.",
        ("B.", "C."),
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ["5\t1\t2\tWho is he?\tWho is it?\t0", "6\t3\t4\tWhy?\tWhy so?\t1"],
        [("Who is he?", "Who is it?"), ("Why?", "Why so?")],
        ["not_duplicate", "duplicate"],
        "id\tquestion1\tquestion2",
        "0\tHow?\tHow so?",
        ("How?", "How so?"),
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ["0\tWho?\tHe did.\tentailment", "1\tWhen?\tHere.\tnot_entailment"],
        [("Who?", "He did."), ("When?", "Here.")],
        ["entailment", "not_entailment"],
        "index\tquestion\tsentence",
        "0\tWhere?\tThere.",
        ("Where?", "There."),
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tA b.\tA.\tentailment", "1\tA.\tB.\tnot_entailment"],
        [("A b.", "A."), ("A.", "B.")],
        ["entailment", "not_entailment"],
        "index\tsentence1\tsentence2",
        "0\tC.\tD.",
        ("C.", "D."),
    ),
    "wnli": (
        "index\tsentence1\tsentence2\tlabel",
        ["0\tIt ran.\tCats ran.\t1", "1\tIt sat.\tMats sat.\t0"],
        [("It ran.", "Cats ran."), ("It sat.", "Mats sat.")],
        ["entailment", "not_entailment"],
        "index\tsentence1\tsentence2",
        "0\tHe.\tShe.",
        ("He.", "She."),
    ),
}
_PARSES = "sentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\tsentence2_parse"
MNLI = f"index\tpromptID\tpairID\tgenre\t{_PARSES}\tsentence1\tsentence2"


def write(folder: Path, name: str, header: str | None, rows: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [*([] if header is None else [header]), *rows]
    (folder / f"{name}.tsv").write_bytes("".join(f"{line}\n" for line in lines).encode())


def read(name: str, folder: Path | str, split: str) -> dict[str, Examples]:
    return registry.make(name, Given(train=str(folder))).read(split)


@pytest.mark.parametrize("name", CASES)
def test_official_files(name: str, tmp_path: Path) -> None:
    """Quotes are letters; the folder is the task's, or holds it."""
    header, rows, inputs, labels, test_header, test_row, test_input = CASES[name]
    folder = tmp_path / TASKS[name].folder
    write(folder, "train", header, rows)
    write(folder, "dev", header, rows[::-1])
    write(folder, "test", test_header, [test_row])
    for place in (folder, tmp_path):
        train, dev, test = (read(name, place, split)[split] for split in (TRAIN, DEV, TEST))
        assert (train.inputs, train.labels) == (inputs, labels)
        assert (dev.inputs, dev.labels) == (inputs[::-1], labels[::-1])
        assert (test.inputs, test.labels) == ([test_input], [None])
    line = 1 if header is None else 2
    assert train.places == [f"{folder}/train.tsv, line {line + i}" for i in range(2)]
    assert not train.problems.counts


def test_mnli_has_two_dev_and_test_sets(tmp_path: Path) -> None:
    def row(i: int, *labels: str) -> str:
        return "\t".join([str(i), "1", "1e", "fiction", *("( x )",) * 4, f"A {i}.", f"B {i}.", *labels])

    write(tmp_path, "train", f"{MNLI}\tlabel1\tgold_label", [row(0, "neutral", "neutral")])
    more = "\t".join(f"label{i}" for i in range(1, 6))
    write(tmp_path, "dev_matched", f"{MNLI}\t{more}\tgold_label", [row(1, *("entailment",) * 6)])
    write(tmp_path, "dev_mismatched", f"{MNLI}\t{more}\tgold_label", [row(2, *("contradiction",) * 6)])
    for i, name in enumerate(("test_matched", "test_mismatched")):
        write(tmp_path, name, MNLI, [row(3 + i)])
    assert read("mnli", tmp_path, TRAIN)[TRAIN].labels == ["neutral"]
    dev, test = read("mnli", tmp_path, DEV), read("mnli", tmp_path, TEST)
    assert {name: of.labels for name, of in dev.items()} == {"matched": ["entailment"], "mismatched": ["contradiction"]}
    assert [of.inputs for of in test.values()] == [[("A 3.", "B 3.")], [("A 4.", "B 4.")]]
    task = registry.make("mnli", Given(train=str(tmp_path)))
    assert [task.write_test(of, said("neutral"))[0] for of in test.values()] == ["MNLI-m.tsv", "MNLI-mm.tsv"]


class TestBadFiles:
    def test_rows_of_other_cells_are_counted(self, tmp_path: Path) -> None:
        rows = ["a fine film\t1", "no label", "two\ttabs\t0", "\t0"]
        write(tmp_path, "train", "sentence\tlabel", rows)
        examples = read("sst2", tmp_path, TRAIN)[TRAIN]
        assert examples.inputs == ["a fine film", ""]
        other = "a row with more or fewer cells than there are columns (left out)"
        assert dict(examples.problems.counts) == {other: 2, "an empty text (kept)": 1}
        assert examples.problems.first[other] == [f"{tmp_path}/train.tsv, line {i}" for i in (3, 4)]

    @pytest.mark.parametrize(
        ("name", "header", "row", "message"),
        [
            ("sst2", "sentence\tlabel", "a\t2", r"line 2: the label '2' is none of sst2's: 0, 1"),
            ("rte", CASES["rte"][0], "0\ta\tb\tentails", r"line 2: the label 'entails' is none of rte's: entailment"),
            (
                "stsb",
                CASES["stsb"][0],
                "0\tm\tf\ty\t1\tn\tn\tA\tB\thigh",
                r"line 2: 'score' must be a number, but is 'h",
            ),
            ("stsb", CASES["stsb"][0], "0\tm\tf\ty\t1\tn\tn\tA\tB\tnan", r"line 2: 'score' must be a number"),
            (
                "sst2",
                "index\tsentence",
                "0\ta",
                r"has no column 'label', but 'index', 'sentence': is it another task's",
            ),
            ("cola", "", "a\tb", r"no row that can be used: 2 x a row with more or fewer cells"),
        ],
    )
    def test_are_told(self, name: str, header: str | None, row: str, message: str, tmp_path: Path) -> None:
        write(tmp_path, "train", header, [row])
        with pytest.raises(InputError, match=message):
            read(name, tmp_path, TRAIN)

    def test_no_folder_no_train_and_two_folders(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"x\.csv is no folder: sst2 is read from GLUE's own"):
            read("sst2", "x.csv", TRAIN)
        with pytest.raises(InputError, match=r"has no train\.tsv"):
            read("sst2", tmp_path, TRAIN)
        assert read("sst2", tmp_path, DEV) == {}
        with pytest.raises(InputError, match="--dev is no option of sst2, whose folder has its own"):
            registry.make("sst2", Given(train="a", dev="b"))
        with pytest.raises(InputError, match="--text is no option of sst2, which has none"):
            registry.make("sst2", Given(train="a", text="b"))
        with pytest.raises(InputError, match="there is no task 'sst3', perhaps sst2"):
            registry.make("sst3", Given(train="a"))


HUB = {  # columns, and the classes by number
    "cola": (("sentence",), ["unacceptable", "acceptable"]),
    "sst2": (("sentence",), ["negative", "positive"]),
    "mrpc": (("sentence1", "sentence2"), ["not_equivalent", "equivalent"]),
    "stsb": (("sentence1", "sentence2"), [0.5, 1.5]),
    "qqp": (("question1", "question2"), ["not_duplicate", "duplicate"]),
    "mnli": (("premise", "hypothesis"), ["entailment", "neutral", "contradiction"]),
    "qnli": (("question", "sentence"), ["entailment", "not_entailment"]),
    "rte": (("sentence1", "sentence2"), ["entailment", "not_entailment"]),
    "wnli": (("sentence1", "sentence2"), ["not_entailment", "entailment"]),
}


@needs("datasets")
@pytest.mark.parametrize("name", HUB)
def test_datasets(name: str, tmp_path: Path) -> None:
    """As `datasets` saves nyu-mll/glue: its own columns, classes by number, -1 where there is none."""
    import datasets

    columns, classes = HUB[name]
    labels = [float(i) + 0.5 for i in range(2)] if name == "stsb" else list(range(len(classes)))

    def part(labels: list[Any]) -> Any:
        texts = {key: [f"{key} {i}" for i in range(len(labels))] for key in columns}
        return datasets.Dataset.from_dict({**texts, "label": labels, "idx": list(range(len(labels)))})

    own = [f"{split}_{kind}matched" for split in ("validation", "test") for kind in ("", "mis")]
    names = own if name == "mnli" else ["validation", "test"]
    parts = {"train": part(labels), **{key: part([-1] if "test" in key else labels[::-1]) for key in names}}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved.v1")
    for place in (tmp_path / "saved.v1", f"dataset:{tmp_path}/saved.v1"):
        train = read(name, place, TRAIN)[TRAIN]
        inputs = [tuple(f"{key} {i}" for key in columns) for i in range(len(labels))]
        assert train.inputs == [texts[0] if len(texts) == 1 else texts for texts in inputs]
        assert train.labels == classes
        dev, test = read(name, place, DEV), read(name, place, TEST)
        assert [examples.labels for examples in dev.values()] == [classes[::-1]] * len(dev)
        assert [examples.labels for examples in test.values()] == [[None]] * len(test)
        assert len(dev) == len(test) == (2 if name == "mnli" else 1)
    task = registry.make(name, Given(train=str(tmp_path / "saved.v1")))
    prediction = {"score": 2.0} if name == "stsb" else {"label": str(classes[0])}
    files = [task.write_test(examples, of_predictions(prediction))[0] for examples in test.values()]
    folder = TASKS[name].folder
    assert files == (["MNLI-m.tsv", "MNLI-mm.tsv"] if name == "mnli" else [f"{folder}.tsv"])


@needs("datasets")
@pytest.mark.parametrize("label", [2, -2])
def test_a_class_that_the_task_does_not_have(label: int, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [0, label]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=rf"row 2: the label {label} is none of sst2's"):
        read("sst2", tmp_path / "saved", TRAIN)


def of_predictions(*predictions: dict[str, Any]) -> Scores:
    return Scores(lambda rows: {}, len(predictions), predictions=predictions)


def said(*labels: str) -> Scores:
    return of_predictions(*({"label": label} for label in labels))


class TestSubmission:
    @pytest.mark.parametrize(
        ("name", "labels", "lines"),
        [
            ("cola", ["acceptable", "unacceptable"], ["1", "0"]),
            ("qnli", ["entailment", "not_entailment"], ["entailment", "not_entailment"]),
            ("mrpc", ["equivalent", "not_equivalent"], ["1", "0"]),
        ],
    )
    def test_has_the_files_own_classes(self, name: str, labels: list[str], lines: list[str], tmp_path: Path) -> None:
        task = registry.make(name, Given(train=str(tmp_path)))
        examples = Examples(f"{tmp_path}/test.tsv")
        for i in range(2):
            examples.add("a", None, f"line {i}")
        file, content = task.write_test(examples, said(*labels))
        assert file == f"{TASKS[name].folder}.tsv"
        assert content == f"index\tprediction\n0\t{lines[0]}\n1\t{lines[1]}\n"

    def test_of_a_number_is_between_0_and_5(self, tmp_path: Path) -> None:
        task = registry.make("stsb", Given(train=str(tmp_path)))
        examples = Examples("test.tsv", inputs=["a"] * 3, labels=[None] * 3, ids=[0, 1, 2])
        _, content = task.write_test(examples, of_predictions({"score": -0.2}, {"score": 3.14159}, {"score": 5.4}))
        assert content == "index\tprediction\n0\t0.000\n1\t3.142\n2\t5.000\n"

    def test_has_the_files_own_indices(self, tmp_path: Path) -> None:
        """A row that cannot be read shifts no other."""
        write(tmp_path, "test", "index\tsentence", ["0\ta", "1\tb\tc", "2\td"])
        examples = read("sst2", tmp_path, TEST)[TEST]
        _, content = registry.make("sst2", Given(train=str(tmp_path))).write_test(
            examples, said("positive", "negative")
        )
        assert content == "index\tprediction\n0\t1\n2\t0\n"


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("cola", ["matthews"]),
        ("sst2", ["accuracy"]),
        ("mrpc", ["f1", "accuracy"]),
        ("stsb", ["spearman", "pearson"]),
        ("qqp", ["f1", "accuracy"]),
        ("mnli", ["accuracy"]),
        ("qnli", ["accuracy"]),
        ("rte", ["accuracy"]),
        ("wnli", ["accuracy"]),
    ],
)
@needs("sklearn", "scipy")
def test_figures_are_glues(name: str, figures: list[str], tmp_path: Path) -> None:
    """F1 is of paraphrases and duplicates, class 1."""
    task = registry.make(name, Given(train=str(tmp_path)))
    assert isinstance(task, GlueTask)
    labels, predicted = np.asarray([1, 1, 0, 0, 0]), np.asarray([1, 0, 1, 0, 0])
    found = task._measure(labels, predicted)(np.arange(5))
    assert list(found) == figures
    assert task.main in figures
    expected = {"accuracy": 0.6, "f1": 0.5, "matthews": 1 / 6, "pearson": 1 / 6, "spearman": 1 / 6}
    assert found == pytest.approx({key: expected[key] for key in figures})


def test_a_task_knows_its_classes_without_data(tmp_path: Path) -> None:
    examples = Examples("train.tsv", inputs=["a"], labels=["positive"])
    head = registry.make("sst2", Given(train=str(tmp_path))).head_options(examples)
    assert head["id2label"] == {0: "negative", 1: "positive"}
    assert head["problem_type"] == "single_label_classification"
