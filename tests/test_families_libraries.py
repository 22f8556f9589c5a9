"""Models of other families in what people use them with: PEFT, the Trainer, pipelines, sentence-transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import fastbert
from fastbert.inference.embedder import Embedder
from fastbert.inference.loading import load_model
from fastbert.inference.masks import fill_mask
from tests.curves import losses
from tests.families import both, dropping
from tests.models import assert_gradients_close, batch, config_of, mask_named

TEXTS = [
    "the fox looks at sour grapes",
    "the crow drinks",
    "a lion lets the mouse go and the mouse sets the lion free",
    "mice would bell the cat",
]

ADAPTED = {
    "DistilBertForSequenceClassification": ["q_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "AlbertForMaskedLM": ["query", "value", "ffn", "ffn_output", "embedding_hidden_mapping_in"],
    "ElectraForPreTraining": ["query", "value", "dense", "embeddings_project"],
    "RobertaForMaskedLM": ["query", "value", "dense"],
    "XLMRobertaXLForTokenClassification": ["query", "value", "dense"],
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("name", ADAPTED)
def test_lora(name: str) -> None:
    """Packed, and equal to PEFT on transformers' own; it trains."""
    peft = pytest.importorskip("peft")
    stock, _ = both(name)
    config = peft.LoraConfig(r=4, target_modules=ADAPTED[name], init_lora_weights=False, lora_dropout=0.0)
    expected = peft.get_peft_model(copy.deepcopy(stock), config)
    actual = fastbert.patch(copy.deepcopy(expected), strict=True)
    inputs = batch(name, mask_named("right"))
    for model in (expected, actual):
        model.train()(**inputs).loss.backward()
    assert_gradients_close(actual, expected)
    torch.testing.assert_close(actual(**inputs).loss, expected(**inputs).loss, atol=1e-5, rtol=1e-5)
    assert fastbert.report(actual).packed_calls == 2


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token; the padding id is RoBERTa's."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = special + sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(words)}
    rust = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    rust.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rust.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=rust,
        pad_token="<pad>",
        mask_token="<mask>",
        unk_token="<unk>",
        model_max_length=60,
        model_input_names=["input_ids", "attention_mask"],
    )


def _model(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    torch.manual_seed(1)
    config = config_of(name, num_hidden_layers=2, pad_token_id=tokenizer.pad_token_id, **dropping(0.0))
    return getattr(transformers, name)(config)


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "DistilBertForSequenceClassification", "AlbertForMaskedLM"])
def test_three_steps_of_the_trainer(name: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    features = [dict(tokenizer(text)) for text in TEXTS]
    for i, feature in enumerate(features):
        ids = feature["input_ids"]
        feature["labels"] = [t if n % 2 else -100 for n, t in enumerate(ids)] if "MaskedLM" in name else i % 3
    kind = transformers.DataCollatorForTokenClassification if "MaskedLM" in name else None
    collator = (kind or transformers.DataCollatorWithPadding)(tokenizer)

    def curve(model: Any, accumulation: int) -> list[float]:
        sizes = {"per_device_train_batch_size": len(TEXTS) // accumulation, "gradient_accumulation_steps": accumulation}
        return losses(model, features, collator, tmp_path, max_steps=3, learning_rate=1e-2, **sizes)

    fast = fastbert.patch(_model(name, tokenizer), strict=True)
    expected, actual = curve(_model(name, tokenizer), 1), curve(fast, 2)
    assert actual == pytest.approx(expected, abs=1e-4)
    assert expected[2] < expected[0]
    assert fastbert.report(fast).packed_calls == 6


@pytest.mark.parametrize("family", ["Roberta", "DistilBert"])
def test_pipelines(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{text} <mask>" for text in TEXTS]
    for task, head in (("feature-extraction", "Model"), ("fill-mask", "ForMaskedLM")):
        call = transformers.pipeline(task, model=_model(family + head, tokenizer), tokenizer=tokenizer)
        expected = call(texts)
        fastbert.patch(call.model, strict=True)
        actual = call(texts)
        if task == "fill-mask":
            actual, expected = ([[answer["score"] for answer in of] for of in all_] for all_ in (actual, expected))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(e), atol=1e-5, rtol=1e-5)
        assert fastbert.report(call.model).packed_calls >= 1


@pytest.mark.parametrize("family", ["Albert", "DistilBert", "Electra", "Roberta"])
def test_vectors_and_masks(family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """`fastbert embed` and `fastbert fill-mask`: of a masked language model's checkpoint, both."""
    _model(f"{family}ForMaskedLM", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = [*TEXTS, " ".join(TEXTS * 5)]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    keep = inputs["attention_mask"][..., None]
    stock = load_model(transformers.AutoModel, str(tmp_path))
    with torch.no_grad():
        expected = (stock(**inputs).last_hidden_state * keep).sum(1) / keep.sum(1)
    actual = Embedder.from_pretrained(str(tmp_path)).encode(texts)
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=1e-5, rtol=0)

    call = transformers.pipeline("fill-mask", model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    model = fastbert.patch(load_model(transformers.AutoModelForMaskedLM, str(tmp_path), may_miss=()), strict=True)
    for mask in ("<mask>", "[MASK]"):
        (fillings,) = fill_mask(model, tokenizer, f"the {mask} drinks", top_k=3)
        for filling, answer in zip(fillings, call("the <mask> drinks", top_k=3), strict=True):
            assert filling.token == answer["token_str"]
            assert filling.text == f"the {answer['token_str']} drinks"
            assert filling.probability == pytest.approx(answer["score"], abs=1e-5)


def test_sentence_transformer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    _model("RobertaModel", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    expected = model.encode(TEXTS)
    fastbert.patch(model, strict=True)
    assert abs(model.encode(TEXTS) - expected).max() <= 1e-5
    assert fastbert.report(model).packed_calls >= 1
