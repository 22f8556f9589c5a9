"""Words to tags: what files may hold, and what is said of them."""

import json
from pathlib import Path

import pytest

from fastbert.errors import InputError
from fastbert.tasks import registry
from fastbert.tasks.task import DEV, TEST, TRAIN, Given
from tests.optional import needs
from tests.tagged import COLUMNS, IOB2, SENTENCES, read, task, written

seqeval = pytest.importorskip("seqeval.metrics")
pytest.importorskip("pyarrow")


def test_columns_are_read_and_tags_are_iob2(tmp_path: Path) -> None:
    for text in (COLUMNS, COLUMNS.replace("\n", "\r\n"), COLUMNS.replace(" ", "\t")):
        examples = read(written(tmp_path, text), "ner")
        assert examples.inputs == SENTENCES
        assert examples.labels == IOB2
        assert examples.places == [f"{examples.name}, line 3", f"{examples.name}, line 8"]
        assert examples.notes == [f"{examples.name}: tags are IOB1, for the model IOB2"]
        assert not examples.problems.counts


def test_other_columns(tmp_path: Path) -> None:
    examples = read(written(tmp_path, COLUMNS), text="1", label="2")
    assert examples.labels == [["DT", "NN", "NN", "VBD"], ["NNS", "IN", "NN", "NN"]]
    assert read(written(tmp_path, COLUMNS), text="2", label="1").inputs[0] == ["DT", "NN", "NN", "VBD"]
    with pytest.raises(InputError, match=r"train\.txt, line 3: there is no column 7, but 4 columns"):
        read(tmp_path / "train.txt", label="7")
    with pytest.raises(InputError, match=r"--text must be the number of a column .* but is 'words'"):
        read(tmp_path / "train.txt", text="words")


def test_words_may_be_anything(tmp_path: Path) -> None:
    text = "# id = 1\n\u00a0\tO\n#\tO\nNew York\tB-LOC\n\u200b\u2028\tO\n\ud83d\ude00\tO\n"
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    examples = read(written(tmp_path, text, "x.tsv"))
    assert examples.inputs == [["\u00a0", "#", "New York", "\u200b\u2028", "\U0001f600"]]
    assert examples.problems.counts == {"a comment (left out)": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the O\ncat\n", r"train\.txt, line 2: 1 column, but 2 in line 1"),
        ("the\ncat\n", r"train\.txt, line 1: there are words, but no column with their tags"),
        ("\n\n", r"train\.txt has no sentence"),
        ("cat B-X\n\non PER\nmat O\n", r"train\.txt, line 3: the tag 'PER' is none like B-PER, as others are"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(written(tmp_path, text))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("the O\nM\u00fcll O\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"x\.txt, line 2: not UTF-8, but UTF-8 is wanted"):
        read(tmp_path / "x.txt")


def test_tags_that_are_wrong_are_counted_and_named(tmp_path: Path) -> None:
    text = "cat B-X\nmat I-X\n\ndog B-X\nmat I-X\n\non O\nmat I-X\n\nsat O\nmat I-X\n"
    examples = read(written(tmp_path, text))
    reason = "tags that are not IOB2 (read as conlleval does)"
    assert examples.problems.counts == {reason: 2}
    assert examples.problems.first[reason][0].endswith("line 7")
    assert examples.labels[2] == ["O", "B-X"]


def test_ner_is_of_entities(tmp_path: Path) -> None:
    path = written(tmp_path, "the DT\ncat NN\n")
    with pytest.raises(InputError, match="has tags as 'DT', not as B-PER or I-PER: `finetune tag` takes them"):
        read(path, "ner")
    made = task(path)
    assert made.head_options(made.read(TRAIN)[TRAIN])["id2label"] == {0: "DT", 1: "NN"}
    assert made.main == "accuracy"


def test_the_folder_of_conll(tmp_path: Path) -> None:
    for name, word in (("eng.train", "cat"), ("eng.testa", "dog"), ("eng.testb", "mat")):
        written(tmp_path, f"{word} X X I-X\n", name)
    made = task(tmp_path, "ner")
    assert [made.read(split)[split].inputs for split in (TRAIN, DEV, TEST)] == [[["cat"]], [["dog"]], [["mat"]]]
    (tmp_path / "eng.testa").unlink()
    assert made.read(DEV) == {}
    with pytest.raises(InputError, match=r"has no eng\.testa or valid\.txt"):
        registry.make("ner", Given(dev=str(tmp_path))).read(DEV)


@pytest.mark.parametrize("key", ["words", "tokens"])
def test_lists_of_words(tmp_path: Path, key: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{key: words, "tags": tags} for words, tags in zip(SENTENCES, IOB2, strict=True)] + [{key: [], "tags": []}]
    path = written(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "x.jsonl")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for each in (path, tmp_path / "x.parquet"):
        examples = read(each)
        assert (examples.inputs, examples.labels) == ([*SENTENCES, []], [*IOB2, []])
        assert examples.problems.counts == {"a sentence without words (kept)": 1}
    with pytest.raises(InputError, match=r"x\.jsonl, line 1: 4 words, but 1 tags"):
        read(written(tmp_path, json.dumps({key: SENTENCES[0], "tags": ["O"]}) + "\n", "x.jsonl"))
    with pytest.raises(InputError, match="must have words, but has"):
        read(written(tmp_path, json.dumps({key: [1], "tags": ["O"]}) + "\n", "x.jsonl"))


@needs("datasets")
def test_datasets_whose_tags_are_numbers(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value

    names = ["O", "B-ANIMAL", "I-ANIMAL", "B-PLACE", "I-PLACE"]
    columns = Features({"tokens": Sequence(Value("string")), "ner_tags": Sequence(ClassLabel(names=names))})
    rows = {"tokens": SENTENCES, "ner_tags": [[names.index(tag) for tag in tags] for tags in IOB2]}
    DatasetDict({TRAIN: Dataset.from_dict(rows, features=columns)}).save_to_disk(tmp_path / "d")
    for path in (f"dataset:{tmp_path / 'd'}:train", tmp_path / "d"):
        examples = read(path, "ner", label="ner_tags")
        assert (examples.inputs, examples.labels) == (SENTENCES, IOB2)
