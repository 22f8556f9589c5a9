"""What libraries and papers do to BERT's modules, by name: PEFT, accelerate, the Trainer, Monte Carlo dropout."""

import copy
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from tests.models import HEADS, assert_gradients_close, batch, mask_named, no_dropout, pair, tiny_config
from tests.optional import needs

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def _model(name: str, **changes: Any) -> transformers.PreTrainedModel:
    return pair(name, tiny_config(**SMALL, **changes))[0]


def _inputs(name: str) -> dict[str, Tensor]:
    return batch(name, mask_named("right"))


@needs("accelerate")
def test_neftune(tmp_path: Path) -> None:
    """The Trainer's hook adds noise to what the word embeddings return, a number for each of its three dimensions."""
    rows = [
        {"input_ids": [2, 7, 8, 3], "attention_mask": [1, 1, 1, 1], "labels": 1},
        {"input_ids": [2, 9, 3, 0], "attention_mask": [1, 1, 1, 0], "labels": 0},
    ]
    stock = _model("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    losses = []
    for model in (stock, fastbert.patch(copy.deepcopy(stock))):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            max_steps=2,
            neftune_noise_alpha=5.0,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        losses.append(transformers.Trainer(model=model, args=arguments, train_dataset=rows * 2).train().training_loss)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert fastbert.report(model).packed_calls + fastbert.report(model).fallbacks.total() >= 2


PEFT = {
    "query": {"target_modules": ["query"]},
    "query and value": {"target_modules": ["query", "value"]},
    "words": {"target_modules": ["query", "word_embeddings"]},
    "positions": {"target_modules": ["query", "position_embeddings"]},
    "some words": {"target_modules": ["query"], "trainable_token_indices": [7, 8]},
    "dense": {"target_modules": ["dense"]},
    "pooler, saved": {"target_modules": ["query", "dense", "classifier"], "modules_to_save": ["pooler"]},
    "LayerNorm, saved": {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]},
}
PACKED = ("query", "query and value")


@needs("peft", "accelerate")
@pytest.mark.parametrize("order", ["patched before", "patched after"])
@pytest.mark.parametrize("name", PEFT)
def test_peft(name: str, order: str) -> None:
    import peft

    options = PEFT[name]

    stock = _model("BertForSequenceClassification")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_dropout=0.0, init_lora_weights=False, **options)
    fast = copy.deepcopy(stock)
    if order == "patched before":
        fastbert.patch(fast)
    models = []
    for model in (stock, fast):
        torch.manual_seed(1)
        models.append(no_dropout(peft.get_peft_model(model, config)))
    if order == "patched after":
        fastbert.patch(models[1])
    inputs = _inputs("BertForSequenceClassification")
    losses = [model(**inputs).loss for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(models[1], models[0])
    with torch.no_grad():
        results = [model.eval()(**inputs).logits for model in models]
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    report = fastbert.report(models[1])
    assert report.packed_calls + report.fallbacks.total() >= 2
    if name in PACKED:
        assert report.packed_calls == 2
    assert fastbert.unpatch(models[1])(**inputs).logits.equal(models[0](**inputs).logits)


@needs("accelerate")
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("order", ["patched before", "patched after"])
def test_a_model_that_accelerate_dispatched(name: str, order: str) -> None:
    """Its hooks keep each module's old `forward`."""
    import accelerate

    stock = _model(name)
    inputs = {key: value for key, value in _inputs(name).items() if key != "labels"}
    fast = copy.deepcopy(stock)
    places = ["cls"] if name == "BertForMaskedLM" else ["pooler"]
    base = "bert." if name == "BertForMaskedLM" else ""
    places += [base + part for part in ("embeddings", "encoder.layer.0", "encoder.layer.1")]
    if order == "patched before":
        fastbert.patch(fast)
    fast = accelerate.dispatch_model(fast, dict.fromkeys(places, "cpu"), main_device="cpu", force_hooks=True)
    if order == "patched after":
        fastbert.patch(fast)
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(fast(**inputs)[0][kept], stock(**inputs)[0][kept], atol=1e-5, rtol=1e-5)
    report = fastbert.report(fast)
    assert report.packed_calls + report.fallbacks.total() >= 1
    torch.testing.assert_close(fastbert.unpatch(fast)(**inputs)[0], stock(**inputs)[0], atol=1e-5, rtol=1e-5)


class AlwaysOn(nn.Module):
    """Monte Carlo dropout: in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("other", [AlwaysOn(), nn.AlphaDropout(0.5), Doubled()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    "place", ["embeddings.dropout", "encoder.layer.0.attention.output.dropout", "encoder.layer.0.output.dropout"]
)
def test_another_module_instead_of_dropout(place: str, other: nn.Module, training: bool) -> None:
    """The same numbers from the same generator: it is called with what transformers calls it with."""
    stock = no_dropout(_model("BertModel")).train(training)
    stock.set_submodule(place, other)
    fast = fastbert.patch(copy.deepcopy(stock))
    inputs, results = _inputs("BertModel"), []
    for model in (stock, fast):
        torch.manual_seed(1)
        results.append(model(**inputs).last_hidden_state[inputs["attention_mask"].bool()])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["embeddings.dropout", "attention.self.dropout", "output.dropout"])
def test_a_dropout_in_training_mode_in_evaluation(place: str) -> None:
    """p = 1: all is dropped, so that there is something to compare. Attention asks the mode of the attention."""
    stock = _model("BertModel")
    for name, module in stock.named_modules():
        if name.endswith(place):
            module.p = 1.0
            stock.get_submodule(name.removesuffix(".dropout")).train()
    inputs = _inputs("BertModel")
    kept = inputs["attention_mask"].bool()
    expected = stock(**inputs).last_hidden_state[kept]
    actual = fastbert.patch(stock)(**inputs).last_hidden_state[kept]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def _on_output_dense(model: Any) -> nn.Module:
    return model.bert.encoder.layer[1].output.dense


def _scaled(module: nn.Module, args: Any, output: Any) -> Any:
    return 2 * output


def _over_rows(x: Tensor) -> Tensor:
    """Not of each token alone."""
    return x - x.mean(0)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda m: _on_output_dense(m).register_forward_hook(_scaled),
    "a hook on a backward pass": lambda m: _on_output_dense(m).register_full_backward_hook(
        lambda module, grad_input, grad_output: (2 * grad_input[0],)
    ),
    "a class": lambda m: setattr(_on_output_dense(m), "__class__", Scaled),
    "a forward": lambda m: setattr(m.bert.encoder.layer[1].output.LayerNorm, "forward", Doubled().forward),
    "a child": lambda m: setattr(m.bert.encoder.layer[1].attention.output, "dropout", Doubled()),
    "a method": lambda m: setattr(m.bert.encoder.layer[1], "feed_forward_chunk", Doubled().forward),
    "how a table learns": lambda m: setattr(m.bert.embeddings.word_embeddings, "scale_grad_by_freq", True),
    "a function": lambda m: setattr(m.bert.encoder.layer[0].intermediate.intermediate_act_fn, "act", _over_rows),
    "a buffer": lambda m: setattr(m.bert.embeddings, "position_ids", m.bert.embeddings.position_ids.flip(-1)),
    "a buffer, in place": lambda m: m.bert.embeddings.position_ids.copy_(m.bert.embeddings.position_ids.flip(-1)),
    "the causality of the attention": lambda m: setattr(m.bert.encoder.layer[0].attention.self, "is_causal", True),
}


@pytest.mark.parametrize("change", BETWEEN)
def test_touched_between_two_calls(change: str) -> None:
    """What was found of a model in its last call is asked again in each."""
    stock = no_dropout(_model("BertForTokenClassification"))
    fast = fastbert.patch(copy.deepcopy(stock))
    inputs = _inputs("BertForTokenClassification")
    fast(**inputs)
    assert fastbert.report(fast).packed_calls == 1
    losses = []
    for model in (stock, fast):
        BETWEEN[change](model)
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(fast, stock)


class Factorised(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Embedding(100, 4), nn.Linear(4, 16))


class Sinusoidal(nn.Module):
    def forward(self, positions: Tensor) -> Tensor:
        return torch.sin(positions[..., None] / 10 ** (torch.arange(16) / 4))


class Nothing(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        return torch.zeros(*ids.shape, 16)


@pytest.mark.parametrize(
    ("table", "other"),
    [
        ("word_embeddings", Factorised()),
        ("position_embeddings", Sinusoidal()),
        ("token_type_embeddings", Nothing()),
    ],
)
def test_another_module_instead_of_a_table(table: str, other: nn.Module) -> None:
    stock = no_dropout(_model("BertForTokenClassification"))
    setattr(stock.bert.embeddings, table, other)
    fast = fastbert.patch(copy.deepcopy(stock))
    inputs = _inputs("BertForTokenClassification")
    losses = [model(**inputs).loss for model in (stock, fast)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_hook_on_a_layer_sees_padded_hidden_states(name: str) -> None:
    model, seen = fastbert.patch(_model(name)), []
    inputs = _inputs(name)
    handle = model.bert.encoder.layer[0].register_forward_hook(
        lambda module, args, output: seen.append((args[0].shape, output.shape))
    )
    model(**inputs)
    B, L = inputs["attention_mask"].shape
    assert seen == [((B, L, 16), (B, L, 16))]
    assert fastbert.report(model).packed_calls == 0
    assert any("layer.0" in reason for reason in fastbert.report(model).fallbacks)
    handle.remove()
    model(**inputs)
    assert fastbert.report(model).packed_calls == 1


@pytest.mark.parametrize("name", [*HEADS, "BertLMHeadModel"])
def test_type_hints_are_transformers_own(name: str) -> None:
    hints = [typing.get_type_hints(getattr(package, name).forward) for package in (transformers, fastbert)]
    assert hints[1] == hints[0]


def test_generation_mixin_is_a_base_as_in_transformers() -> None:
    assert transformers.GenerationMixin in transformers.BertLMHeadModel.__bases__
    assert transformers.GenerationMixin in fastbert.BertLMHeadModel.__bases__


@needs("peft")
def test_replicas_of_a_model_with_lora() -> None:
    """As DataParallel makes them: the replica shares what is no module, and its own leaves are called."""
    import peft

    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False, lora_dropout=0.0)
    stock = peft.get_peft_model(_model("BertModel"), config).eval()
    fast = fastbert.patch(copy.deepcopy(stock))
    inputs = _inputs("BertModel")
    keep = inputs["attention_mask"].bool()
    expected = fast(**inputs).last_hidden_state[keep]
    replicas = {module: module._replicate_for_data_parallel() for module in fast.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach())
    actual = replicas[fast](**inputs).last_hidden_state[keep]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual, stock(**inputs).last_hidden_state[keep], atol=1e-5, rtol=1e-5)
    assert fastbert.report(fast).packed_calls == 2
