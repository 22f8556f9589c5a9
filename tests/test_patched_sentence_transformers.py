"""Objects of sentence-transformers, patched: packed inside of their own methods, heads included, in training too."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

import fastbert
from tests.checkpoints import tiny_checkpoint
from tests.st_folders import TEXTS, st_folder

library = pytest.importorskip("sentence_transformers")
parts = library.sentence_transformer.modules

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = list(zip(TEXTS, TEXTS[::-1], strict=True))
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def assert_same(stock: Any, call: Callable[[Any], Any]) -> Any:
    """The patched copy's answer, which is packed, and what it was."""
    fast = fastbert.patch(copy.deepcopy(stock))
    actual, expected = (np.asarray(call(model)) for model in (fast, stock))
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
    report = fastbert.report(fast)
    assert report.fallbacks.total() == 0 < report.packed_calls
    np.testing.assert_allclose(np.asarray(call(fastbert.unpatch(fast))), expected, atol=1e-6, rtol=1e-6)
    return actual


def test_sentence_transformer(tmp_path: Path) -> None:
    pooling = parts.Pooling(32, ("cls", "max", "mean", "weightedmean", "lasttoken"), include_prompt=False)
    modules = (pooling, parts.Dense(160, 8), parts.LayerNorm(8), parts.Normalize())
    stock = library.SentenceTransformer(st_folder(tmp_path, *modules, prompts={"query": "a red "}), device="cpu")
    assert_same(stock, lambda model: model.encode(TEXTS, batch_size=3))
    assert_same(stock, lambda model: model.encode_query(TEXTS))
    tokens = assert_same(stock, lambda model: torch.cat(model.encode(TEXTS, output_value="token_embeddings")))
    assert (np.abs(tokens).sum(1) > 0).all()


@pytest.mark.parametrize("num_labels", [1, 3])
def test_cross_encoder(tmp_path: Path, num_labels: int) -> None:
    path = tiny_checkpoint(tmp_path, "BertForSequenceClassification", num_labels=num_labels)
    stock = library.CrossEncoder(path, device="cpu")
    assert_same(stock, lambda model: model.predict(PAIRS, batch_size=3))
    assert_same(stock, lambda model: model.predict(PAIRS, apply_softmax=num_labels > 1))
    if num_labels == 1:
        assert_same(stock, lambda model: [hit["score"] for hit in model.rank("the cat", TEXTS)])


def test_sparse_encoder(tmp_path: Path) -> None:
    stock = library.SparseEncoder(tiny_checkpoint(tmp_path, "BertForMaskedLM"), device="cpu")
    assert_same(stock, lambda model: model.encode(TEXTS, batch_size=3).to_dense())


def test_the_packed_batches_that_they_make_themselves(tmp_path: Path) -> None:
    """What sentence-transformers does with FlashAttention: one row of all texts, with cu_seq_lens_q."""
    for kind, head in [("SentenceTransformer", "BertModel"), ("SparseEncoder", "BertForMaskedLM")]:
        stock = getattr(library, kind)(tiny_checkpoint(tmp_path / kind, head), device="cpu")
        fast = fastbert.patch(copy.deepcopy(stock), strict=True)
        fast[0].can_flatten_inputs, fast[0]._flatten_position_offset = True, 0
        fast[0].data_collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
        assert fast.preprocess(TEXTS)["input_ids"].shape[0] == 1
        actual, expected = (model.encode(TEXTS, convert_to_tensor=True).to_dense() for model in (fast, stock))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert fastbert.report(fast).packed_calls >= 1


@pytest.mark.parametrize("attend", [True, False])
def test_query_expansion_gets_the_rows_that_it_scores(tmp_path: Path, attend: bool) -> None:
    """With attend=False they are [MASK] tokens whose attention_mask is 0."""
    stock = library.MultiVectorEncoder(tiny_checkpoint(tmp_path), device="cpu")
    stock[0].query_expansion = {"strategy": "fixed", "attend": attend, "length": 12}
    fast = fastbert.patch(copy.deepcopy(stock), strict=True)
    for texts in (["the cat"], TEXTS[:4]):
        for actual, expected in zip(fast.encode_query(texts), stock.encode_query(texts), strict=True):
            np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-5, rtol=1e-5)
            assert len(actual) == 12
    zeros = fastbert.patch(copy.deepcopy(stock), padded_rows="zeros").encode_query(["the cat"])[0]
    assert np.allclose(np.asarray(zeros), np.asarray(stock.encode_query(["the cat"])[0]), atol=1e-3) == attend


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder", "SparseEncoder"])
def test_their_training(tmp_path: Path, kind: str) -> None:
    """Two steps of their trainer: the same weights come out."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    head = {"CrossEncoder": "BertForSequenceClassification", "SparseEncoder": "BertForMaskedLM"}.get(kind, "BertModel")
    labels = {"num_labels": 1} if kind == "CrossEncoder" else {}
    path = tiny_checkpoint(tmp_path / "model", head, **NO_DROPOUT, **labels)
    rows = datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1], "label": [i % 2 * 1.0 for i in range(len(TEXTS))]})
    trained = []
    for patch in (fastbert.patch, lambda model: model):
        model = patch(getattr(library, kind)(path, device="cpu"))
        if kind == "SparseEncoder":
            losses = library.sparse_encoder.losses
            loss = losses.SpladeLoss(model, losses.SparseCosineSimilarityLoss(model), document_regularizer_weight=0.1)
        elif kind == "CrossEncoder":
            loss = library.cross_encoder.losses.BinaryCrossEntropyLoss(model)
        else:
            loss = library.sentence_transformer.losses.CosineSimilarityLoss(model)
        arguments = getattr(library, f"{kind}TrainingArguments")(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        getattr(library, f"{kind}Trainer")(model, arguments, rows, loss=loss).train()
        trained.append(model)
    fast, stock = trained
    before = getattr(library, kind)(path, device="cpu").state_dict()
    for name, weight in stock.state_dict().items():
        torch.testing.assert_close(
            fast.state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any((weight - before[name]).abs().max() > 1e-4 for name, weight in stock.state_dict().items())
    assert fastbert.report(fast).packed_calls >= 2
    assert fastbert.report(fast).fallbacks.total() == 0
