"""Folders of sentence-transformers: the vectors are sentence-transformers', whatever the folder holds."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import numpy.typing as npt
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertTokenizerFast

import fastbert
from fastbert.errors import InputError
from fastbert.inference.embedder import Embedder
from fastbert.inference.engine import Batch
from fastbert.inference.folder import DENSE, read_folder
from fastbert.inference.modules import POOLS, Pooling, load_modules
from tests.checkpoints import minilm, tiny_checkpoint
from tests.st_folders import TEXTS, copy_of, st_folder, with_json

library = pytest.importorskip("sentence_transformers")
parts = library.sentence_transformer.modules

pytestmark = pytest.mark.usefixtures("one_thread")
CHAIN = "BertModel, cls + mean, Dense 64 to 8 with Tanh, LayerNorm, length 1"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def whole(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with every module that there is, with prompts."""
    torch.manual_seed(0)
    norm = parts.LayerNorm(8)
    nn.init.normal_(norm.norm.weight)
    modules = (parts.Pooling(32, ("cls", "mean")), parts.Dense(64, 8), norm, parts.Dropout(0.5), parts.Normalize())
    path = tmp_path_factory.mktemp("whole")
    return st_folder(path, *modules, encoder=encoder, prompts={"query": "the red cat ", "passage": "a "})


@pytest.fixture(scope="module")
def pooled(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """sentence-transformers' model and ours, of which a test changes the pooling."""
    folder = st_folder(tmp_path_factory.mktemp("pooled"), parts.Pooling(32), encoder=encoder)
    return library.SentenceTransformer(folder, device="cpu"), Embedder(folder)


def theirs(folder: str, texts: list[str] = TEXTS, **options: Any) -> npt.NDArray[np.float32]:
    vectors: npt.NDArray[np.float32] = library.SentenceTransformer(folder, device="cpu").encode(texts, **options)
    return vectors


def assert_theirs(folder: str, *ways: dict[str, str]) -> Embedder:
    """All texts, as these options of sentence-transformers' `encode` say; with batches of a few texts."""
    embedder, stock = Embedder(folder, batch_tokens=30), library.SentenceTransformer(folder, device="cpu")
    for way in ways or ({},):
        actual = embedder.encode(TEXTS, prompt=way.get("prompt_name"), prompt_text=way.get("prompt"))
        np.testing.assert_allclose(actual, stock.encode(TEXTS, **way), atol=1e-5, rtol=0)
        assert actual.shape == (len(TEXTS), embedder.dimension)
    assert fastbert.report(embedder.model).fallbacks.total() == 0
    return embedder


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("modes", [*POOLS, POOLS, ("max", "cls"), ("weightedmean", "mean")], ids=str)
def test_every_pooling(pooled: Any, modes: str | tuple[str, ...], include_prompt: bool) -> None:
    stock, embedder = pooled
    stock[1] = parts.Pooling(32, modes, include_prompt)
    embedder = Embedder(embedder.model, embedder.tokenizer, pool=modes, batch_tokens=30)
    embedder.pooling.include_prompt = include_prompt
    for prompt in ("", "a small cat and ", "the cat and " * 60):  # of the last nothing but [SEP] is left
        actual = embedder.encode(TEXTS, prompt_text=prompt)
        np.testing.assert_allclose(actual, stock.encode(TEXTS, prompt=prompt), atol=1e-5, rtol=0)


def test_texts_that_are_no_longer_than_the_prompt() -> None:
    """As a tokenizer without a token for the end has them; and nothing is read from the device."""
    lengths, prompt = torch.tensor([6, 3, 2, 1]), 3
    hidden_TN = torch.randn(int(lengths.sum()), 4)
    padded_BLN = nn.utils.rnn.pad_sequence(list(hidden_TN.split(lengths.tolist())), batch_first=True)
    mask_BL = torch.arange(6) < lengths[:, None]
    features = {"token_embeddings": padded_BLN, "attention_mask": mask_BL.long(), "prompt_length": prompt}
    expected = parts.Pooling(4, POOLS, include_prompt=False)(features)["sentence_embedding"]
    cu_seqlens = torch.tensor([0, *lengths.cumsum(0)], dtype=torch.int32)
    pooling, rows, on_host = Pooling(POOLS, include_prompt=False), np.arange(4), lengths.numpy()

    def pooled(hidden_TN: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return pooling(hidden_TN, Batch(rows, on_host, hidden_TN[None, :, 0], None, cu_seqlens, prompt))

    torch.testing.assert_close(pooled(hidden_TN, cu_seqlens), expected)
    with FakeTensorMode() as fake:  # raises where a value is asked for
        assert pooled(fake.from_tensor(hidden_TN), fake.from_tensor(cu_seqlens)).shape == (4, 24)


@pytest.mark.parametrize(
    ("old", "modes"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls",)),
        ({"pooling_mode_mean_sqrt_len_tokens": True, "pooling_mode_max_tokens": True}, ("max", "mean_sqrt_len_tokens")),
        ({"pooling_mode_lasttoken": True, "pooling_mode_weightedmean_tokens": True}, ("weightedmean", "lasttoken")),
        ({}, ("mean",)),
    ],
)
def test_pooling_as_it_was_written_once(encoder: str, tmp_path: Path, old: dict[str, bool], modes: Any) -> None:
    folder = st_folder(tmp_path, parts.Pooling(32), encoder=encoder)
    (Path(folder) / "1_Pooling/config.json").write_text(json.dumps({"word_embedding_dimension": 32, **old}))
    assert assert_theirs(folder).pooling.modes == modes


@pytest.mark.parametrize(
    ("out_features", "options"),
    [
        (8, {"activation_function": None}),
        (8, {"activation_function": nn.GELU(), "bias": False, "use_residual": True}),
        (32, {"activation_function": nn.ReLU(), "use_residual": True}),
    ],
    ids=str,
)
def test_dense(encoder: str, tmp_path: Path, out_features: int, options: dict[str, Any]) -> None:
    dense = [parts.Dense(32, out_features, **options), parts.Dense(out_features, 5)]
    assert_theirs(st_folder(tmp_path, parts.Pooling(32), *dense, encoder=encoder))


def test_all_modules_at_once(whole: str) -> None:
    assert str(assert_theirs(whole)).startswith(
        f"{CHAIN}: 8 dimensions; at most 48 tokens; prompts query 'the red cat ',"
    )


def test_weights_as_they_were_written_once(whole: str, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "old")
    path = Path(folder) / "2_Dense/model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    assert_theirs(folder)


def test_an_encoder_in_a_folder_of_its_own(whole: str, tmp_path: Path) -> None:
    folder = Path(copy_of(whole, tmp_path / "old"))
    (folder / "0_Transformer").mkdir()
    for path in [p for p in folder.iterdir() if p.is_file() and p.name not in ("modules.json", "README.md")]:
        if path.name != "config_sentence_transformers.json":
            path.rename(folder / "0_Transformer" / path.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    with_json(str(folder), "0_Transformer/sentence_bert_config.json", max_seq_length=7)
    assert assert_theirs(str(folder)).max_length == 7


@pytest.mark.parametrize(("limit", "file"), [(6, "sentence_bert_config.json"), (40, "sentence_roberta_config.json")])
def test_lengths_and_case(tmp_path: Path, encoder: str, limit: int, file: str) -> None:
    """The tokenizer says something else: cased, and cut at 20."""
    cased = copy_of(encoder, tmp_path / "cased")
    BertTokenizerFast.from_pretrained(encoder, do_lower_case=False, model_max_length=20).save_pretrained(cased)
    folder = st_folder(tmp_path, parts.Pooling(32), encoder=cased)
    cut_at_20 = assert_theirs(folder)
    assert cut_at_20.max_length == 20
    (Path(folder) / "sentence_bert_config.json").unlink()
    with_json(folder, file, max_seq_length=limit, do_lower_case=True)
    embedder = assert_theirs(folder)
    assert embedder.max_length == limit
    assert np.abs(embedder.encode(TEXTS) - cut_at_20.encode(TEXTS))[5].max() > 0.01


def test_a_longer_limit_than_the_model_takes_is_the_models(encoder: str, tmp_path: Path) -> None:
    folder = with_json(
        st_folder(tmp_path, parts.Pooling(32), encoder=encoder), "sentence_bert_config.json", max_seq_length=512
    )
    assert Embedder(folder).tokenize(["the cat " * 100]).lengths.tolist() == [48]


def test_prompts(whole: str, tmp_path: Path) -> None:
    assert_theirs(whole, *({"prompt_name": name} for name in ("query", "passage", "document")))
    folder = with_json(
        copy_of(whole, tmp_path / "default"), "config_sentence_transformers.json", default_prompt_name="query"
    )
    embedder = assert_theirs(folder, {}, {"prompt": ""}, {"prompt": "red "})
    assert "query 'the red cat ' by default" in str(embedder)
    np.testing.assert_array_equal(embedder.encode(TEXTS), embedder.encode(TEXTS, "query"))
    passages = Embedder(folder, prompt="passage", batch_tokens=30).encode(TEXTS)
    np.testing.assert_array_equal(passages, embedder.encode(TEXTS, "passage"))
    assert np.abs(embedder.encode(TEXTS) - embedder.encode(TEXTS, prompt_text="")).max() > 0.01
    with pytest.raises(InputError, match="no prompt 'cats', but 'query', 'document', 'passage'"):
        embedder.encode(TEXTS, "cats")
    with pytest.raises(InputError, match="no prompt 'cats'"):
        Embedder(folder, prompt="cats")
    with pytest.raises(InputError, match="not both"):
        embedder.encode(TEXTS, "query", prompt_text="a")


def test_truncated_vectors(whole: str, tmp_path: Path) -> None:
    folder = with_json(copy_of(whole, tmp_path / "short"), "config_sentence_transformers.json", truncate_dim=3)
    assert_theirs(folder)
    for normalize in (None, True):
        np.testing.assert_allclose(
            Embedder(folder, truncate_dim=5, normalize=normalize).encode(TEXTS),
            theirs(folder, truncate_dim=5, normalize_embeddings=bool(normalize)),
            atol=1e-5,
        )
    with pytest.raises(InputError, match="truncate_dim must be at least 1, but is 0"):
        Embedder(folder, truncate_dim=0)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan", None])
def test_similarity(whole: str, tmp_path: Path, name: str | None) -> None:
    folder = with_json(copy_of(whole, tmp_path / "like"), "config_sentence_transformers.json", similarity_fn_name=name)
    embedder = Embedder(folder)
    vectors = torch.randn(7, 8).numpy()
    to_similarity = library.util.similarity.SimilarityFunction.to_similarity_fn
    expected = to_similarity(name or "cosine")(vectors[:3], vectors).numpy()
    np.testing.assert_allclose(embedder.similarity(vectors[:3], vectors), expected, atol=1e-5)
    np.testing.assert_allclose(embedder.similarity(vectors[0], vectors), expected[:1], atol=1e-5)
    assert f"{name or 'cosine'} similarity" in str(embedder)


def test_flags_override_the_folder(encoder: str, whole: str, tmp_path: Path) -> None:
    folder = st_folder(tmp_path, parts.Pooling(32), parts.Normalize(), encoder=encoder)
    with_json(folder, "sentence_bert_config.json", max_seq_length=7)
    lengths = np.linalg.norm(Embedder(folder, normalize=False).encode(TEXTS), axis=1)
    assert (abs(lengths - 1) > 0.1).all()
    plain = Embedder(encoder, pool=("cls", "max"), max_length=30)
    np.testing.assert_array_equal(
        Embedder(folder, pool=["cls", "max"], normalize=False, max_length=30).encode(TEXTS), plain.encode(TEXTS)
    )
    assert str(plain) == ("BertModel, cls + max: 64 dimensions; at most 30 tokens; cosine similarity (no modules.json)")
    with pytest.raises(InputError, match=r"has behind cls \+ mean fits no cls$"):
        Embedder(whole, pool="cls")


def test_a_real_one() -> None:
    texts = ["A fox could not reach the grapes.", "", "Paris", "He said nothing, and walked on. " * 60]
    embedder = Embedder(minilm())
    np.testing.assert_allclose(embedder.encode(texts), theirs(minilm(), texts), atol=1e-5, rtol=0)
    assert str(embedder) == "BertModel, mean, length 1: 384 dimensions; at most 256 tokens; cosine similarity"


def test_in_16_bits_the_modules_stay_exact(whole: str) -> None:
    embedder = Embedder(whole, dtype=torch.bfloat16)
    assert embedder.model.dtype == torch.bfloat16
    vectors = embedder.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert ((vectors * theirs(whole)).sum(1) > 0.99).all()


def _unknown_module(folder: str) -> None:
    modules = json.loads((Path(folder) / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.CNN"
    (Path(folder) / "modules.json").write_text(json.dumps(modules))


def _foreign_module(folder: str) -> None:
    modules = json.loads((Path(folder) / "modules.json").read_text())
    modules[0]["type"] = "custom_st.Transformer"
    (Path(folder) / "modules.json").write_text(json.dumps(modules))


def _other_weights(folder: str) -> None:
    save_file(
        {"linear.weight": torch.zeros(8, 63), "linear.bias": torch.zeros(8)}, f"{folder}/2_Dense/model.safetensors"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_unknown_module, "modules.json has CNN, which fastbert does not know: it knows Transformer, Pooling, Dense"),
        (_foreign_module, "modules.json begins with custom_st.Transformer, but"),
        (_other_weights, r"2_Dense/model.safetensors does not fit its config.json: size mismatch for linear.weight"),
        (lambda f: with_json(f, "2_Dense/config.json", in_features=48), "2_Dense takes vectors of 48, but .* gives 64"),
        (lambda f: with_json(f, "2_Dense/config.json", out_features=9), "2_Dense/model.safetensors does not fit"),
        (
            lambda f: with_json(f, "3_LayerNorm/config.json", dimension=9),
            "3_LayerNorm takes vectors of 9, but .* gives 8",
        ),
        (lambda f: with_json(f, "1_Pooling/config.json", embedding_dimension=31), "1_Pooling takes vectors of 31, but"),
        (
            lambda f: with_json(f, "1_Pooling/config.json", pooling_mode="median"),
            "1_Pooling: pool must be one of .*'median'",
        ),
        (lambda f: (Path(f) / "1_Pooling/config.json").unlink(), "1_Pooling/config.json has no embedding_dimension"),
        (lambda f: (Path(f) / "2_Dense/model.safetensors").unlink(), "2_Dense has no weights: neither"),
        (
            lambda f: (Path(f) / "2_Dense/model.safetensors").write_bytes(b"x" * 99),
            "2_Dense/model.safetensors is damaged",
        ),
        (lambda f: (Path(f) / "2_Dense/config.json").write_text("{"), "2_Dense/config.json is no JSON"),
        (lambda f: (Path(f) / "modules.json").write_text("[{}]"), "modules.json is no list of modules"),
        (
            lambda f: with_json(f, "2_Dense/config.json", activation_function="os.system"),
            "2_Dense: os.system is no activation that fastbert knows",
        ),
        (
            lambda f: with_json(f, "2_Dense/config.json", activation_function="torch.nn.Linear"),
            "2_Dense: torch.nn.Linear is no activation",
        ),
        (
            lambda f: with_json(f, "2_Dense/config.json", module_input_name="token_embeddings"),
            "2_Dense is for token_embeddings, not for vectors",
        ),
        (
            lambda f: with_json(f, "sentence_bert_config.json", processing_kwargs={"text": {"max_length": 9}}),
            "its Transformer has processing_kwargs",
        ),
        (
            lambda f: with_json(f, "sentence_bert_config.json", transformer_task="fill-mask"),
            "transformer_task 'fill-mask'",
        ),
        (
            lambda f: with_json(f, "config_sentence_transformers.json", similarity_fn_name="maxsim"),
            "is for similarity 'maxsim', but fastbert knows cosine, dot",
        ),
        (
            lambda f: with_json(f, "config_sentence_transformers.json", model_type="SparseEncoder"),
            "is a SparseEncoder of sentence-transformers, no SentenceTransformer: use fastbert.SparseEmbedder",
        ),
        (
            lambda f: with_json(f, "config_sentence_transformers.json", model_type="MultiVectorEncoder"),
            "is a MultiVectorEncoder of sentence-transformers, no SentenceTransformer$",
        ),
    ],
)
def test_what_cannot_be_done_is_said(whole: str, tmp_path: Path, change: Any, message: str) -> None:
    folder = copy_of(whole, tmp_path / "changed")
    change(folder)
    with pytest.raises(InputError, match=message) as raised:
        load_modules(read_folder(folder, DENSE), 32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("BertForSequenceClassification", "fastbert.Classifier, or fastbert.Reranker"),
        ("BertForTokenClassification", "fastbert.Tagger"),
        ("BertForQuestionAnswering", "fastbert.Answerer"),
    ],
)
def test_a_classifier_is_no_embedder(tmp_path: Path, kind: str, instead: str) -> None:
    with pytest.raises(InputError, match=f"is a {kind}, which was not made for vectors: use {instead}"):
        Embedder(tiny_checkpoint(tmp_path, kind))


def test_the_hub_is_asked_for_a_folders_files(whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, file: str, *, local_files_only: bool) -> str:
        if not (Path(whole) / file).is_file():
            raise EntryNotFoundError(file)
        return f"{whole}/{file}"

    monkeypatch.setattr(huggingface_hub, "model_info", lambda name, timeout: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    there, here = (read_folder(name, DENSE) for name in ("some/one", whole))
    assert (there.modules, there.prompts, there.transformer) == (here.modules, here.prompts, "some/one")
    vectors = torch.randn(3, 64)
    actual, expected = (load_modules(folder, 32)[1](vectors) for folder in (there, here))
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)
