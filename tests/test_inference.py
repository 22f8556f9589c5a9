"""Texts to vectors, and masks filled, against stock transformers."""

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline

import fastbert
from fastbert.errors import InputError
from fastbert.inference.embedder import Embedder
from fastbert.inference.loading import load_model, load_tokenizer
from fastbert.inference.masks import fill_mask
from tests.checkpoints import TEXTS, minilm, tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def mlm_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("mlm"), "BertForMaskedLM")


@torch.no_grad()
def stock_vectors(checkpoint: str, texts: list[str], pool: str) -> npt.NDArray[np.float32]:
    model, tokenizer = AutoModel.from_pretrained(checkpoint).eval(), AutoTokenizer.from_pretrained(checkpoint)
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    hidden, keep = model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
    pooled = hidden[:, 0] if pool == "cls" else (hidden * keep).sum(1) / keep.sum(1)
    return pooled.numpy()


@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("batch_tokens", [1, 10, 16384])
def test_vectors_are_transformers_in_the_order_of_the_texts(checkpoint: str, pool: str, batch_tokens: int) -> None:
    actual = Embedder.from_pretrained(checkpoint, pool=pool, batch_tokens=batch_tokens).encode(TEXTS)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, stock_vectors(checkpoint, TEXTS, pool), atol=1e-5, rtol=0)


def test_vectors_of_a_real_encoder_are_transformers() -> None:
    model = minilm()
    texts = ["A fox could not reach the grapes.", "", "Paris", "He said nothing, and walked on. " * 20]
    plain = Embedder.from_pretrained(model, normalize=False)
    np.testing.assert_allclose(plain.encode(texts), stock_vectors(model, texts, "mean"), atol=1e-5, rtol=0)


def test_kernels_are_compiled_for_the_lengths_that_come(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        "fastbert.inference.engine.warm_up", lambda model, *, max_length: asked.append((model, max_length))
    )
    embedder = Embedder.from_pretrained(checkpoint)
    for words, longest in ((1, [4]), (2, [4]), (15, [4, 32]), (10, [4, 32]), (100, [4, 32, 48]), (200, [4, 32, 48])):
        embedder.encode(["dog", "dog " * words])
        assert asked == [(embedder.model, max_length) for max_length in longest]
    embedder.encode([])
    assert len(asked) == 3


def test_nothing_is_padded_and_every_text_is_in_one_batch(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = Embedder.from_pretrained(checkpoint, batch_tokens=20)
    calls = []
    forward = embedder.model.forward

    def spy(**kwargs: object) -> object:
        calls.append(kwargs)
        return forward(**kwargs)

    monkeypatch.setattr(embedder.model, "forward", spy)
    tokens = embedder.tokenize(TEXTS)
    done: list[int] = []
    embedder.encode_tokens(tokens, done.append)
    sizes = [call["input_ids"].shape for call in calls]
    assert sum(T for _, T in sizes) == tokens.lengths.sum()
    assert all(B == 1 and T <= 20 for B, T in sizes)
    assert all(not {"attention_mask", "position_ids"} & call.keys() for call in calls)
    assert sum(done) == tokens.lengths.sum()
    assert fastbert.report(embedder.model).fallbacks.total() == 0


def test_normalized_vectors_have_length_one(checkpoint: str) -> None:
    vectors = Embedder.from_pretrained(checkpoint, normalize=True).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)


def test_long_texts_are_cut_as_transformers_cuts_them(checkpoint: str) -> None:
    long = ["the cat " * 100]
    np.testing.assert_allclose(
        Embedder.from_pretrained(checkpoint).encode(long), stock_vectors(checkpoint, long, "mean"), atol=1e-5, rtol=0
    )
    assert Embedder.from_pretrained(checkpoint, max_length=7).tokenize(long).lengths.tolist() == [7]


def test_no_texts_give_no_rows(checkpoint: str) -> None:
    assert Embedder.from_pretrained(checkpoint).encode([]).shape == (0, 32)


def test_many_texts_are_tokenised_in_chunks(checkpoint: str) -> None:
    embedder = Embedder.from_pretrained(checkpoint)
    texts = ["a " * (i % 5) for i in range(2500)]
    reported: list[int] = []
    tokens = embedder.tokenize(texts, reported.append)
    assert tokens.lengths.tolist() == [i % 5 + 2 for i in range(2500)]
    assert sum(reported) == 2500
    assert tokens.unknown == 0
    assert embedder.tokenize(["zebra cat"]).unknown == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "median"}, "pool must be one of cls, max, mean"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"max_length": 49}, "max_length must be in"),
        ({"max_length": 2}, "max_length must be in"),
    ],
)
def test_options_out_of_range_are_named(checkpoint: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Embedder.from_pretrained(checkpoint, **options)


def test_another_models_tokenizer_is_refused(checkpoint: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.add_tokens(["zebra"])
    embedder = Embedder(Embedder.from_pretrained(checkpoint).model, tokenizer)
    with pytest.raises(InputError, match="vocabulary of 24"):
        embedder.encode(["zebra"])


def test_a_model_without_a_pooler_loads(checkpoint: str, tmp_path: Path) -> None:
    stock = AutoModel.from_pretrained(checkpoint, add_pooling_layer=False)
    stock.save_pretrained(tmp_path)
    shutil.copy(Path(checkpoint) / "tokenizer.json", tmp_path)
    shutil.copy(Path(checkpoint) / "tokenizer_config.json", tmp_path)
    np.testing.assert_array_equal(
        Embedder.from_pretrained(str(tmp_path)).encode(TEXTS), Embedder.from_pretrained(checkpoint).encode(TEXTS)
    )


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint: str) -> None:
    with pytest.raises(InputError, match=r"lacks \d+ weights of BertForMaskedLM \(it was saved from BertModel\)"):
        load_model(AutoModelForMaskedLM, checkpoint, may_miss=())


def test_a_directory_without_a_vocabulary_has_no_tokenizer(checkpoint: str, tmp_path: Path) -> None:
    shutil.copy(Path(checkpoint) / "config.json", tmp_path)
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_masks_are_filled_as_transformers_fills_them(mlm_checkpoint: str) -> None:
    text = "the [MASK] sat on a big [MASK]"
    tokenizer = load_tokenizer(mlm_checkpoint)
    model = fastbert.patch(load_model(AutoModelForMaskedLM, mlm_checkpoint, may_miss=()))
    actual = fill_mask(model, tokenizer, text, top_k=3)
    stock = pipeline("fill-mask", model=mlm_checkpoint, tokenizer=tokenizer, device="cpu")(text, top_k=3)
    assert [[filling.token for filling in place] for place in actual] == [[f["token_str"] for f in p] for p in stock]
    np.testing.assert_allclose(
        [[filling.probability for filling in place] for place in actual],
        [[f["score"] for f in place] for place in stock],
        atol=1e-5,
    )
    first, second = actual[0][0], actual[1][0]
    assert first.text == f"the {first.token.removeprefix('##')} sat on a big [MASK]"
    assert second.text == f"the [MASK] sat on a big {second.token.removeprefix('##')}"
    assert len(fill_mask(model, tokenizer, text, top_k=1000)[0]) == 24


@pytest.mark.parametrize(
    ("text", "message"), [("the cat", "no .MASK. in the text"), ("a " * 60 + "[MASK]", "has 63 tokens")]
)
def test_texts_that_cannot_be_filled_are_refused(mlm_checkpoint: str, text: str, message: str) -> None:
    model = fastbert.patch(load_model(AutoModelForMaskedLM, mlm_checkpoint))
    with pytest.raises(InputError, match=message):
        fill_mask(model, load_tokenizer(mlm_checkpoint), text)
