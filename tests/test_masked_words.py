"""Masked tokens that are no padding: somebody wrote them, so that all rows are transformers', unless told otherwise."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import ModelOutput

import fastbert
from fastbert.families import FAMILIES
from tests.families import both, names, reads_first, without_cache
from tests.models import (
    BATCH,
    LENGTH,
    assert_gradients_close,
    assert_outputs_equal,
    batch,
    head_of,
    mask_named,
    no_dropout,
    pair,
    tiny_config,
)

CLASSES = {
    "albert": "AlbertForMaskedLM",
    "bert": "BertForPreTraining",
    "camembert": "CamembertForTokenClassification",
    "data2vec_text": "Data2VecTextForMaskedLM",
    "distilbert": "DistilBertForTokenClassification",
    "electra": "ElectraForPreTraining",
    "ernie": "ErnieForSequenceClassification",
    "roberta": "RobertaForMaskedLM",
    "roberta_prelayernorm": "RobertaPreLayerNormForTokenClassification",
    "xlm_roberta": "XLMRobertaForMaskedLM",
    "xlm_roberta_xl": "XLMRobertaXLForTokenClassification",
}
MASKS = ("right", "left", "holes")


def _outputs(name: str, inputs: dict[str, Any], training: bool, **options: Any) -> tuple[Any, list[ModelOutput]]:
    """fastbert's model, and what transformers' and it return, with gradients in training."""
    stock, fast = both(name, **options)
    outputs = []
    for model in (stock, fast):
        with torch.set_grad_enabled(training):
            outputs.append(model.train(training)(**inputs, **without_cache(name), output_hidden_states=True))
    return (stock, fast), outputs


def _differentiate(models: Any, outputs: list[ModelOutput], rows: Tensor | None) -> None:
    """The head's loss, and one of logits that reads these rows, or all."""
    for output in outputs:
        logits = output[1]
        chosen = logits if rows is None or logits.shape[:2] != rows.shape else logits[rows]
        (output.loss + chosen.square().mean()).backward()
    assert_gradients_close(models[1], models[0])


def _masked(output: ModelOutput, mask: Tensor) -> list[Tensor]:
    return [hidden[mask == 0] for hidden in output.hidden_states]


def test_a_class_of_each_family() -> None:
    assert CLASSES.keys() == {*FAMILIES}
    assert all(name in names(family) for family, name in CLASSES.items())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CLASSES.values())
class TestGivenNothing:
    def test_words(self, name: str, mask: str, training: bool) -> None:
        """One is enough. It is not slower by an operator that is not fused, so strict=True takes it."""
        keep = mask_named(mask)
        inputs = batch(name, keep)
        row, column = (keep == 0).nonzero()[0]
        inputs["input_ids"][row, column] = 7
        models, (expected, actual) = _outputs(name, inputs, training, strict=True)
        assert_outputs_equal(actual, expected, None)
        assert all((hidden != 0).any(-1).all() for hidden in _masked(actual, keep))
        report = fastbert.report(models[1])
        pad = models[1].config.pad_token_id
        assert report.computed == {f"attention_mask is 0 where input_ids are not pad_token_id ({pad})": 1}
        assert (report.packed_calls, report.fallbacks.total()) == (1, 0)
        assert f"  1 x packed, on all rows: {next(iter(report.computed))}" in str(report)
        if training:
            _differentiate(models, [expected, actual], None)

    def test_padding(self, name: str, mask: str, training: bool) -> None:
        keep = mask_named(mask)
        models, (expected, actual) = _outputs(name, batch(name, keep), training)
        assert_outputs_equal(actual, expected, keep)
        report = fastbert.report(models[1])
        assert not report.computed
        if mask == "left" and reads_first(models[0]):
            assert (report.packed_calls, report.fallbacks.total()) == (0, 1)
        else:
            assert (report.packed_calls, report.fallbacks.total()) == (1, 0)
            assert all((hidden == 0).all() for hidden in _masked(actual, keep))
        if training:
            _differentiate(models, [expected, actual], keep.bool())


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", CLASSES.values())
class TestTold:
    def test_zeros(self, name: str, training: bool, caplog: pytest.LogCaptureFixture) -> None:
        keep = mask_named("holes")
        models, (expected, actual) = _outputs(name, batch(name, keep, words=True), training, padded_rows="zeros")
        assert_outputs_equal(actual, expected, keep)
        assert all((hidden == 0).all() for hidden in _masked(actual, keep))
        assert (fastbert.report(models[1]).computed, caplog.records) == ({}, [])
        if training:
            _differentiate(models, [expected, actual], keep.bool())

    def test_computed(self, name: str, training: bool, caplog: pytest.LogCaptureFixture) -> None:
        for words in (False, True):
            inputs = batch(name, mask_named("holes"), words=words)
            models, (expected, actual) = _outputs(name, inputs, training, padded_rows="computed")
            assert_outputs_equal(actual, expected, None)
            assert (fastbert.report(models[1]).computed, caplog.records) == ({}, [])
            if training:
                _differentiate(models, [expected, actual], None)


class TestWhatIsPadding:
    """Rows of a mask's zeros, by their ids and the configuration."""

    def _last(self, ids: int, *, mask: Tensor | None = None, vectors: bool = False, **changes: Any) -> tuple[Any, bool]:
        """The model, and whether the last two rows, which are masked, are zeros. ids: theirs."""
        model = fastbert.BertModel(tiny_config(**changes)).eval()
        inputs: dict[str, Any] = {"input_ids": torch.randint(5, 100, (BATCH, LENGTH))}
        inputs["input_ids"][:, -2:] = ids
        if vectors:
            inputs = {"inputs_embeds": model.embeddings.word_embeddings(inputs["input_ids"].clamp(min=0))}
        if mask is None:
            mask = (torch.arange(LENGTH) < LENGTH - 2).long().expand(BATCH, -1)
        hidden = model(**inputs, attention_mask=mask).last_hidden_state[:, -2:]
        return model, bool((hidden == 0).all())

    @pytest.mark.parametrize("padding", [0, 9])
    @pytest.mark.parametrize("ids", [0, 9, 4])
    def test_the_configurations_id(self, ids: int, padding: int) -> None:
        assert self._last(ids, pad_token_id=padding)[1] == (ids == padding)

    def test_as_the_configuration_is_now(self) -> None:
        model, _ = self._last(9)
        model.config.pad_token_id = 9
        mask = torch.tensor([[1, 1, 0]])
        assert (model(torch.tensor([[5, 6, 9]]), mask).last_hidden_state[0, 2] == 0).all()
        assert (model(torch.tensor([[5, 6, 0]]), mask).last_hidden_state[0, 2] != 0).any()

    def test_all_where_there_is_no_id(self) -> None:
        assert self._last(4, pad_token_id=None)[1]

    def test_all_of_vectors(self) -> None:
        assert self._last(4, vectors=True)[1]

    def test_what_is_in_no_vocabulary(self) -> None:
        assert self._last(-100)[1]

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
    def test_one_mask_for_all_rows_of_any_dtype(self, dtype: torch.dtype) -> None:
        mask = (torch.arange(LENGTH) < LENGTH - 2)[None].to(dtype)
        assert self._last(0, mask=mask)[1]
        assert not self._last(4, mask=mask)[1]

    def test_a_mask_of_ones_masks_nothing(self) -> None:
        model, _ = self._last(4, mask=torch.ones(BATCH, LENGTH))
        assert not fastbert.report(model).computed


def test_each_call_goes_by_its_own_ids(caplog: pytest.LogCaptureFixture) -> None:
    """And the first that computes all rows is said, with what to do."""
    _, fast = pair("BertModel")
    keep = mask_named("right")
    for words in (False, True, False, True):
        zeros = (fast(**batch("BertModel", keep, words=words)).last_hidden_state[keep == 0] == 0).all()
        assert zeros == (not words)
    (record,) = [record for record in caplog.records if record.name == "fastbert"]
    assert record.levelno == logging.WARNING
    for word in ("computed the rows of masked tokens", "pad_token_id (0)", 'padded_rows="zeros"'):
        assert word in record.getMessage()
    assert [*fastbert.report(fast).computed.values()] == [2]
    assert [*fastbert.report(copy.deepcopy(fast)).computed.values()] == [2]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification", "RobertaForMaskedLM"])
def test_labels_of_masked_words_are_in_the_loss(name: str) -> None:
    inputs = batch(name, mask_named("right"), words=True)
    inputs["labels"] = torch.randint(0, 3, inputs["labels"].shape)
    models, outputs = _outputs(name, inputs, True, strict=True)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    _differentiate(models, outputs, None)


def test_answers() -> None:
    """Their logits are -1000 on padding only."""
    stock, fast = pair("BertForQuestionAnswering", tiny_config(num_labels=2))
    inputs = batch("BertForQuestionAnswering", mask_named("holes"), words=True)
    inputs |= {"start_positions": torch.zeros(BATCH).long(), "end_positions": torch.tensor([1, 99, 0, 2, 0])}
    expected, actual = (no_dropout(model)(**inputs) for model in (stock, fast))
    assert_outputs_equal(actual, expected, None)
    for output in (expected, actual):
        output.loss.backward()
    assert_gradients_close(fast, stock)
    assert fastbert.report(fast).packed_calls == 1


@pytest.mark.parametrize("name", ["BertForMultipleChoice", "RobertaForMultipleChoice", "BertForSequenceClassification"])
@pytest.mark.parametrize("mask", ["left", "empty row"])
def test_a_first_token_that_is_masked(name: str, mask: str) -> None:
    """Of words: it is computed, and nothing falls back; a row of nothing else is transformers' too."""
    _, (expected, actual) = _outputs(name, batch(name, mask_named(mask), words=True), False, strict=True)
    assert head_of(name) in ("ForMultipleChoice", "ForSequenceClassification")
    assert_outputs_equal(actual, expected, None)


def test_a_decoder() -> None:
    stock, fast = pair("BertLMHeadModel", tiny_config(is_decoder=True))
    inputs = batch("BertLMHeadModel", mask_named("right"), words=True)
    expected, actual = (no_dropout(model)(**inputs) for model in (stock, fast))
    assert_outputs_equal(actual, expected, None)
    assert fastbert.report(fast).computed.total() == 1


def test_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """Whether there are such is data, which breaks the graph where the number of tokens does."""
    stock, fast = pair("BertModel")
    torch.compiler.reset()
    compiled = torch.compile(fast, backend="aot_eager")
    keep = mask_named("right")
    with torch.no_grad():
        for words in (True, False, True):
            inputs = batch("BertModel", keep, words=words)
            assert_outputs_equal(compiled(**inputs), stock(**inputs), None if words else keep)
    assert len([record for record in caplog.records if record.name == "fastbert"]) == 1
