"""The last layer of masked-LM training, only for the rows that are read: nothing but time may change."""

import copy
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import fastbert
from fastbert.families import bert
from tests.models import (
    BATCH,
    LENGTH,
    MASKS,
    assert_gradients_close,
    batch,
    mask_named,
    no_dropout,
    pair,
    tiny_config,
)

HEADS = {"BertForMaskedLM": "logits", "BertForPreTraining": "prediction_logits"}
LENGTHS = (4, 1, 17, 3, 9)
PART = "last layer, in training: only the rows that are read"


def _without(model: nn.Module) -> nn.Module:
    """The same model, its last layer run for all tokens."""
    return fastbert.patch(copy.deepcopy(model), last_layer_subset=False)


def _pair(name: str, dropout_p: float = 0.1, **changes: object) -> tuple[nn.Module, nn.Module]:
    """In training mode, with the subset and without it."""
    rates = {"hidden_dropout_prob": dropout_p, "attention_probs_dropout_prob": dropout_p}
    _, fast = pair(name, tiny_config(**rates, **changes))
    return fast.train(), _without(fast).train()


def _packed(name: str, device: str = "cpu") -> dict[str, Any]:
    """A packed batch; the first tokens of two sequences have a label too."""
    T = sum(LENGTHS)
    inputs = {
        "input_ids": torch.randint(1, 100, (1, T), device=device),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device),
        "max_length_q": max(LENGTHS),
    }
    inputs["labels"] = torch.where(torch.rand(1, T, device=device) < 0.2, inputs["input_ids"], -100)
    inputs["labels"][0, [0, 4, 5]] = 7
    if name == "BertForPreTraining":
        inputs["next_sentence_label"] = torch.randint(0, 2, (len(LENGTHS),), device=device)
    return inputs


def _number_of_labels(inputs: dict[str, Any]) -> int:
    return int((inputs["labels"] != -100).sum())


def _step(model: nn.Module, inputs: dict[str, Any], seed: int = 3, **more: Any) -> Tensor:
    """A training step's loss, and its gradients in the parameters."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.detach()


@pytest.fixture
def last_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each layer's output had, in every call."""
    rows: list[int] = []
    forward = bert.BertLayer.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        rows.append(len(out))
        return out

    monkeypatch.setattr(bert.BertLayer, "forward", spy)
    return rows


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing looks at values only because they lie on a CPU: as where torch.compile traces."""
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)


class TestSameLossAndGradients:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
    @pytest.mark.parametrize("mask", [*MASKS, "packed"])
    @pytest.mark.parametrize("name", HEADS)
    def test_under_dropout(
        self, name: str, mask: str, dtype: torch.dtype, tolerance: float, last_rows: list[int]
    ) -> None:
        subset, whole = (m.to(dtype) for m in _pair(name))
        inputs = _packed(name) if mask == "packed" else batch(name, mask_named(mask))
        loss = _step(subset, inputs)
        tokens, some = last_rows[0], last_rows[-1]
        expected = _step(whole, inputs)
        assert abs(loss - expected) <= tolerance * abs(expected)
        assert_gradients_close(subset, whole, tolerance)
        if mask == "left" and name == "BertForPreTraining":
            return  # falls back to transformers' own layers, padding and all
        firsts = 0 if name == "BertForMaskedLM" else len(LENGTHS) if mask == "packed" else BATCH
        assert some == _number_of_labels(inputs) + firsts < tokens
        assert last_rows[-1] == tokens

    @pytest.mark.parametrize("mask", MASKS)
    def test_as_transformers(self, mask: str) -> None:
        stock, fast = pair("BertForMaskedLM")
        inputs = batch("BertForMaskedLM", mask_named(mask))
        losses = [_step(no_dropout(model), inputs) for model in (stock, fast)]
        torch.testing.assert_close(*losses)
        assert_gradients_close(fast, stock)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("name", HEADS)
    def test_gradient_checkpointing(self, name: str, reentrant: bool, last_rows: list[int]) -> None:
        subset, whole = _pair(name)
        subset.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            subset.enable_input_require_grads()
        inputs = batch(name, mask_named("right"))
        torch.testing.assert_close(_step(subset, inputs), _step(whole, inputs))
        assert_gradients_close(subset, whole)
        assert min(last_rows) < max(last_rows)

    @pytest.mark.parametrize("name", HEADS)
    def test_num_items_in_batch(self, name: str) -> None:
        subset, whole = _pair(name)
        inputs = batch(name, mask_named("holes"))
        losses = [_step(m, inputs, num_items_in_batch=torch.tensor(99)) for m in (subset, whole)]
        torch.testing.assert_close(*losses)
        assert_gradients_close(subset, whole)

    @pytest.mark.parametrize("mask", ["none", "right", "packed"])
    @pytest.mark.parametrize("name", HEADS)
    def test_no_label_at_all(self, name: str, mask: str) -> None:
        subset, whole = _pair(name)
        inputs = _packed(name) if mask == "packed" else batch(name, mask_named(mask))
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
        assert torch.isnan(_step(subset, inputs))
        losses = [_step(m, inputs, num_items_in_batch=5) for m in (subset, whole)]
        torch.testing.assert_close(*losses)
        for (key, p), q in zip(subset.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-5, msg=key)

    def test_a_batch_of_padding_only(self) -> None:
        _, fast = pair("BertForPreTraining")
        inputs = batch("BertForPreTraining", torch.zeros(BATCH, LENGTH).long())
        losses = [_step(no_dropout(m), inputs, num_items_in_batch=5) for m in (fast, _without(fast))]
        torch.testing.assert_close(*losses)

    def test_as_many_rows_as_tokens(self, last_rows: list[int]) -> None:
        """Nothing to leave out, so nothing is gathered."""
        subset, whole = _pair("BertForPreTraining")
        inputs = batch("BertForPreTraining", None)
        inputs["labels"] = inputs["input_ids"].clone()
        torch.testing.assert_close(_step(subset, inputs), _step(whole, inputs))
        assert set(last_rows) == {BATCH * LENGTH}


class TestLogitsThatAreRead:
    @pytest.mark.parametrize("mask", ["none", "holes", "empty row", "packed"])
    @pytest.mark.parametrize("name", HEADS)
    def test_values_and_gradients(self, name: str, mask: str) -> None:
        """The loss' dropout, not another's."""
        models = _pair(name)
        inputs = _packed(name) if mask == "packed" else batch(name, mask_named(mask))
        logits = []
        for model in models:
            torch.manual_seed(5)
            output = model(**inputs)
            logits.append(output[HEADS[name]])
            (output.loss + logits[-1].square().mean()).backward()
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
        assert_gradients_close(*models)

    def test_under_checkpointing_and_after_the_backward(self) -> None:
        models = _pair("BertForMaskedLM")
        models[0].gradient_checkpointing_enable()
        inputs = batch("BertForMaskedLM", mask_named("right"))
        logits = []
        for model in models:
            torch.manual_seed(5)
            output = model(**inputs)
            output.loss.backward()
            with torch.no_grad():
                logits.append(output.logits)
        torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)

    def test_outside_autocast(self) -> None:
        """The last layer then still runs as it would have."""
        inputs, logits = batch("BertForMaskedLM", mask_named("right")), []
        for model in _pair("BertForMaskedLM"):
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                output = model(**inputs)
            logits.append(output.logits)
        assert torch.equal(*logits)


class TestReplacedParts:
    def test_lora_in_the_last_layer(self, last_rows: list[int]) -> None:
        peft = pytest.importorskip("peft")
        subset, _ = _pair("BertForPreTraining")
        config = peft.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False, lora_dropout=0.0)
        subset = peft.get_peft_model(subset, config)
        whole = _without(subset)
        inputs = batch("BertForPreTraining", mask_named("right"))
        torch.testing.assert_close(_step(subset, inputs), _step(whole, inputs))
        assert_gradients_close(subset, whole)
        assert last_rows[2] == last_rows[1]

    @pytest.mark.parametrize("part", ["output.dense", "attention.output.LayerNorm", "intermediate.dense"])
    def test_replaced_leaves(self, part: str, last_rows: list[int]) -> None:
        """They are called with all rows: what they are when logits are read later, nobody knows."""
        stock, fast = pair("BertForMaskedLM")
        for model in (stock, fast):
            parent, _, leaf = f"bert.encoder.layer.2.{part}".rpartition(".")
            inner = model.get_submodule(f"{parent}.{leaf}")
            setattr(model.get_submodule(parent), leaf, nn.Sequential(inner, nn.Tanh()))
        inputs = batch("BertForMaskedLM", mask_named("right"))
        losses = [_step(no_dropout(model), inputs) for model in (stock, fast)]
        torch.testing.assert_close(*losses)
        assert_gradients_close(fast, stock)
        assert last_rows[2] == last_rows[1]


class TestOff:
    @pytest.mark.parametrize(
        ("why", "change", "more"),
        [
            ("last_layer_subset=False", lambda m: fastbert.patch(m, last_layer_subset=False), {}),
            ("output_hidden_states", lambda m: setattr(m.config, "output_hidden_states", True), {}),
            (None, lambda m: None, {"output_hidden_states": []}),
            (None, lambda m: None, {"output_hidden_states": [0]}),
            (None, nn.Module.eval, {}),
        ],
        ids=["patched so", "configured states", "no states", "some states", "evaluation"],
    )
    def test_all_rows(
        self, why: str | None, change: Callable[[nn.Module], object], more: dict[str, Any], last_rows: list[int]
    ) -> None:
        stock, fast = pair("BertForPreTraining")
        inputs = batch("BertForPreTraining", None)
        for model in (no_dropout(stock), no_dropout(fast)):
            if model is fast or why != "last_layer_subset=False":
                change(model)
        losses = [_step(model, inputs, **more) for model in (stock, fast)]
        torch.testing.assert_close(*losses)
        assert_gradients_close(fast, stock)
        assert set(last_rows) == {BATCH * LENGTH}
        report = fastbert.report(fast)
        assert report.plain[f"{PART}: {why}"] == int(why is not None)
        assert report.fused[PART] == int(why is None)

    def test_a_foreign_last_layer_falls_back(self) -> None:
        class Wrapper(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return self.inner(*args, **kwargs)

        stock, fast = pair("BertForMaskedLM")
        for model in (stock, fast):
            model.bert.encoder.layer[2] = Wrapper(model.bert.encoder.layer[2])
        inputs = batch("BertForMaskedLM", None)
        losses = [_step(no_dropout(model), inputs) for model in (stock, fast)]
        torch.testing.assert_close(*losses)
        assert f"{PART}: encoder.layer.2: a Wrapper in its place" in fastbert.report(fast).plain

    def test_patching_again_changes_it(self) -> None:
        _, fast = pair("BertForMaskedLM")
        for on in (False, True):
            fastbert.patch(fast, last_layer_subset=on)
            assert (PART in fastbert.report(fast).fused) == on
        assert PART not in str(fastbert.report(pair("BertModel")[1]))


class TestMaxLabels:
    @pytest.mark.usefixtures("as_on_a_gpu")
    @pytest.mark.parametrize("surplus", [0, 3, 99])
    @pytest.mark.parametrize("mask", ["none", "packed"])
    @pytest.mark.parametrize("name", HEADS)
    def test_an_upper_bound(self, name: str, mask: str, surplus: int) -> None:
        subset, whole = _pair(name)
        inputs = _packed(name) if mask == "packed" else batch(name, None)
        expected = _step(whole, inputs)
        actual = _step(subset, inputs, max_labels=_number_of_labels(inputs) + surplus)
        torch.testing.assert_close(actual, expected)
        assert_gradients_close(subset, whole)

    @pytest.mark.usefixtures("as_on_a_gpu")
    @pytest.mark.parametrize("name", HEADS)
    def test_too_many_are_no_number(self, name: str) -> None:
        subset, _ = _pair(name)
        inputs = _packed(name)
        for bound in (0, _number_of_labels(inputs) - 1):
            assert torch.isnan(_step(subset, inputs, max_labels=bound))
            assert torch.isnan(_step(subset, inputs, max_labels=bound, num_items_in_batch=9))

    @pytest.mark.parametrize("mask", ["none", "right", "packed"])
    def test_too_many_are_named_on_a_cpu(self, mask: str) -> None:
        subset, whole = _pair("BertForMaskedLM")
        inputs = _packed("BertForMaskedLM") if mask == "packed" else batch("BertForMaskedLM", mask_named(mask))
        count = _number_of_labels(inputs)
        for bound in (count, count + 1):
            torch.testing.assert_close(_step(subset, inputs, max_labels=bound), _step(whole, inputs))
        with pytest.raises(ValueError, match=f"max_labels is {count - 1}, but there are {count} labels"):
            subset(**inputs, max_labels=count - 1)
        subset.eval()(**inputs, max_labels=0)  # only training goes by it

    def test_compiles_to_one_graph(self) -> None:
        """Without a pooler: test_left_to_right.py."""
        subset, whole = _pair("BertForPreTraining", 0.0, num_hidden_layers=2)
        inputs = _packed("BertForPreTraining")
        expected = _step(whole, inputs)
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(subset, backend=backend)
        loss = compiled(**inputs, max_labels=20).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        assert_gradients_close(subset, whole)
        assert backend.frame_count == 1


def _label_rows(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["labels"].flatten() != -100).nonzero().squeeze(-1)


class TestLabelRows:
    """Of a packed batch: which tokens have a label."""

    @pytest.mark.parametrize("name", HEADS)
    def test_the_same_step(self, name: str) -> None:
        subset, whole = _pair(name)
        inputs = _packed(name)
        expected = _step(whole, inputs)
        actual = _step(subset, inputs, label_rows=_label_rows(inputs))
        torch.testing.assert_close(actual, expected)
        assert_gradients_close(subset, whole)

    @pytest.mark.parametrize("name", HEADS)
    def test_bad_rows(self, name: str) -> None:
        model, inputs = _pair(name)[0].train(), _packed(name)
        rows = _label_rows(inputs)
        for bad in (rows[:-1], rows.flip(0), rows + 1):
            with pytest.raises(ValueError, match="label_rows are not"):
                model(**inputs, label_rows=bad)
        for bad in (rows.int(), rows[None]):
            with pytest.raises(ValueError, match="label_rows must be"):
                model(**inputs, label_rows=bad)
        with pytest.raises(ValueError, match="label_rows go with a packed batch"):
            model(**batch(name, None), label_rows=rows)

    def test_next_sentences_count_by_their_own_number(self) -> None:
        model, inputs = _pair("BertForPreTraining", 0.0)[0].train(), _packed("BertForPreTraining")
        alone = model(**inputs).loss
        labels, sequences = _number_of_labels(inputs), len(inputs["next_sentence_label"])
        both = {"num_items_in_batch": 3 * labels, "num_sequences_in_batch": 2 * sequences}
        of_many = model(**inputs, **both).loss
        same = {"num_items_in_batch": labels, "num_sequences_in_batch": sequences}
        torch.testing.assert_close(model(**inputs, **same).loss, alone)
        without = model(**inputs, **{**both, "num_sequences_in_batch": 10**9}).loss
        next_sentence = 2 * (of_many - without)
        torch.testing.assert_close(3 * without + next_sentence, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", HEADS)
class TestSynchronisations:
    """On tensors without values, of which every read raises; on a GPU it would wait."""

    def _model(self, name: str) -> nn.Module:
        return getattr(fastbert, name)(tiny_config()).train()

    def test_of_a_packed_batch_none(self, name: str) -> None:
        with FakeTensorMode():
            model, inputs = self._model(name), _packed(name)
            model(**inputs, max_labels=12).loss.backward()
            model(**inputs, max_labels=12, num_items_in_batch=9).loss.backward()
            model(**inputs, label_rows=torch.arange(12), num_items_in_batch=9).loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            with pytest.raises(DataDependentOutputException):
                model(**inputs)  # the bound is what it takes

    def test_of_a_padded_batch_as_many_as_without_labels(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """One for the tokens and labels that there are, one that checks the ids."""
        answers: list[list[int]] = []
        monkeypatch.setattr(FakeTensor, "tolist", lambda _: answers.pop(0))
        with FakeTensorMode():
            model, inputs = self._model(name), batch(name, torch.ones(BATCH, LENGTH).long())
            answers += [[40, LENGTH, 9, 0, 0], [1, 99, 0, 1, 0, 16, 0, 0]]
            model(**inputs).loss.backward()
            answers += [[40, LENGTH, 0], [1, 99, 0, 1, 0, 16, 0, 0]]
            model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
            assert not answers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", HEADS)
def test_a_packed_training_step_waits_for_nothing(name: str) -> None:
    subset, whole = (m.cuda() for m in _pair(name))
    inputs = _packed(name, "cuda")
    for model in (whole, subset):  # the second time with kernels that are compiled
        _step(model, inputs)
    count, rows = _number_of_labels(inputs), _label_rows(inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(subset, inputs, max_labels=count + 2)
        _step(subset, inputs, label_rows=rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_gradients_close(subset, whole)


@pytest.mark.kernel
@pytest.mark.parametrize("name", HEADS)
def test_on_the_kernels(name: str, device: str) -> None:
    """A training step with dropout, through the operators as they are served here; and twice the same bits."""
    subset, whole = (m.to(device) for m in _pair(name, num_hidden_layers=2, num_attention_heads=2))
    inputs = _packed(name, device)
    torch.testing.assert_close(_step(subset, inputs), _step(whole, inputs))
    assert_gradients_close(subset, whole)
    gradients = [p.grad.clone() for p in subset.parameters()]
    _step(subset, inputs)
    for p, before in zip(subset.parameters(), gradients, strict=True):
        assert torch.equal(p.grad, before)


def test_hooks_that_transformers_left_behind_do_not_count() -> None:
    """Its own forward leaves some on all layers, where it has returned hidden states or attentions."""
    _, fast = pair("BertForMaskedLM", tiny_config())
    inputs = batch("BertForMaskedLM", mask_named("right"))
    fast(**inputs, output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in fast.bert.encoder.layer)
    assert fastbert.report(fast.train()).fused[PART] == 1
