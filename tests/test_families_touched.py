"""Every family: what is changed between two calls, hooks on layers that repeat, functions that are replaced."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastbert
from tests.families import IN_FULL, MASKED_LM, SAME, dropping, names, without_cache
from tests.models import assert_gradients_close, batch, config_of, mask_named, no_dropout, pair


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return 2 * output


CHANGES: dict[tuple[str, str], Callable[[Any], Any]] = {
    ("RobertaForMaskedLM", "where positions begin"): lambda m: setattr(m.roberta.embeddings, "padding_idx", 3),
    ("RobertaForMaskedLM", "a leaf of the head"): lambda m: m.lm_head.layer_norm.register_forward_hook(_doubled),
    ("RobertaForMaskedLM", "how positions are made"): lambda m: setattr(
        m.roberta.embeddings, "create_position_ids_from_input_ids", lambda ids, padding_idx, past: ids.flip(-1) % 20
    ),
    ("RobertaForSequenceClassification", "a leaf of the head"): lambda m: m.classifier.dense.register_forward_hook(
        _doubled
    ),
    ("RobertaForSequenceClassification", "the head"): lambda m: setattr(m.classifier, "dense", Twice()),
    ("RobertaPreLayerNormForMaskedLM", "the last LayerNorm"): lambda m: setattr(
        m.roberta_prelayernorm, "LayerNorm", Twice()
    ),
    ("RobertaPreLayerNormForMaskedLM", "a first LayerNorm"): lambda m: setattr(
        m.roberta_prelayernorm.encoder.layer[0].attention.LayerNorm, "eps", 0.5
    ),
    ("XLMRobertaXLForMaskedLM", "the last LayerNorm"): lambda m: setattr(m.roberta.encoder, "LayerNorm", Twice()),
    ("XLMRobertaXLForMaskedLM", "a dropout"): lambda m: setattr(
        m.roberta.encoder.layer[0].attention.output, "dropout", Twice()
    ),
    ("ElectraForMaskedLM", "the projection"): lambda m: m.electra.embeddings_project.register_forward_hook(_doubled),
    ("ElectraForMaskedLM", "the head's norm"): lambda m: setattr(m.generator_predictions, "LayerNorm", Twice()),
    ("ElectraForPreTraining", "an activation"): lambda m: setattr(m.discriminator_predictions, "activation", Twice()),
    ("ElectraForMultipleChoice", "the tokens it reads"): lambda m: setattr(m.sequence_summary, "summary_type", "mean"),
    ("ElectraForMultipleChoice", "its summary"): lambda m: m.sequence_summary.register_forward_hook(_doubled),
    ("ErnieForMaskedLM", "tasks"): lambda m: setattr(m.ernie.embeddings, "use_task_id", False),
    ("ErnieForMaskedLM", "their table"): lambda m: m.ernie.embeddings.task_type_embeddings.register_forward_hook(
        _doubled
    ),
    ("AlbertForMaskedLM", "a layer that repeats"): lambda m: setattr(
        m.albert.encoder.albert_layer_groups[0].albert_layers[0], "ff_chunk", lambda x: 2 * x
    ),
    ("AlbertForMaskedLM", "how many layers"): lambda m: setattr(m.config, "num_hidden_layers", 1),
    ("AlbertForMaskedLM", "to the hidden size"): lambda m: (
        m.albert.encoder.embedding_hidden_mapping_in.register_forward_hook(_doubled)
    ),
    ("AlbertForPreTraining", "the pooler"): lambda m: setattr(m.albert, "pooler_activation", Twice()),
    ("AlbertForPreTraining", "a dropout"): lambda m: setattr(m.sop_classifier, "dropout", Twice()),
    ("DistilBertForMaskedLM", "weights of its loss"): lambda m: setattr(
        m.mlm_loss_fct, "weight", torch.linspace(0, 1, 100)
    ),
    ("DistilBertForMaskedLM", "its loss"): lambda m: setattr(m, "mlm_loss_fct", nn.CrossEntropyLoss(reduction="sum")),
    ("DistilBertForMaskedLM", "smoothing"): lambda m: setattr(m.mlm_loss_fct, "label_smoothing", 0.1),
    ("DistilBertForMaskedLM", "a half of a layer"): lambda m: m.distilbert.transformer.layer[
        1
    ].ffn.register_forward_hook(_doubled),
    ("DistilBertForSequenceClassification", "before its classifier"): lambda m: setattr(m, "pre_classifier", Twice()),
    ("DistilBertForQuestionAnswering", "its dropout"): lambda m: setattr(m, "dropout", Twice()),
}


@pytest.mark.parametrize(("name", "what"), CHANGES)
def test_touched_between_two_calls(name: str, what: str) -> None:
    """What was found of a model in its last call is asked again in each."""
    stock = no_dropout(pair(name, config_of(name, num_hidden_layers=2, **dropping(0.0)))[0])
    fast = fastbert.patch(copy.deepcopy(stock))
    inputs = batch(name, None if "MultipleChoice" in name else mask_named("right"))
    if "QuestionAnswering" in name:
        inputs = {
            "input_ids": inputs["input_ids"],
            "start_positions": torch.arange(5),
            "end_positions": torch.arange(5),
        }
    before = stock(**inputs).loss
    fast(**inputs)
    assert fastbert.report(fast).packed_calls == 1
    losses = []
    for model in (stock, fast):
        CHANGES[name, what](model)
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    assert not torch.isclose(losses[0], before, atol=1e-6, rtol=0), "transformers did not feel it"
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_hook_on_a_layer_that_repeats_runs_as_often(layers: int) -> None:
    stock, fast = pair("AlbertModel", config_of("AlbertModel", num_hidden_layers=layers, num_hidden_groups=1))
    inputs = batch("AlbertModel", mask_named("right"))
    seen: list[Any] = []
    for model in (stock, fast):
        layer = model.encoder.albert_layer_groups[0].albert_layers[1]
        layer.register_forward_hook(lambda module, args, output: seen.append((args[0].shape, output.shape)))
        model(**inputs)
    assert len(seen) == 2 * layers
    assert seen[:layers] == seen[layers:]
    assert any("albert_layers.1" in reason for reason in fastbert.report(fast).fallbacks)


FUNCTIONS = ("gelu", "create_bidirectional_mask", "create_causal_mask", "eager_attention_forward", "CrossEntropyLoss")


@pytest.mark.parametrize("name", [*MASKED_LM, *(n for n in names(*SAME) if n.endswith("MaskedLM"))])
def test_a_function_of_transformers_module_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For everybody; the model falls back, and does what transformers' does with it."""
    stock, fast = pair(name, config_of(name, num_hidden_layers=1, **dropping(0.0)))
    for model in (stock, fast):
        model.set_attn_implementation("eager")
    inputs = batch(name, mask_named("right"))
    module = __import__(type(stock).__module__, fromlist=["*"])
    found = [function for function in FUNCTIONS if hasattr(module, function)]
    assert "eager_attention_forward" in found
    for function in found:
        own, calls = getattr(module, function), []

        @functools.wraps(own)
        def counting(*args: Any, own: Any = own, calls: list[int] = calls, **kwargs: Any) -> Any:
            calls.append(1)
            return own(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(module, function, counting)
            results = []
            for model in (stock, fast):
                results.append((model(**inputs).loss, len(calls)))
                calls.clear()
        (expected, times), (actual, again) = results
        assert times == again, function
        torch.testing.assert_close(actual, expected)
    assert fastbert.report(fast).packed_calls == 0
    fast(**inputs)
    assert fastbert.report(fast).packed_calls == 1


def _dropouts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


@pytest.mark.parametrize("name", IN_FULL)
def test_the_generator_moves_where_transformers_moves_it(name: str) -> None:
    """With each dropout alone, in training and where only that one trains, and with none."""
    stock = no_dropout(pair(name, config_of(name, num_hidden_layers=1, num_hidden_groups=1, inner_group_num=1))[0])
    fast = fastbert.patch(copy.deepcopy(stock))
    inputs = batch(name, mask_named("right")) | without_cache(name)
    assert len(_dropouts(stock)) == len(_dropouts(fast)) > 1
    moves = set()
    with torch.no_grad():
        for i in range(-1, len(_dropouts(stock))):
            for training in (True, False):
                moved = []
                for model in (stock, fast):
                    model.train(training)
                    for j, module in enumerate(_dropouts(model)):
                        module.p = 0.5 if i == j else 0.0
                        module.train(training or i == j)
                    before = torch.get_rng_state()
                    model(**inputs)
                    moved.append(not torch.equal(before, torch.get_rng_state()))
                assert moved[0] == moved[1], (i, training)
                moves.add(moved[0])
    assert moves == {False, True}
    assert fastbert.report(fast).packed_calls > 0
