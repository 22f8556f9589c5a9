"""Labels, against transformers' text-classification pipeline."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertForMaskedLM, pipeline

import fastbert
from fastbert.errors import InputError
from tests.checkpoints import tiny_checkpoint
from tests.heads import DOCUMENTS, PAIRS, checkpoint, word_piece

LABELS = {0: "good", 1: "bad", 2: "neither"}


def _of_pipeline(folder: str, items: list[Any]) -> list[list[dict[str, Any]]]:
    run = pipeline("text-classification", model=folder, device="cpu")
    given = [i if isinstance(i, str) else {"text": i[0], "text_pair": i[1]} for i in items]
    return [run([item], top_k=None, truncation=True)[0] for item in given]


def assert_like_pipeline(folder: str, items: list[Any], **options: Any) -> None:
    classifier = fastbert.Classifier.from_pretrained(folder, batch_tokens=60, **options)
    for actual, expected in zip(classifier.predict(items), _of_pipeline(folder, items), strict=True):
        assert actual.label == expected[0]["label"]
        assert list(actual.scores) == [each["label"] for each in expected]
        scores = [each["score"] for each in expected]
        np.testing.assert_allclose([actual.score, *actual.scores.values()], [scores[0], *scores], atol=1e-5, rtol=0)
    assert fastbert.report(classifier.model).fallbacks.total() == 0


@pytest.mark.parametrize(
    "name",
    [f"{family}ForSequenceClassification" for family in ("Bert", "Roberta", "DistilBert", "Albert", "Electra")],
)
def test_labels_are_the_pipelines(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, name, id2label=LABELS)
    # Of ("a", "") a pipeline makes the text "a"; transformers' call of a batch, and Encoder, a pair.
    assert_like_pipeline(folder, [*DOCUMENTS, *(pair for pair in PAIRS if pair[1])])


@pytest.mark.parametrize(
    "config",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
        {"problem_type": "regression", "num_labels": 1},
        {"num_labels": 1},
        {"num_labels": 2},
    ],
    ids=str,
)
def test_scores_follow_the_problem_type(config: dict[str, Any], tmp_path: Path) -> None:
    assert_like_pipeline(checkpoint(tmp_path, "BertForSequenceClassification", **config), DOCUMENTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("model"), "BertForSequenceClassification", id2label=LABELS)


def test_top_k_keeps_the_best(folder: str) -> None:
    all_of_them = fastbert.Classifier.from_pretrained(folder).predict(DOCUMENTS)
    for whole, cut in zip(
        all_of_them, fastbert.Classifier.from_pretrained(folder, top_k=2).predict(DOCUMENTS), strict=True
    ):
        assert list(cut.scores.items()) == list(whole.scores.items())[:2]
    with pytest.raises(InputError, match="top_k must be at least 1"):
        fastbert.Classifier.from_pretrained(folder, top_k=0)


def test_no_texts_give_no_labels(folder: str) -> None:
    assert fastbert.Classifier.from_pretrained(folder).predict([]) == []


def test_bf16_is_near(folder: str) -> None:
    exact = fastbert.Classifier.from_pretrained(folder).predict(DOCUMENTS)
    for label, near in zip(
        exact, fastbert.Classifier.from_pretrained(folder, dtype=torch.bfloat16).predict(DOCUMENTS), strict=True
    ):
        for name, score in label.scores.items():
            assert near.scores[name] == pytest.approx(score, abs=0.03)


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "BertForTokenClassification"])
def test_a_head_that_would_be_random_is_refused(kind: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, kind)
    for engine in (fastbert.Classifier, fastbert.Reranker):
        with pytest.raises(InputError, match=rf"holds {kind}, but {engine.__name__} needs .* random$"):
            engine.from_pretrained(folder)


def test_a_head_that_the_config_does_not_deny_is_missed(folder: str, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"BertModel"', '"BertForSequenceClassification"'))
    with pytest.raises(InputError, match=r"lacks 2 weights of BertForSequenceClassification"):
        fastbert.Classifier.from_pretrained(str(tmp_path))
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    del stock.bert.pooler
    stock.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 2 weights of BertForSequenceClassification .*pooler"):
        fastbert.Classifier.from_pretrained(str(tmp_path))


def test_a_model_must_be_patched_and_have_the_head(folder: str) -> None:
    stock = AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(InputError, match="BertForSequenceClassification is not patched"):
        fastbert.Classifier(stock, word_piece())
    assert len(fastbert.Classifier(fastbert.patch(stock), word_piece()).predict(DOCUMENTS)) == 5
    other = fastbert.patch(BertForMaskedLM(stock.config))
    with pytest.raises(InputError, match=r"^BertForMaskedLM, but Classifier needs"):
        fastbert.Classifier(other, word_piece())
