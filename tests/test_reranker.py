"""Scores of pairs, against sentence-transformers' CrossEncoder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastbert
from fastbert.errors import InputError
from tests.heads import DOCUMENTS, PAIRS, QUERY, checkpoint

CrossEncoder = pytest.importorskip("sentence_transformers").CrossEncoder
SPACED = [*PAIRS, ("  A dog ", "\tthe CAT\n"), ("", "")]


def assert_like_cross_encoder(folder: str, **options: Any) -> fastbert.Reranker:
    reranker = fastbert.Reranker.from_pretrained(folder, batch_tokens=60, **options)
    expected = CrossEncoder(folder, device="cpu").predict(SPACED)
    actual = reranker.score_pairs(SPACED)
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    assert np.ptp(expected[:5]) > 1e-3
    assert fastbert.report(reranker.model).fallbacks.total() == 0
    return reranker


@pytest.mark.parametrize(
    ("name", "labels"),
    [(f"{family}ForSequenceClassification", 1) for family in ("Bert", "Roberta", "DistilBert", "Albert", "Electra")]
    + [("BertForSequenceClassification", 3)],
)
def test_scores_are_cross_encoders(name: str, labels: int, tmp_path: Path) -> None:
    assert_like_cross_encoder(checkpoint(tmp_path, name, num_labels=labels))


def test_token_types_that_a_model_does_not_have_are_left_out(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "DistilBertForSequenceClassification", num_labels=1)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("DistilBertTokenizer", "BertTokenizer"))
    reranker = assert_like_cross_encoder(folder)
    assert "token_type_ids" in reranker.tokenizer.model_input_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return checkpoint(tmp_path_factory.mktemp("model"), "BertForSequenceClassification", num_labels=1)


@pytest.mark.parametrize(
    ("options", "length", "activation"),
    [
        ({"activation_fn": torch.nn.Identity(), "max_length": 20}, 20, torch.nn.Identity),
        ({"prompts": {"web": "the dog "}, "default_prompt_name": "web"}, 48, torch.nn.Sigmoid),
    ],
    ids=["activation and length", "prompt"],
)
def test_a_saved_cross_encoder_says_how(
    folder: str, options: dict[str, Any], length: int, activation: type, tmp_path: Path
) -> None:
    CrossEncoder(folder, device="cpu", **options).save_pretrained(str(tmp_path))
    reranker = assert_like_cross_encoder(str(tmp_path))
    assert reranker.max_length == length
    assert type(reranker.activation) is activation


@pytest.mark.parametrize(
    "config",
    [
        {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
        {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
    ],
    ids=["version 4", "before"],
)
def test_older_ones_say_it_in_the_config(config: dict[str, Any], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "BertForSequenceClassification", num_labels=1, **config)
    assert type(assert_like_cross_encoder(folder).activation) is not torch.nn.Sigmoid


def test_an_activation_of_somebody_elses_is_not_imported(tmp_path: Path) -> None:
    named = {"sentence_transformers": {"activation_fn": "os.system"}}
    folder = checkpoint(tmp_path, "BertForSequenceClassification", num_labels=1, **named)
    with pytest.raises(InputError, match=r"activation os\.system is none of PyTorch's"):
        fastbert.Reranker.from_pretrained(folder)
    given = fastbert.Reranker.from_pretrained(folder, activation=torch.nn.Identity())
    scores = given.score(QUERY, DOCUMENTS)
    assert ((scores < 0) | (scores > 1)).any()


def test_lower_case_and_length_of_the_folder_hold(tmp_path: Path) -> None:
    cased = checkpoint(tmp_path / "cased", "RobertaForSequenceClassification", num_labels=1)
    CrossEncoder(cased, device="cpu").save_pretrained(str(tmp_path))
    settings = tmp_path / "sentence_bert_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "max_seq_length": 12, "do_lower_case": True}))
    assert fastbert.Reranker.from_pretrained(str(tmp_path)).max_length == 12
    assert_like_cross_encoder(str(tmp_path))


def test_a_query_is_scored_with_each_document(folder: str) -> None:
    reranker = fastbert.Reranker.from_pretrained(folder)
    scores = reranker.score(QUERY, iter(DOCUMENTS))
    np.testing.assert_array_equal(scores, reranker.score_pairs(PAIRS))
    ranked = reranker.rank(QUERY, DOCUMENTS)
    assert [r.index for r in ranked] == np.argsort(-scores).tolist()
    assert all(r.document == DOCUMENTS[r.index] and r.score == pytest.approx(scores[r.index]) for r in ranked)
    assert reranker.rank(QUERY, DOCUMENTS, top_k=2) == ranked[:2]
    assert reranker.score_pairs([]).shape == (0,)


@pytest.mark.parametrize(
    ("query", "documents", "message"),
    [
        (QUERY, [], "needs documents"),
        (QUERY, None, "needs documents"),
        (QUERY, "a dog", "one string"),
        (QUERY, ["a dog", 1], r"item 1 must be a document \(a string\), but is 1"),
        (None, DOCUMENTS, "a query must be a string"),
    ],
)
def test_what_cannot_be_scored_is_named(folder: str, query: Any, documents: Any, message: str) -> None:
    reranker = fastbert.Reranker.from_pretrained(folder)
    with pytest.raises(InputError, match=message):
        reranker.score(query, documents)
    with pytest.raises(InputError, match=message):
        reranker.rank(query, documents)


def test_other_mistakes_are_named(folder: str, tmp_path: Path) -> None:
    reranker = fastbert.Reranker.from_pretrained(folder)
    with pytest.raises(InputError, match=r"item 1 must be a pair \(query, document\), but is 'a dog'"):
        reranker.score_pairs([PAIRS[0], "a dog"])
    with pytest.raises(InputError, match="top_k"):
        reranker.rank(QUERY, DOCUMENTS, top_k=0)
    with pytest.raises(InputError, match="max_length must be in"):
        fastbert.Reranker.from_pretrained(folder, max_length=4)
    several = checkpoint(tmp_path, "BertForSequenceClassification", num_labels=3)
    with pytest.raises(InputError, match="3 labels"):
        fastbert.Reranker.from_pretrained(several).rank(QUERY, DOCUMENTS)


def test_an_embedders_folder_is_refused(tmp_path: Path, folder: str) -> None:
    CrossEncoder(folder, device="cpu").save_pretrained(str(tmp_path))
    about = tmp_path / "config_sentence_transformers.json"
    about.write_text(about.read_text().replace('"CrossEncoder"', '"SentenceTransformer"'))
    with pytest.raises(InputError, match=r"SentenceTransformer of sentence-transformers.* fastbert\.Embedder"):
        fastbert.Reranker.from_pretrained(str(tmp_path))
