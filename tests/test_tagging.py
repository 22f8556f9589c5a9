"""Words to tags: word pieces, windows, figures, and a run from start to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

from fastbert.errors import InputError
from fastbert.inference.encoding import takes_types
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Tokenizing
from fastbert.tasks.tagging.task import TaggingTask
from fastbert.tasks.task import DEV, TEST, TRAIN
from fastbert.training.finetuning import Finetuning
from fastbert.training.tuning import Tuning
from tests.checkpoints import tiny_checkpoint
from tests.command import is_one_line, runner
from tests.heads import checkpoint
from tests.tagged import COLUMNS, IOB2, WORDS, made_up, task, written
from tests.tuned import curve_of, transformers_curve

seqeval = pytest.importorskip("seqeval.metrics")
pytest.importorskip("pyarrow")


# Word pieces and windows.


def tokenizing_of(made: TaggingTask, folder: str, max_length: int = 48, stride: int = 8) -> Tokenizing:
    tokenizer = made.tokenizer(AutoTokenizer.from_pretrained(folder))
    model = AutoModelForTokenClassification.from_pretrained(folder)
    return Tokenizing(tokenizer, max_length, takes_types(model, tokenizer), stride)


@pytest.fixture
def made(tmp_path: Path) -> tuple[TaggingTask, Examples, Any]:
    made = task(written(tmp_path, COLUMNS), "ner")
    (examples,) = made.read(TRAIN).values()
    return made, examples, _config(made, examples)


def _config(made: TaggingTask, examples: Examples) -> Any:
    from transformers import BertConfig

    return BertConfig(**made.head_options(examples))


def of_words(made: TaggingTask, sentences: list[list[str]], tags: list[list[str]]) -> Examples:
    examples = Examples("x")
    for words, labels in zip(sentences, tags, strict=True):
        examples.add(words, labels, f"sentence {len(examples)}")
    return examples


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert", "Albert", "Electra"])
def test_labels_stand_on_first_pieces(tmp_path: Path, made: tuple[Any, Any, Any], family: str) -> None:
    """As transformers' own examples do it: with the tokenizer that begins every word with a blank."""
    task, examples, config = made
    examples.add(["cats-dogs", "zebra", "birds"], ["B-ANIMAL", "O", "B-PLACE"], "x")
    folder = checkpoint(tmp_path / "m", f"{family}ForTokenClassification")
    tokenizing = tokenizing_of(task, folder)
    features = task.features(examples, tokenizing, config)
    tokenizing.tokenizer.save_pretrained(tmp_path / "t")
    stock = AutoTokenizer.from_pretrained(tmp_path / "t")
    ids, labels = [], []
    for words, tags in zip(examples.inputs, examples.labels, strict=True):
        encoded = stock(words, is_split_into_words=True)
        ids.append(encoded["input_ids"])
        before = None
        for word in encoded.word_ids():
            labels.append(-100 if word is None or word == before else config.label2id[tags[word]])
            before = word
    starts = features.tokens.starts
    assert [features.tokens.ids[a : a + len(row)].tolist() for a, row in zip(starts, ids, strict=True)] == ids
    assert features.labels["labels"].tolist() == labels
    assert features.weights.tolist() == [4, 4, 3]
    if family == "Roberta":
        assert ids[0][1] == stock.convert_tokens_to_ids(stock.tokenize("on the"))[1]


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("stride", [0, 7, 100])
def test_every_word_of_a_long_sentence_has_one_label(
    tmp_path: Path, made: tuple[Any, Any, Any], family: str, stride: int
) -> None:
    task, _, config = made
    names = list(config.label2id)
    random = np.random.default_rng(0)
    sentences = [random.choice(WORDS, n).tolist() for n in (130, 3, 61, 0, 20)]
    tags = [random.choice(names, len(words)).tolist() for words in sentences]
    examples = of_words(task, sentences, tags)
    tokenizing = tokenizing_of(task, checkpoint(tmp_path, f"{family}ForTokenClassification"), 24, stride)
    features = task.features(examples, tokenizing, config)
    assert features.tokens.lengths.max() <= 24
    assert len(features.tokens.lengths) > 10
    found = features.labels["labels"]
    assert [names[i] for i in found[found >= 0]] == [tag for sentence in tags for tag in sentence]
    assert features.weights.sum() == 214
    judge = task.judge(examples, tokenizing, config)
    exact = np.eye(len(names), dtype=np.float32)[np.where(found < 0, 0, found)]
    assert [each["tags"] for each in judge.score(exact).predictions] == tags


def test_words_that_the_tokenizer_makes_nothing_of(tmp_path: Path, made: tuple[Any, Any, Any]) -> None:
    task, _, config = made
    examples = of_words(task, [["the", "\u200b", "cat"], ["\u200d"]], [["O", "B-PLACE", "B-ANIMAL"], ["O"]])
    tokenizing = tokenizing_of(task, checkpoint(tmp_path, "BertForTokenClassification"))
    judge = task.judge(examples, tokenizing, config)
    scores = judge.score(np.eye(5, dtype=np.float32)[np.full(len(judge.tokens.ids), config.label2id["B-ANIMAL"])])
    assert [each["tags"] for each in scores.predictions] == [["B-ANIMAL", "O", "B-ANIMAL"], ["O"]]
    (reason,) = examples.problems.counts
    assert examples.problems.counts[reason] == 2
    assert examples.problems.first[reason][0] == "sentence 0: '\\u200b'"
    assert scores.metrics["accuracy"] == 0.5
    assert task.features(examples, tokenizing, config).weights.tolist() == [2, 0]


def test_a_tag_that_the_model_does_not_have(tmp_path: Path, made: tuple[Any, Any, Any]) -> None:
    task, _, config = made
    tokenizing = tokenizing_of(task, checkpoint(tmp_path, "BertForTokenClassification"))
    examples = of_words(task, [["cat"], ["the", "cat"]], [["O"], ["O", "B-ORG"]])
    for use in (task.features, task.judge):
        with pytest.raises(InputError, match="sentence 1: the tag 'B-ORG' is none of those that the model has: 'O', "):
            use(examples, tokenizing, config)


# Figures.

CASES = [  # true, predicted, and by hand: right, predicted, true
    ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 2, 2, 2),
    ("B-PER I-PER O B-LOC", "B-PER I-PER O I-LOC", 2, 2, 2),  # conlleval reads I- behind O as a beginning
    ("B-PER I-PER", "B-PER O", 0, 1, 1),
    ("B-PER I-PER", "B-PER B-PER", 0, 2, 1),
    ("B-PER I-PER", "B-PER I-LOC", 0, 2, 1),
    ("B-PER B-PER", "B-PER I-PER", 0, 1, 2),
    ("B-PER O", "B-LOC O", 0, 1, 1),
    ("O O", "O B-LOC", 0, 1, 0),
    ("O B-LOC", "O O", 0, 0, 1),
]


def logits_of(judge: Any, predicted: list[list[str]], config: Any, features: Any) -> Any:
    """Which make these the tags."""
    logits = np.zeros((len(judge.tokens.ids), config.num_labels), np.float32)
    places = np.flatnonzero(features.labels["labels"] >= 0)
    logits[places, [config.label2id[tag] for tags in predicted for tag in tags]] = 1
    return logits


def test_figures_are_conllevals_and_seqevals(tmp_path: Path) -> None:
    from seqeval.scheme import IOB2 as STRICT

    task_ = task(written(tmp_path, "a B-PER\na I-PER\na B-LOC\na O\n"), "ner")
    (train,) = task_.read(TRAIN).values()
    config = _config(task_, train)
    true, predicted = ([case[i].split() for case in CASES] for i in (0, 1))
    examples = of_words(task_, [["the"] * len(tags) for tags in true], true)
    tokenizing = tokenizing_of(task_, checkpoint(tmp_path, "BertForTokenClassification"))
    judge, features = task_.judge(examples, tokenizing, config), task_.features(examples, tokenizing, config)
    scores = judge.score(logits_of(judge, predicted, config, features))
    assert [each["tags"] for each in scores.predictions] == predicted
    right, ours, theirs = (sum(case[i] for case in CASES) for i in (2, 3, 4))
    assert scores.metrics["precision"] == right / ours == 4 / 12
    assert scores.metrics["recall"] == right / theirs == 4 / 11
    assert scores.metrics["f1"] == pytest.approx(2 * right / (ours + theirs))

    def of_seqeval(rows: Any, **mode: Any) -> dict[str, float]:
        pair = [true[i] for i in rows], [predicted[i] for i in rows]
        functions = {"f1": seqeval.f1_score, "precision": seqeval.precision_score, "recall": seqeval.recall_score}
        return {name: float(function(*pair, **mode)) for name, function in functions.items()}

    every = np.arange(len(CASES))
    drawn = np.random.default_rng(1).integers(len(CASES), size=30)
    for rows in (every, drawn):
        found = scores.measure(rows)
        assert found.pop("accuracy") == seqeval.accuracy_score([true[i] for i in rows], [predicted[i] for i in rows])
        assert found == pytest.approx(of_seqeval(rows), abs=1e-12)
    assert of_seqeval(every, mode="strict", scheme=STRICT)["recall"] < scores.metrics["recall"]

    report = seqeval.classification_report(true, predicted, output_dict=True)
    for row in scores.per_class:
        assert row["count"] == report[row["class"]]["support"]
        for ours_, theirs_ in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert row[ours_] == pytest.approx(report[row["class"]][theirs_])
    assert scores.predictions[0]["entities"] == [
        {"type": "PER", "text": "the the", "start": 0, "end": 2},
        {"type": "LOC", "text": "the", "start": 3, "end": 4},
    ]
    assert scores.classes == ["O", "LOC", "PER"]
    assert scores.confusion is not None
    assert scores.confusion.tolist() == [[5, 1, 0], [1, 2, 0], [1, 2, 10]]
    assert scores.loss == pytest.approx(
        float(
            torch.nn.functional.cross_entropy(
                torch.tensor(
                    [[float(label == tag) for label in config.label2id] for tags in predicted for tag in tags]
                ),
                torch.tensor([config.label2id[tag] for tags in true for tag in tags]),
            )
        )
    )


def test_tags_of_no_scheme_have_an_accuracy(tmp_path: Path) -> None:
    made = task(written(tmp_path, COLUMNS), label="2")
    (examples,) = made.read(TRAIN).values()
    config = _config(made, examples)
    tokenizing = tokenizing_of(made, checkpoint(tmp_path, "BertForTokenClassification"))
    judge, features = made.judge(examples, tokenizing, config), made.features(examples, tokenizing, config)
    predicted = [["DT", "NN", "DT", "VBD"], ["NNS", "IN", "NN", "NN"]]
    scores = judge.score(logits_of(judge, predicted, config, features))
    assert scores.metrics == {"accuracy": 7 / 8}
    assert "entities" not in scores.predictions[0]
    assert {row["class"]: (row["precision"], row["recall"], row["count"]) for row in scores.per_class}["DT"] == (
        0.5,
        1,
        1,
    )


def test_a_test_file_gets_a_column_in_its_own_scheme(tmp_path: Path) -> None:
    written(tmp_path, COLUMNS)
    written(tmp_path, COLUMNS, "test.txt")
    made = task(tmp_path, "ner")
    (train,), (test,) = made.read(TRAIN).values(), made.read(TEST).values()
    config = _config(made, train)
    tokenizing = tokenizing_of(made, checkpoint(tmp_path / "m", "BertForTokenClassification"))
    judge, features = made.judge(test, tokenizing, config), made.features(test, tokenizing, config)
    name, content = made.write_test(test, judge.score(logits_of(judge, IOB2, config, features)))
    assert name == "test.txt.predicted"
    expected = [f"{line} {line.split()[-1]}" if line else "" for line in COLUMNS.splitlines()]
    assert content.splitlines() == expected


# Runs.


def tuned(folder: Path, model: str, **options: Any) -> tuple[Finetuning, Path]:
    train = made_up(folder, "train.txt", 96, 0)
    dev = made_up(folder, "dev.txt", 24, 1)
    settings = {"epochs": 12, "learning_rates": (3e-3,), "batch_size": 16, "max_length": 16, "doc_stride": 4, **options}
    run = Finetuning(
        task(train, "ner", dev=str(dev)), Tuning(model, **settings), folder / "run", device=torch.device("cpu")
    )
    return run, run()


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_a_run_and_its_predictions(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Tagger finds in the dev sentences, given as words, what the evaluation found."""
    _, model = tuned(tmp_path, checkpoint(tmp_path / "base", f"{family}Model"))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["splits"][DEV]["metrics"]["f1"] > 0.7
    assert [row["class"] for row in results["splits"][DEV]["per_class"]] == ["ANIMAL", "PLACE"]
    lines = [json.loads(line) for line in (tmp_path / "run/dev-predictions.jsonl").read_text().splitlines()]

    rows = "".join(json.dumps({"words": line["words"]}) + "\n" for line in lines)
    run = runner(capsys, monkeypatch)
    texts, output = written(tmp_path, rows, "dev.jsonl"), tmp_path / "out.jsonl"
    status, _, _ = run("predict", model, texts, "--text", "words", "-o", output, "--device", "cpu")
    assert status == 0
    found = [json.loads(line)["entities"] for line in output.read_text().splitlines()]
    assert sum(map(len, found)) > 20
    for line, entities in zip(lines, found, strict=True):
        places = np.cumsum([0, *(len(word) + 1 for word in line["words"])]).tolist()
        expected = [(e["type"], e["text"], places[e["start"]], places[e["end"]] - 1) for e in line["entities"]]
        assert [(e["type"], e["text"], e["start"], e["end"]) for e in entities] == expected

    status, out, _ = run("evaluate", model, "--data", tmp_path / "dev.txt", "--device", "cpu", "--json")
    assert status == 0
    assert json.loads(out)["splits"][DEV]["metrics"] == results["splits"][DEV]["metrics"]
    stock = pipeline("token-classification", model=str(model), aggregation_strategy="first", device="cpu")
    if family == "Roberta":  # where the pipeline takes a blank that is a token for a word
        return
    short = [line for line in lines if len(line["words"]) < 7]  # one window
    assert len(short) > 5
    for line, entities in zip(short, stock([line["words"] for line in short], is_split_into_words=True), strict=True):
        assert [(e["entity_group"], e["word"]) for e in entities] == [(e["type"], e["text"]) for e in line["entities"]]


def test_text_is_tagged_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = tuned(tmp_path, tiny_checkpoint(tmp_path / "base"))
    run = runner(capsys, monkeypatch)
    texts, output = written(tmp_path, "the cats sat on the mat\n", "x.txt"), tmp_path / "out.jsonl"
    assert run("predict", model, texts, "-o", output, "--device", "cpu")[0] == 0
    (row,) = map(json.loads, output.read_text().splitlines())
    assert [(e["type"], e["text"]) for e in row["entities"]][-1] == ("PLACE", "mat")
    status, _, err = run("evaluate", model, "--data", tmp_path, "--label", "9", "--device", "cpu")
    assert status
    assert is_one_line(err)


def test_words_in_one_entity_are_neighbours(tmp_path: Path) -> None:
    """A word that is no token parts two others; and without joining, each word is by itself."""
    from fastbert import Tagger

    folder = checkpoint(tmp_path, "BertForTokenClassification", num_labels=2, id2label={0: "O", 1: "I-X"})
    tagger = Tagger.from_pretrained(folder, strategy="first", given_words=True)
    with torch.no_grad():
        tagger.model.classifier.weight.zero_()
        tagger.model.classifier.bias.copy_(torch.tensor([0.0, 9]))
    words = ["cats-dogs", "mat", "\u200b", "birds"]
    assert [e.text for e in tagger.predict([words])[0]] == ["cats-dogs mat", "birds"]
    assert [e.text for e in tagger.predict(["cats mat"])[0]] == ["cats mat"]
    tagger.join = False
    assert [e.text for e in tagger.predict([words])[0]] == ["cats-dogs", "mat", "birds"]


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_loss_curve_is_that_of_padded_batches(tmp_path: Path, family: str) -> None:
    base = checkpoint(tmp_path / "base", f"{family}Model", layer_norm_eps=1e-5)
    options = {"epochs": 50 / 6, "learning_rates": (1e-3,), "log_every": 1, "dropout": 0.0, "max_length": None}
    run, _ = tuned(tmp_path, base, **options)
    actual, expected = curve_of(run), transformers_curve(run, tmp_path)
    assert len(actual) == 50
    assert expected[-1] < 0.5 * expected[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
