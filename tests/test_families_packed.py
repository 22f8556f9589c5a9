"""Packed batches of every class of every family, and the positions of RoBERTa and those like it.

Dimension key:  B batch   L padded length   N features
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from tests.families import (
    BASES,
    IN_FULL,
    LENGTHS,
    LIKE_ROBERTA,
    SMOKE,
    both,
    dropping,
    pack,
    packed_and_padded,
)
from tests.models import (
    BATCH,
    LENGTH,
    MASKS,
    assert_gradients_close,
    assert_outputs_equal,
    config_of,
    head_of,
    mask_named,
    pair,
)


@pytest.mark.parametrize("name", [name for name in IN_FULL if head_of(name) != "ForMultipleChoice"])
def test_equals_padded(name: str) -> None:
    """Values, loss and gradients, of transformers' model for what is padded."""
    stock, fast = both(name, strict=True)
    packed, padded = packed_and_padded(name)
    mask = padded["attention_mask"].bool()
    if head_of(name) == "ForQuestionAnswering":
        stock = copy.deepcopy(fast)  # transformers gives padding a share of the softmax
    expected, actual = stock.train()(**padded), fast.train()(**packed)
    assert list(actual) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], pack(value, mask), atol=1e-5, rtol=1e-5, msg=lambda m, key=key: key + m)
    for output in (expected, actual):
        (output.loss if "loss" in output else _sum(output, mask)).backward()
    assert_gradients_close(fast, stock)


def _sum(output: Any, mask: Tensor) -> Tensor:
    """A loss of a base model's own: of valid tokens, and of what is pooled."""
    pooled = output.get("pooler_output")
    loss = pack(output.last_hidden_state, mask).square().sum()
    return loss if pooled is None else loss + pooled.square().sum()


CHOICES = ["BertForMultipleChoice", *(name for name in (*IN_FULL, *SMOKE) if head_of(name) == "ForMultipleChoice")]


def _questions(name: str) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    """Two of two choices, packed and (B, C, L), and labels."""
    packed, padded = packed_and_padded(name)
    labels = torch.tensor([1, 0])
    del packed["labels"], padded["labels"]
    return packed, {key: t.view(2, 2, -1) for key, t in padded.items()}, labels


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_choices_equal_padded(name: str, training: bool) -> None:
    stock, fast = (model.train(training) for model in both(name, strict=True))
    packed, padded, labels = _questions(name)
    expected, actual = stock(**padded, labels=labels), fast(**packed, labels=labels)
    assert list(actual) == list(expected) == ["loss", "logits"]
    assert actual.logits.shape == (2, 2)
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], atol=1e-5, rtol=1e-5)
    for output in (expected, actual):
        output.loss.backward()
    assert_gradients_close(fast, stock)
    rows = fast(**packed).logits
    torch.testing.assert_close(rows, expected.logits.view(4, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CHOICES)
def test_losses_of_choices_are_shares_of_an_accumulated_mean(name: str) -> None:
    packed, _, labels = _questions(name)
    _, fast = both(name, strict=True)
    mean, share = (fast(**packed, labels=labels, **more).loss for more in ({}, {"num_items_in_batch": 8}))
    torch.testing.assert_close(share, mean * 2 / 8)


def test_choices_as_they_may_come() -> None:
    """In one more dimension, as vectors, without a dictionary."""
    _, fast = both("BertForMultipleChoice", strict=True)
    packed, _, labels = _questions("BertForMultipleChoice")
    expected = fast(**packed, labels=labels).logits
    vectors = {**packed, "inputs_embeds": fast.get_input_embeddings()(packed["input_ids"])}
    del vectors["input_ids"]
    for given in ({**packed, "input_ids": packed["input_ids"][:, None]}, vectors):
        torch.testing.assert_close(fast(**given, labels=labels).logits, expected)
    loss, logits = fast(**packed, labels=labels, return_dict=False)
    torch.testing.assert_close(logits, expected)
    assert loss.shape == ()
    assert [t.shape for t in fast(**packed, return_dict=False)] == [(4, 1)]


@pytest.mark.parametrize("labels", [0, 3])
def test_choices_must_be_a_multiple_of_the_labels(labels: int) -> None:
    packed, _, _ = _questions("BertForMultipleChoice")
    with pytest.raises(ValueError, match=f"4 packed sequences are no multiple of {labels} labels"):
        both("BertForMultipleChoice")[1](**packed, labels=torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize("summary_type", ["first", "last", "mean"])
def test_electras_summary_of_all_tokens_falls_back_where_it_reads_padding(summary_type: str) -> None:
    name = "ElectraForMultipleChoice"
    stock, fast = pair(name, config_of(name, summary_type=summary_type, **dropping(0.0)))
    packed, padded = packed_and_padded(name)
    fell_back = summary_type != "first"
    inputs = {"input_ids": padded["input_ids"][:, None]}
    for more in ({}, {"attention_mask": padded["attention_mask"][:, None]}):
        expected, actual = (m(**inputs, **more).logits for m in (stock, fast))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        assert fastbert.report(fast).fallbacks.total() == (fell_back and bool(more))
    if fell_back:
        with pytest.raises(ValueError, match=r"packed batch .* must: sequence_summary reads padding"):
            fast(**packed)


def test_no_packed_batch_falls_back() -> None:
    for name in BASES:
        packed, _ = packed_and_padded(name)
        with pytest.raises(ValueError, match=r"cu_seq_lens_q.*output_attentions"):
            both(name)[1](**packed, output_attentions=True)


PADDING = 1  # RoBERTa's padding id, in all its configurations


def _ids() -> Tensor:
    """Some of them are the padding id."""
    ids = torch.randint(3, 99, (BATCH, LENGTH))
    return torch.where(torch.rand(ids.shape) < 0.3, PADDING, ids)


POSITIONS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "the padding id inside of texts": lambda: {"input_ids": _ids()},
    "given": lambda: {"input_ids": _ids(), "position_ids": torch.randperm(LENGTH)[None] + 3},
    "vectors": lambda: {"inputs_embeds": torch.randn(BATCH, LENGTH, 48)},
}


@pytest.mark.parametrize("padded_rows", [None, "zeros"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", POSITIONS)
@pytest.mark.parametrize("name", LIKE_ROBERTA)
def test_positions(name: str, case: str, mask: str, padded_rows: str | None) -> None:
    """Whatever is masked; a mask hides real tokens, and shows some that have the padding id."""
    stock, fast = both(name, padded_rows=padded_rows)
    inputs, keep = POSITIONS[case](), mask_named(mask)
    if keep is not None:
        inputs["attention_mask"] = keep
    with torch.no_grad():
        computed = padded_rows is None and case != "vectors"
        assert_outputs_equal(fast(**inputs), stock(**inputs), None if computed else keep)


@pytest.mark.parametrize("name", LIKE_ROBERTA)
def test_positions_of_a_packed_batch(name: str) -> None:
    """They begin anew with each sequence: as one sequence after the other in transformers."""
    stock, fast = both(name, strict=True)
    ids = [_ids()[0, :n] for n in LENGTHS]
    packed, _ = packed_and_padded(name)
    actual = fast(**packed | {"input_ids": torch.cat(ids)[None]}).last_hidden_state[0]
    expected = torch.cat([stock(one[None]).last_hidden_state[0] for one in ids])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    vectors = torch.randn(1, sum(LENGTHS), 48)
    del packed["input_ids"]
    actual = fast(inputs_embeds=vectors, **packed).last_hidden_state[0]
    expected = torch.cat([stock(inputs_embeds=one).last_hidden_state[0] for one in vectors.split(LENGTHS, 1)])
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [0, 7])
def test_positions_behind_another_padding_id(padding: int) -> None:
    stock, fast = pair("RobertaForMaskedLM", config_of("RobertaForMaskedLM", pad_token_id=padding))
    inputs = {"input_ids": _ids() * (padding or 1), "attention_mask": mask_named("left")}
    inputs["input_ids"] %= 100
    with torch.no_grad():
        assert_outputs_equal(fast(**inputs), stock(**inputs), inputs["attention_mask"])
