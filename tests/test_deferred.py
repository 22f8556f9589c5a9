"""Logits of a training step: whoever reads them, however and whenever, gets those of the forward pass."""

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastbert
from tests.models import BATCH, LENGTH, assert_gradients_close, batch, mask_named, no_dropout, pair, tiny_config
from tests.optional import needs

LM = {"BertForMaskedLM": "logits", "BertForPreTraining": "prediction_logits", "BertLMHeadModel": "logits"}
READINGS: dict[str, Callable[[Any, str], Any]] = {
    "attribute": getattr,
    "getattr with a default": lambda out, key: getattr(out, key, None),
    "key": lambda out, key: out[key],
    "get": lambda out, key: out.get(key),
    "index": lambda out, key: out[1],
    "negative index": lambda out, key: out[1 - len(out)],
    "slice": lambda out, key: out[:2][1],
    "to_tuple": lambda out, key: out.to_tuple()[1],
    "items": lambda out, key: dict(out.items())[key],
    "values": lambda out, key: list(out.values())[1],
    "dict": lambda out, key: dict(out)[key],
    "**": lambda out, key: dict(**out)[key],
    "|": lambda out, key: (out | {})[key],
    "unpacked": lambda out, key: [out[name] for name in out][1],
    "copy": lambda out, key: copy.copy(out)[key],
    "rebuilt": lambda out, key: type(out)(dict(out.items()))[key],
    "pickle": lambda out, key: pickle.loads(pickle.dumps(out))[key],
    "pytree": lambda out, key: pytree.tree_leaves(out)[1],
    "tree_map": lambda out, key: pytree.tree_map(lambda t: t, out)[key],
    "as DataParallel gathers": lambda out, key: type(out)((name, out[name]) for name in out)[key],
}


def _inputs(name: str, mask: Tensor | None) -> dict[str, Tensor]:
    inputs = batch("BertForMaskedLM" if name == "BertLMHeadModel" else name, mask)
    if name == "BertLMHeadModel":
        inputs["shift_labels"] = inputs.pop("labels")
    return inputs


def _pair(name: str, **changes: Any) -> tuple[Any, Any]:
    return pair(name, tiny_config(is_decoder=name == "BertLMHeadModel", **changes))


@pytest.mark.parametrize("way", READINGS)
@pytest.mark.parametrize("name", LM)
def test_every_way_of_reading_gives_a_tensor(name: str, way: str) -> None:
    stock, fast = _pair(name)
    mask = mask_named("right")
    inputs = _inputs(name, mask)
    expected = no_dropout(stock)(**{k: v for k, v in inputs.items() if k != "shift_labels"})[LM[name]]
    with torch.no_grad():
        logits = READINGS[way](no_dropout(fast)(**inputs), LM[name])
    assert type(logits) is Tensor
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_only_labelled_rows_are_projected(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = pair("BertForMaskedLM")
    inputs = batch("BertForMaskedLM", mask_named("right"))
    rows = []
    transform = type(fast.cls.predictions.transform)
    forward = transform.forward
    monkeypatch.setattr(transform, "forward", lambda self, x, **how: rows.append(x.shape) or forward(self, x, **how))
    output = no_dropout(fast)(**inputs)
    output.loss.backward()
    assert rows == [(int((inputs["labels"] != -100).sum()), 48)]
    assert output.logits.shape == (BATCH, LENGTH, 100)
    assert len(rows) == 2


def test_gradients_flow_through_logits_that_are_read() -> None:
    stock, fast = pair("BertForMaskedLM")
    inputs = batch("BertForMaskedLM", None)
    for model in (stock, fast):
        output = no_dropout(model)(**inputs)
        (output.loss + output.logits.square().mean()).backward()
    assert_gradients_close(fast, stock)


def test_no_label_at_all() -> None:
    stock, fast = pair("BertForMaskedLM")
    inputs = batch("BertForMaskedLM", None)
    inputs["labels"].fill_(-100)
    assert torch.isnan(stock(**inputs).loss)
    assert torch.isnan(no_dropout(fast)(**inputs).loss)
    loss = no_dropout(fast)(**inputs, num_items_in_batch=5).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in fast.parameters())


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_tuple_has_them(name: str) -> None:
    _, fast = pair(name)
    assert no_dropout(fast)(**batch(name, mask_named("right")), return_dict=False)[1].shape == (BATCH, LENGTH, 100)


def test_reading_the_loss_reads_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = _pair("BertForMaskedLM")
    output = fast.train()(**batch("BertForMaskedLM", None))
    monkeypatch.setattr(fast.cls.predictions, "forward", pytest.fail)
    assert output.loss is output["loss"] is output[0] is output.get("loss")
    assert "logits" in output
    assert list(output) == ["loss", "logits"]


@pytest.mark.parametrize("where", ["torch.nn.parallel.distributed", "torch.distributed.fsdp._fully_shard._fsdp_state"])
def test_walks_through_every_output_compute_nothing(where: str) -> None:
    """Those of DDP and of FSDP, in every step; what they build can still be read."""
    _, fast = _pair("BertForMaskedLM")
    walker = types.FunctionType(
        (
            lambda out: (type(out)({k: v for k, v in out.items()}), __import__("torch").utils._pytree.tree_leaves(out))
        ).__code__,
        {"__name__": where, "__builtins__": __builtins__},
    )
    rebuilt, leaves = walker(fast.train()(**batch("BertForMaskedLM", None)))
    assert type(leaves[1]).__name__ == "Deferred"
    assert type(rebuilt.logits) is Tensor


@needs("accelerate")
def test_in_mixed_precision_they_are_read_in_float32() -> None:
    import accelerate

    _, fast = _pair("BertForMaskedLM")
    convert = accelerate.utils.convert_outputs_to_fp32(fast.train().forward)
    calls = []
    fast.cls.predictions.register_forward_hook(_ours(lambda *_: calls.append(1)))
    with torch.autocast("cpu", torch.bfloat16):
        output = convert(**batch("BertForMaskedLM", None))
    assert len(calls) == 1  # the labelled rows
    assert output.logits.dtype == torch.float32
    assert len(calls) == 2
    gathered = accelerate.utils.operations.recursively_apply(lambda t: t + 1, fast(**batch("BertForMaskedLM", None)))
    assert type(gathered["logits"]) is Tensor


def _ours(hook: Callable[..., Any]) -> Callable[..., Any]:
    hook.__module__ = "fastbert.tests"
    return hook


class TestThoseOfTheForward:
    @pytest.fixture(params=[False, True], ids=["the last layer for all", "the last layer for some"])
    def fast(self, request: pytest.FixtureRequest) -> Any:
        _, fast = _pair("BertForMaskedLM", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3)
        return fastbert.patch(fast, last_layer_subset=request.param).train()

    def _read(self, fast: Any, before: Callable[[Any, Any], None]) -> tuple[Tensor, Tensor]:
        """At once, and after something has happened."""
        inputs, logits = batch("BertForMaskedLM", mask_named("right")), []
        for happen in (lambda *_: None, before):
            model = copy.deepcopy(fast)
            torch.manual_seed(3)
            output = model(**inputs)
            happen(model, output)
            logits.append(output.logits.detach())
        return logits[0], logits[1]

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda p: torch.optim.SGD(p, lr=1.0),
            lambda p: torch.optim.SGD(p, lr=1.0, foreach=True),
            lambda p: torch.optim.AdamW(p, lr=1.0),
            lambda p: torch.optim.AdamW(p, lr=1.0, fused=True),
            lambda p: torch.optim.Adam(p, lr=1.0, foreach=True, weight_decay=0.1),
        ],
    )
    def test_after_an_optimiser_step(self, fast: Any, optimizer: Callable[..., Any]) -> None:
        def step(model: Any, output: Any) -> None:
            output.loss.backward()
            optimizer(model.parameters()).step()

        at_once, later = self._read(fast, step)
        assert torch.equal(at_once, later)

    def test_after_two_steps(self, fast: Any) -> None:
        def steps(model: Any, output: Any) -> None:
            output.loss.backward()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            optimizer.step()
            optimizer.step()

        assert torch.equal(*self._read(fast, steps))

    def test_outputs_of_several_steps_of_an_optimiser_that_writes_past_pytorch(self, fast: Any) -> None:
        """What one output keeps is not what the next one needs, though no weight has another version."""

        class Past(torch.optim.Optimizer):
            def step(self, closure: Any = None) -> None:
                for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                    p.data.add_(p.grad, alpha=-1.0)

        inputs, optimizer, expected, outputs = batch("BertForMaskedLM", None), Past(fast.parameters(), {}), [], []
        for _ in range(3):
            other = copy.deepcopy(fast)
            for model, to in ((other, expected), (fast, outputs)):
                torch.manual_seed(3)
                to.append(model(**inputs))
            expected[-1] = expected[-1].logits.detach()
            outputs[-1].loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not torch.equal(expected[0], expected[2])
        for output, logits in zip(outputs, expected, strict=True):
            assert torch.equal(output.logits.detach(), logits)

    def test_the_new_weights_stay(self, fast: Any) -> None:
        output = fast(**batch("BertForMaskedLM", None))
        output.loss.backward()
        torch.optim.SGD(fast.parameters(), lr=0.1).step()
        after = [p.clone() for p in fast.parameters()]
        assert output.logits.shape[-1] == 100
        assert all(type(p) is nn.Parameter and torch.equal(p, q) for p, q in zip(fast.parameters(), after, strict=True))
        assert fast.cls.predictions.decoder.weight is fast.bert.embeddings.word_embeddings.weight

    def test_a_step_of_another_model_changes_nothing(self, fast: Any) -> None:
        other = nn.Linear(2, 2)
        other(torch.ones(2)).sum().backward()
        output = fast(**batch("BertForMaskedLM", None))
        torch.optim.SGD(other.parameters(), lr=0.1).step()
        (output.loss + output.logits.sum()).backward()
        assert fast.cls.predictions.bias.grad.abs().min() > 1

    def test_after_eval(self, fast: Any) -> None:
        at_once, later = self._read(fast, lambda model, _: model.eval())
        assert torch.equal(at_once, later)

    def test_modes_stay_as_they_are(self, fast: Any) -> None:
        output = fast(**batch("BertForMaskedLM", None))
        fast.eval()
        assert output.logits.requires_grad
        assert not any(m.training for m in fast.modules())

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_under_another_autocast(self, fast: Any, dtype: torch.dtype | None) -> None:
        inputs, logits = batch("BertForMaskedLM", None), []
        for read_in in (dtype, torch.float16 if dtype is None else None):
            torch.manual_seed(3)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                output = fast(**inputs)
            with torch.autocast("cpu", read_in or torch.bfloat16, enabled=read_in is not None):
                logits.append(output.logits)
        assert logits[0].dtype == logits[1].dtype == (dtype or torch.float32)
        assert torch.equal(*logits)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_read_without_gradients_and_then_in_a_loss(self, mode: Callable[[], Any]) -> None:
        stock, fast = _pair("BertForMaskedLM")
        inputs = batch("BertForMaskedLM", None)
        for model in (stock, fast):
            output = no_dropout(model)(**inputs)
            with mode():
                assert output.logits.argmax(-1).shape == inputs["input_ids"].shape
            (output.loss + output.logits.square().mean()).backward()
        assert_gradients_close(fast, stock)

    def test_a_forward_without_gradients(self, fast: Any) -> None:
        with torch.no_grad():
            output = fast(**batch("BertForMaskedLM", None))
        assert not output.logits.requires_grad

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.cls.predictions.decoder.weight.add_(1.0),
            lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
            lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True),
            lambda m: setattr(m.cls.predictions.transform.dense, "weight", nn.Parameter(torch.zeros(48, 48))),
        ],
        ids=["in place", "loaded", "loaded, assigned", "replaced"],
    )
    def test_weights_that_somebody_changed(self, fast: Any, change: Callable[[Any], Any]) -> None:
        output = fast(**batch("BertForMaskedLM", None))
        with torch.no_grad():
            change(fast)
        with pytest.raises(RuntimeError, match=r"Read them before, or .*lazy_logits=False"):
            output.logits  # noqa: B018


@pytest.mark.parametrize("name", LM)
def test_all_at_once(name: str) -> None:
    stock, fast = _pair(name)
    fastbert.patch(fast, lazy_logits=False)
    inputs = _inputs(name, mask_named("right"))
    output = no_dropout(fast)(**inputs)
    assert all(type(value) is Tensor for value in output.__dict__.values() if value is not None)
    assert not type(output).__module__.startswith("fastbert")
    expected = no_dropout(stock)(**{k: v for k, v in inputs.items() if k != "shift_labels"})[LM[name]]
    torch.testing.assert_close(
        output[LM[name]][inputs["attention_mask"].bool()], expected[inputs["attention_mask"].bool()]
    )


def test_nothing_is_kept_once_an_output_is_gone() -> None:
    from fastbert.families import _deferred

    _, fast = _pair("BertForMaskedLM")
    fast.train()(**batch("BertForMaskedLM", None)).loss.backward()
    assert not list(_deferred._UNREAD)
