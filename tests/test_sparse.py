"""SPLADE on packed tokens: the vectors of sentence-transformers' SparseEncoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, DistilBertForMaskedLM, RobertaConfig, RobertaForMaskedLM

import fastbert
from fastbert.errors import InputError
from fastbert.inference import sparse
from tests.checkpoints import tiny_checkpoint
from tests.st_folders import TEXTS, copy_of, with_json

library = pytest.importorskip("sentence_transformers")
pytest.importorskip("scipy")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("mlm"), "BertForMaskedLM")


@pytest.fixture(scope="module")
def folder(masked_lm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("splade") / "saved")
    library.SparseEncoder(masked_lm, device="cpu", prompts={"query": "the red "}).save(path)
    return path


def assert_theirs(folder: str, options: dict[str, Any] | None = None, **how: Any) -> fastbert.SparseEmbedder:
    embedder = fastbert.SparseEmbedder(folder, batch_tokens=30, **(options or {}))
    actual = embedder.encode(TEXTS, how.get("prompt_name"), prompt_text=how.get("prompt"))
    stock = library.SparseEncoder(folder, device="cpu")
    expected = stock.encode(TEXTS, convert_to_sparse_tensor=False, **how, **(options or {})).numpy()
    np.testing.assert_allclose(actual.toarray(), expected, atol=1e-5, rtol=1e-5)
    assert actual.dtype == np.float32
    assert 0 < actual.nnz == np.count_nonzero(expected)
    assert actual.has_canonical_format
    report = fastbert.report(embedder.model)
    assert report.fallbacks.total() == 0 < report.packed_calls
    return embedder


@pytest.mark.parametrize("logits", [24, 24 * 17, 1 << 25])  # the vocabulary of one token, of some, of a batch
def test_vectors(folder: str, masked_lm: str, monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    monkeypatch.setattr(sparse, "_LOGITS", logits)
    embedder = assert_theirs(folder)
    assert str(embedder) == (
        "BertForMaskedLM, max of log(1 + relu): 24 dimensions; at most 48 tokens; prompts query 'the red ';"
        " dot similarity"
    )
    assert_theirs(folder, prompt_name="query")
    assert str(assert_theirs(masked_lm)).endswith("(no modules.json)")


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
def test_poolings(folder: str, tmp_path: Path, strategy: str, activation: str) -> None:
    changed = copy_of(folder, tmp_path / "changed")
    with_json(changed, "1_SpladePooling/config.json", pooling_strategy=strategy, activation_function=activation)
    assert_theirs(changed)


def test_the_largest_elements_are_kept(folder: str, tmp_path: Path) -> None:
    assert_theirs(folder, {"max_active_dims": 3})
    assert_theirs(folder, {"max_active_dims": 100})
    few = with_json(copy_of(folder, tmp_path / "few"), "config_sentence_transformers.json", max_active_dims=2)
    assert np.diff(assert_theirs(few).encode(TEXTS).indptr).max() == 2


def test_folders_as_they_were_written_once(folder: str, tmp_path: Path) -> None:
    old = copy_of(folder, tmp_path / "old")
    (Path(old) / "sentence_bert_config.json").write_text('{"max_seq_length": 9, "do_lower_case": false}')
    modules = (Path(old) / "modules.json").read_text()
    (Path(old) / "modules.json").write_text(
        modules.replace("base.modules.transformer.Transformer", "sparse_encoder.models.MLMTransformer.MLMTransformer")
    )
    assert assert_theirs(old).max_length == 9


@pytest.mark.parametrize("family", ["Roberta", "DistilBert"])
def test_other_families(masked_lm: str, tmp_path: Path, family: str) -> None:
    """Their heads are named otherwise."""
    path = copy_of(masked_lm, tmp_path / "model")
    if family == "Roberta":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        config: Any = RobertaConfig(
            vocab_size=24, max_position_embeddings=50, pad_token_id=0, type_vocab_size=2, **sizes
        )
        model: Any = RobertaForMaskedLM(config)
    else:
        config = DistilBertConfig(
            vocab_size=24, dim=32, n_layers=1, n_heads=2, hidden_dim=64, max_position_embeddings=48
        )
        model = DistilBertForMaskedLM(config)
    model.save_pretrained(path)
    assert_theirs(path)


def test_similarity(folder: str, tmp_path: Path) -> None:
    embedder = fastbert.SparseEmbedder(folder)
    vectors = embedder.encode(TEXTS)
    dense = vectors.toarray()
    np.testing.assert_allclose(embedder.similarity(vectors[:2], vectors), dense[:2] @ dense.T, rtol=1e-5)
    near = with_json(
        copy_of(folder, tmp_path / "near"), "config_sentence_transformers.json", similarity_fn_name="cosine"
    )
    scores = fastbert.SparseEmbedder(near).similarity(vectors, vectors)
    np.testing.assert_allclose(scores.diagonal(), 1, rtol=1e-5)


def test_no_texts_and_progress(folder: str) -> None:
    embedder = fastbert.SparseEmbedder(folder, batch_tokens=20)
    assert embedder.encode([]).shape == (0, 24)
    tokens, done = embedder.tokenize(TEXTS), []
    embedder.results(tokens, done.append)
    assert sum(done) == tokens.lengths.sum()
    assert len(done) > 2


def test_in_16_bits(folder: str) -> None:
    exact, half = (fastbert.SparseEmbedder(folder, dtype=t).encode(TEXTS) for t in (torch.float32, torch.bfloat16))
    assert half.dtype == np.float32
    np.testing.assert_allclose(half.toarray(), exact.toarray(), atol=0.05)


def test_what_is_no_splade_is_refused(folder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks .* weights of BertForMaskedLM"):
        fastbert.SparseEmbedder(tiny_checkpoint(tmp_path / "encoder"))
    with pytest.raises(InputError, match="is a BertForSequenceClassification"):
        fastbert.SparseEmbedder(tiny_checkpoint(tmp_path / "classifier", "BertForSequenceClassification"))
    with pytest.raises(InputError, match=r"is a SparseEncoder .*: use fastbert.SparseEmbedder"):
        fastbert.Embedder(folder)
    with pytest.raises(InputError, match="max_active_dims must be at least 1, but is 0"):
        fastbert.SparseEmbedder(folder, max_active_dims=0)
    for changes, message in [
        ({"pooling_strategy": "mean"}, "does not know SpladePooling as .*'mean'"),
        ({"activation_function": "gelu"}, "does not know SpladePooling as .*'gelu'"),
    ]:
        changed = with_json(copy_of(folder, tmp_path / message[-5:]), "1_SpladePooling/config.json", **changes)
        with pytest.raises(InputError, match=message):
            fastbert.SparseEmbedder(changed)
