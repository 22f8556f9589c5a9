"""transformers' Trainer on fastbert's classes and on patched models."""

from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("accelerate")  # the Trainer needs it

from transformers import BertTokenizerFast

import fastbert
from tests.curves import losses
from tests.models import tiny_config

SENTENCES = [
    ("a fox looks at sour grapes", 0),
    ("the tortoise wins the race against the hare", 1),
    ("a crow drops pebbles into the pitcher until the water rises and he can drink", 1),
    ("the dog loses his bone", 0),
    ("mice would bell the cat but who will do it", 0),
    ("the lion lets a mouse go and the mouse sets the lion free", 1),
    ("the boy cried wolf once too often", 0),
    ("the sun makes the traveller take off his cloak", 1),
]


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizerFast:
    words = sorted({word for text, _ in SENTENCES for word in text.split()})
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    return BertTokenizerFast(vocab=str(vocabulary))


def _losses(
    model: torch.nn.Module,
    tokenizer: BertTokenizerFast,
    folder: Path,
    accumulation: int,
    *,
    masked_lm: bool = False,
) -> list[float]:
    """The loss curve of a few epochs, the same batches in the same order whatever the accumulation."""
    features = [{**tokenizer(text), "labels": label} for text, label in SENTENCES]
    collator = transformers.DataCollatorWithPadding(tokenizer)
    if masked_lm:
        features = [{**tokenizer(text)} for text, _ in SENTENCES]
        for f in features:
            f["labels"] = [i if n % 3 == 1 else -100 for n, i in enumerate(f["input_ids"])]
        collator = transformers.DataCollatorForTokenClassification(tokenizer)
    return losses(
        model,
        features,
        collator,
        folder,
        num_train_epochs=3,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-3,
    )


def _model(kind: str, head: str, tokenizer: BertTokenizerFast) -> transformers.PreTrainedModel:
    config = tiny_config(
        vocab_size=len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2
    )
    torch.manual_seed(2)
    stock = getattr(transformers, head)(config)
    if kind == "stock":
        return stock
    if kind == "patched":
        return fastbert.patch(stock)
    fast = getattr(fastbert, head)(config)
    fast.load_state_dict(stock.state_dict())
    return fast


@pytest.mark.parametrize("kind", ["built", "patched"])
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_loss_curves(head: str, kind: str, tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    masked_lm = head == "BertForMaskedLM"
    expected = _losses(_model("stock", head, tokenizer), tokenizer, tmp_path, 1, masked_lm=masked_lm)
    for accumulation in (1, 4):
        model = _model(kind, head, tokenizer)
        actual = _losses(model, tokenizer, tmp_path, accumulation, masked_lm=masked_lm)
        assert actual == pytest.approx(expected, abs=1e-4)
        assert fastbert.report(model).fallbacks.total() == 0
        assert fastbert.report(model).packed_calls == 3 * accumulation
    assert expected[-1] < expected[0]


def test_lora(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def curve(kind: str) -> list[float]:
        torch.manual_seed(3)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.0)
        model = peft.get_peft_model(_model(kind, "BertForSequenceClassification", tokenizer), config)
        return _losses(model, tokenizer, tmp_path, 1)

    assert curve("patched") == pytest.approx(curve("stock"), abs=1e-4)


def test_trained_model_reloads_in_transformers(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    model = _model("built", "BertForSequenceClassification", tokenizer)
    _losses(model, tokenizer, tmp_path, 1)
    model.save_pretrained(tmp_path / "saved")
    reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    tokens = tokenizer([text for text, _ in SENTENCES], padding=True, return_tensors="pt")
    torch.testing.assert_close(reloaded(**tokens).logits, model.eval()(**tokens).logits, atol=1e-5, rtol=1e-5)
    assert type(reloaded) is transformers.BertForSequenceClassification
