"""Entities, against transformers' token-classification pipeline, and of long texts against a loop over windows."""

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import RobertaProcessing
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

import fastbert
from fastbert.errors import InputError
from fastbert.inference.tagger import STRATEGIES, Entity
from tests.heads import DOCUMENTS, LONG, byte_level, checkpoint, shouting

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC", 5: "date"}
CONFIG = {"num_labels": 6, "id2label": LABELS, "label2id": {label: i for i, label in LABELS.items()}}
TEXTS = [
    *DOCUMENTS[:4],
    "",
    "birds, dogs, sing  the cats. birds",
    "dogs<unk>cats <unk>s",
    "\U0001f600\U0001f600 cats",
    "\tthe zebra's \u200bcats on the bird",
]
WORDS = [["birds", "sang,", "the", "cats"], [], ["dogs-dogs", "zebra", "mat"], ["the"]]
FAMILIES = ("Bert", "Roberta", "DistilBert", "Albert", "Electra")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        family: checkpoint(tmp_path_factory.mktemp(family), f"{family}ForTokenClassification", **CONFIG)
        for family in FAMILIES
    }


def assert_same(actual: list[list[Entity]], expected: list[list[dict[str, Any]]], texts: list[str]) -> None:
    for ours, theirs, text in zip(actual, expected, texts, strict=True):
        assert [(e.type, e.start, e.end) for e in ours] == [
            (e.get("entity", e.get("entity_group")), e["start"], e["end"]) for e in theirs
        ]
        assert [e.text for e in ours] == [text[e["start"] : e["end"]] for e in theirs]
        np.testing.assert_allclose([e.score for e in ours], [e["score"] for e in theirs], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_entities_are_the_pipelines(folders: dict[str, str], family: str, strategy: str) -> None:
    folder = folders[family]
    tagger = fastbert.Tagger.from_pretrained(folder, strategy=strategy, batch_tokens=40)
    run = pipeline("token-classification", model=folder, device="cpu", aggregation_strategy=strategy)
    assert_same(tagger.predict(TEXTS), run(TEXTS), TEXTS)
    words = [each for each in WORDS if each]  # the pipeline cannot take an empty list
    joined = [" ".join(each) for each in words]
    assert_same(tagger.predict(words), run(words, is_split_into_words=True), joined)
    assert tagger.predict([WORDS[0], TEXTS[0], []]) == [*tagger.predict([WORDS[0]]), *tagger.predict([TEXTS[0]]), []]
    assert fastbert.report(tagger.model).fallbacks.total() == 0


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
def test_words_of_tokens_that_begin_with_a_blank(folders: dict[str, str]) -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False)
    model = fastbert.Tagger.from_pretrained(folders["Roberta"]).model
    run = pipeline(
        "token-classification",
        model=folders["Roberta"],
        tokenizer=tokenizer,
        device="cpu",
        aggregation_strategy="first",
    )
    assert_same(fastbert.Tagger(model, tokenizer, strategy="first").predict(TEXTS), run(TEXTS), TEXTS)


@pytest.mark.parametrize("family", FAMILIES[2:])
def test_families(folders: dict[str, str], family: str) -> None:
    run = pipeline("token-classification", model=folders[family], device="cpu", aggregation_strategy="simple")
    assert_same(fastbert.Tagger.from_pretrained(folders[family]).predict(TEXTS), run(TEXTS), TEXTS)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize(("stride", "overlap"), [(16, 16), (7, 7), (0, 0), (1000, 23)])
def test_each_token_of_a_long_text_is_read_once(
    folders: dict[str, str], family: str, stride: int, overlap: int
) -> None:
    """In the window where it has more around it."""
    tagger = fastbert.Tagger.from_pretrained(folders[family], strategy="none", ignore=(), stride=stride)
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    model = AutoModelForTokenClassification.from_pretrained(folders[family]).eval()
    windows = tokenizer(
        LONG,
        truncation=True,
        max_length=48,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    tokens = tagger.tokenize([DOCUMENTS[0], LONG])
    rows = [tokens.ids[a : a + n].tolist() for a, n in zip(tokens.starts, tokens.lengths, strict=True)]
    assert rows[1:] == windows["input_ids"]
    assert tokens.text_of.tolist() == [0, *[1] * len(windows["input_ids"])]

    scored: dict[tuple[int, int], tuple[int, torch.Tensor]] = {}
    last = len(windows["input_ids"]) - 1
    for number, ids in enumerate(windows["input_ids"]):
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
        for i in range(1, len(ids) - 1):
            around = min(i - 1 if number else 1000, len(ids) - 2 - i if number < last else 1000)
            where = tuple(windows["offset_mapping"][number][i])
            if where not in scored or scored[where][0] <= around:
                scored[where] = around, probabilities[i]
    entities = tagger.predict([DOCUMENTS[0], LONG])[1]
    assert [(e.start, e.end) for e in entities] == tokenizer(
        LONG, return_offsets_mapping=True, add_special_tokens=False
    )["offset_mapping"]
    for entity in entities:
        probabilities = scored[entity.start, entity.end][1]
        assert entity.type == LABELS[int(probabilities.argmax())]
        assert entity.score == pytest.approx(float(probabilities.max()), abs=1e-5)


def test_entities_go_on_where_a_window_ends(folders: dict[str, str]) -> None:
    """All tokens of a class: the text is one entity, however many windows it has."""
    tagger = fastbert.Tagger.from_pretrained(folders["Bert"])
    with torch.no_grad():
        tagger.model.classifier.weight.zero_()
        tagger.model.classifier.bias.copy_(torch.tensor([0.0, 0, 9, 0, 0, 0]))
    for item in (LONG, LONG.split()):
        ((entity,),) = tagger.predict([item])
        assert (entity.type, entity.start, entity.end) == ("PER", 0, len(LONG.rstrip()))


def test_labels_without_b_and_i_and_what_is_ignored(folders: dict[str, str]) -> None:
    everything = fastbert.Tagger.from_pretrained(folders["Bert"], ignore=()).predict(TEXTS)
    types = {e.type for entities in everything for e in entities}
    assert len(types) > 1
    assert types <= {"O", "PER", "LOC", "date"}
    one = max(types)
    some = fastbert.Tagger.from_pretrained(folders["Bert"], ignore=("O", one)).predict(TEXTS)
    assert some == [[e for e in entities if e.type not in ("O", one)] for entities in everything]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "mean"}, "strategy must be one of none, simple, first, average, max, but is 'mean'"),
        ({"stride": -1}, "stride must be at least 0"),
        ({"max_length": 2}, "max_length must be in"),
    ],
)
def test_options_out_of_range_are_named(folders: dict[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fastbert.Tagger.from_pretrained(folders["Bert"], **options)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("a dog", "one string"),
        ([TEXTS[0], 3], "item 1 must be a text or a list of words, but is 3"),
        ([["a", None]], "item 0 must be"),
        ([["a", "\ud800"]], "item 0 is no valid Unicode"),
    ],
)
def test_what_is_no_text_is_named(folders: dict[str, str], items: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fastbert.Tagger.from_pretrained(folders["Bert"]).predict(items)


def test_no_texts_and_the_smallest_windows(folders: dict[str, str]) -> None:
    assert fastbert.Tagger.from_pretrained(folders["Bert"]).predict([]) == []
    smallest = fastbert.Tagger.from_pretrained(folders["Bert"], strategy="none", ignore=(), max_length=3)
    assert len(smallest.predict([DOCUMENTS[0]])[0]) == 13


def test_a_tokenizer_without_offsets_is_refused(folders: dict[str, str]) -> None:
    tagger = fastbert.Tagger.from_pretrained(folders["Bert"])
    with pytest.raises(InputError, match=r"Tagger needs a tokenizer that knows where .* a Shouting$"):
        fastbert.Tagger(tagger.model, shouting())
