"""A causal encoder and BertLMHeadModel's loss, for left-to-right pretraining, against transformers' own."""

import copy
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig

import fastbert
from fastbert.families import bert
from tests.models import BATCH, LENGTH, MASKS, assert_gradients_close, batch, mask_named, no_dropout, pair, tiny_config
from tests.optional import given, settings, st

LENGTHS = (4, 1, 17, 3, 9)
MASK_4D = torch.ones(BATCH, 1, LENGTH, LENGTH).tril().bool()


def _config(**changes: object) -> BertConfig:
    return tiny_config(**{"is_decoder": True, "pad_token_id": 0, **changes})


def _pair(name: str = "BertLMHeadModel", **changes: object) -> tuple[nn.Module, nn.Module]:
    return pair(name, _config(**changes))


def _next_tokens(input_ids: Tensor, keep: Tensor) -> Tensor:
    """Labels that are shifted already, by hand: the next token where both are no padding."""
    labels = torch.full_like(input_ids, -100)
    for row in range(input_ids.shape[0]):
        for i in range(input_ids.shape[1] - 1):
            if keep[row, i] and keep[row, i + 1]:
                labels[row, i] = input_ids[row, i + 1]
    return labels


def _batch(mask: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, and shift_labels."""
    inputs = batch("BertModel", mask_named(mask))
    keep = inputs.get("attention_mask", torch.ones(BATCH, LENGTH))
    return inputs, _next_tokens(inputs["input_ids"], keep)


def _packed_and_padded(device: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    """The same sequences, with shift_labels."""
    L = max(LENGTHS)
    mask = torch.arange(L)[None] < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 100, mask.shape) * mask
    labels = _next_tokens(ids, mask)
    packed = {
        "input_ids": ids[mask][None].to(device),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32, device=device),
        "max_length_q": L,
        "shift_labels": labels[mask][None].to(device),
    }
    padded = {"input_ids": ids, "attention_mask": mask.long(), "shift_labels": labels}
    return packed, {key: t.to(device) for key, t in padded.items()}


def _label_rows(inputs: dict[str, Any]) -> Tensor:
    return (inputs["shift_labels"].flatten() != -100).nonzero().squeeze(-1)


def _step(model: nn.Module, inputs: dict[str, Any], **more: Any) -> Tensor:
    """A training step's loss, and its gradients in the parameters."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**inputs, **more).loss
    loss.backward()
    return loss.detach()


def _only_packed(model: nn.Module, calls: int = 1) -> None:
    report = fastbert.report(model)
    assert (report.packed_calls, report.fallbacks.total()) == (calls, 0), str(report)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["BertModel", "BertLMHeadModel"])
def test_values_equal_transformers(name: str, mask: str) -> None:
    stock, fast = _pair(name)
    inputs = batch("BertModel", mask_named(mask))
    with torch.no_grad():
        expected, actual = (m(**inputs, use_cache=False) for m in (stock, fast))
    assert list(actual.keys()) == list(expected.keys())
    keep = inputs.get("attention_mask", torch.ones(BATCH, LENGTH)).bool()
    assert (actual[0] - expected[0])[keep].abs().max() <= 1e-5
    if name == "BertModel" and mask == "left":
        assert list(fastbert.report(fast).fallbacks) == ["the pooler reads each row's first token, and one is padding"]
    else:
        _only_packed(fast)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_a_base_model_equal_transformers(mask: str) -> None:
    stock, fast = (library.BertModel(_config(), add_pooling_layer=False) for library in (transformers, fastbert))
    fast.load_state_dict(stock.state_dict())
    inputs = batch("BertModel", mask_named(mask))
    weights = torch.randn(BATCH, LENGTH, 48) * inputs.get("attention_mask", torch.ones(BATCH, LENGTH))[..., None]
    for model in (stock, fast):
        (no_dropout(model)(**inputs).last_hidden_state * weights).sum().backward()
    assert_gradients_close(fast, stock)
    _only_packed(fast)


class TestLoss:
    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("mask", ["none", "full", "right"])
    def test_labels_are_shifted_as_by_transformers(self, mask: str, training: bool) -> None:
        stock, fast = _pair()
        inputs, _ = _batch(mask)
        labels = inputs["input_ids"].masked_fill(inputs.get("attention_mask", torch.ones(BATCH, LENGTH)) == 0, -100)
        losses = [_step(no_dropout(m).train(training), inputs, labels=labels) for m in (stock, fast)]
        assert abs(losses[0] - losses[1]) <= 1e-5
        assert_gradients_close(fast, stock)
        _only_packed(fast)

    @pytest.mark.parametrize("num_items", [None, 7, torch.tensor(123)], ids=str)
    @pytest.mark.parametrize("mask", MASKS)
    def test_shift_labels(self, mask: str, num_items: Tensor | int | None) -> None:
        stock, fast = _pair()
        inputs, shift_labels = _batch(mask)
        more = {} if num_items is None else {"num_items_in_batch": num_items}
        # transformers' forward wants labels too, and goes by the others
        expected = _step(no_dropout(stock), inputs, labels=shift_labels, shift_labels=shift_labels, **more)
        actual = _step(no_dropout(fast), inputs, shift_labels=shift_labels, **more)
        assert abs(actual - expected) <= 1e-5
        assert_gradients_close(fast, stock)
        both = _step(fast, inputs, labels=inputs["input_ids"], shift_labels=shift_labels, **more)
        assert torch.equal(both, actual)
        _only_packed(fast, 2)

    @pytest.mark.parametrize("mask", ["left", "holes"])
    def test_a_label_of_padding_falls_back(self, mask: str) -> None:
        """Shifted, a token behind padding is the label of padding, and transformers counts it."""
        stock, fast = _pair()
        inputs, _ = _batch(mask)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        losses = [_step(no_dropout(m), inputs, labels=labels) for m in (stock, fast)]
        torch.testing.assert_close(*losses)
        assert fastbert.report(fast).fallbacks == {"labels on padding": 1}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("training", [False, True])
    def test_its_dtype_is_transformers(self, training: bool, dtype: torch.dtype) -> None:
        inputs, shift_labels = _batch("right")
        for model in _pair():
            model.to(dtype).train(training)
            assert model(**inputs, labels=shift_labels).loss.dtype == torch.float32

    def test_wrong_labels_are_named(self) -> None:
        _, fast = _pair()
        inputs, labels = _batch("none")
        for more in ({"labels": labels[:, 1:]}, {"shift_labels": labels[1:]}):
            with pytest.raises(ValueError, match="labels is"):
                fast(**inputs, **more)


class TestPacked:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.1])
    @pytest.mark.parametrize("labels", ["labels", "shift_labels"])
    def test_losses_and_gradients_equal_padded_input(self, labels: str, dropout_p: float) -> None:
        _, fast = _pair(hidden_dropout_prob=dropout_p, attention_probs_dropout_prob=dropout_p)
        other = copy.deepcopy(fast)
        packed, padded = _packed_and_padded()
        if labels == "labels":
            packed["labels"] = packed["input_ids"]
            padded["labels"] = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
            del packed["shift_labels"], padded["shift_labels"]
        losses = [_step(m.train(), inputs) for m, inputs in ((fast, packed), (other, padded))]
        torch.testing.assert_close(*losses)
        assert_gradients_close(fast, other)
        _only_packed(fast)

    def test_values_equal_transformers_one_sequence_at_a_time(self) -> None:
        stock, fast = _pair()
        packed, _ = _packed_and_padded()
        with torch.no_grad():
            actual = fast(**packed)  # use_cache is not asked for, so there is none
            bounds = packed["cu_seq_lens_q"].tolist()
            for start, end in pairwise(bounds):
                expected = stock(packed["input_ids"][:, start:end]).logits
                assert (actual.logits[:, start:end] - expected).abs().max() <= 1e-5
        assert actual.past_key_values is None
        _only_packed(fast)

    def test_empty_sequences(self) -> None:
        _, fast = _pair()
        ids = torch.randint(1, 100, (1, 7))
        losses = []
        for bounds in ([0, 3, 7], [0, 0, 3, 3, 7, 7]):
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
            losses.append(_step(no_dropout(fast), {"input_ids": ids, "labels": ids}, cu_seq_lens_q=cu_seqlens))
        torch.testing.assert_close(*losses)

    def test_a_cache_is_refused(self) -> None:
        _, fast = _pair()
        packed, _ = _packed_and_padded()
        del packed["shift_labels"]
        with pytest.raises(ValueError, match=r"packed batch.*returns a cache"):
            fast(**packed, use_cache=True)


class TestRowsThatAreRead:
    """label_rows and max_labels, of shift_labels."""

    @pytest.fixture
    def as_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing looks at values only because they lie on a CPU."""
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)

    def test_the_same_step(self) -> None:
        _, subset = _pair()
        whole = fastbert.patch(copy.deepcopy(subset), last_layer_subset=False)
        packed, _ = _packed_and_padded()
        rows = _label_rows(packed)
        expected = _step(whole.train(), packed)
        for more in (
            {},
            {"label_rows": rows},
            {"max_labels": len(rows)},
            {"label_rows": rows, "max_labels": len(rows)},
        ):
            torch.testing.assert_close(_step(subset.train(), packed, **more), expected)
            assert_gradients_close(subset, whole)

    def test_labels_too(self) -> None:
        _, fast = _pair()
        packed, _ = _packed_and_padded()
        rows = _label_rows(packed)
        expected = _step(no_dropout(fast), packed, label_rows=rows)
        del packed["shift_labels"]
        actual = _step(fast, packed, labels=packed["input_ids"], label_rows=rows)
        assert torch.equal(actual, expected)

    def test_bad_rows(self) -> None:
        _, fast = _pair()
        packed, _ = _packed_and_padded()
        rows = _label_rows(packed)
        with pytest.raises(ValueError, match="label_rows are not"):
            fast.train()(**packed, label_rows=rows + 1)
        with pytest.raises(ValueError, match=f"max_labels is 3, but there are {len(rows)} labels"):
            fast.train()(**packed, max_labels=3)

    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_a_bound_and_too_many(self) -> None:
        _, fast = _pair()
        packed, _ = _packed_and_padded()
        count = len(_label_rows(packed))
        expected = _step(fast.train(), packed)
        torch.testing.assert_close(_step(fast, packed, max_labels=count + 3), expected)
        assert torch.isnan(_step(fast, packed, max_labels=count - 1))

    def test_the_last_layer_runs_for_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rows: list[int] = []
        forward = bert.BertLayer.forward

        def spy(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            rows.append(len(out))
            return out

        monkeypatch.setattr(bert.BertLayer, "forward", spy)
        _, fast = _pair()
        packed, _ = _packed_and_padded()
        _step(fast.train(), packed)
        assert rows == [sum(LENGTHS), sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)]

    @pytest.mark.usefixtures("as_on_a_gpu")
    def test_nothing_waits(self) -> None:
        """On tensors without values, of which every read raises; on a GPU it would wait."""
        with FakeTensorMode():
            model = fastbert.BertLMHeadModel(_config()).train()
            T = sum(LENGTHS)
            inputs = {
                "input_ids": torch.ones(1, T).long(),
                "cu_seq_lens_q": torch.zeros(6, dtype=torch.int32),
                "max_length_q": max(LENGTHS),
            }
            labels = torch.ones(1, T).long()
            model(**inputs, labels=labels, max_labels=12).loss.backward()
            model(**inputs, shift_labels=labels, label_rows=torch.arange(12), num_items_in_batch=9).loss.backward()
            assert all(p.grad is not None for p in model.parameters())

    def test_compiles_to_one_graph(self) -> None:
        _, fast = _pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=2)
        other = copy.deepcopy(fast)
        packed, _ = _packed_and_padded()
        expected = _step(other.train(), packed)
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        loss = torch.compile(fast.train(), backend=backend)(**packed, max_labels=40).loss
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected)
        assert_gradients_close(fast, other)
        assert backend.frame_count == 1


class TestLogits:
    def test_deferred_in_training(self) -> None:
        stock, fast = _pair()
        inputs, shift_labels = _batch("right")
        keep = inputs["attention_mask"].bool()
        expected = no_dropout(stock)(**inputs).logits
        output = no_dropout(fast)(**inputs, shift_labels=shift_labels)
        assert "logits" in output
        for logits in (output.logits, output["logits"], output[1], output.to_tuple()[1]):
            assert (logits - expected)[keep].abs().max() <= 1e-5
            assert (logits[~keep] == 0).all()

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize(
        "keep",
        [0, 3, torch.tensor([2, 0]), torch.tensor([[1, 2]] * BATCH), torch.rand(BATCH, LENGTH) < 0.5],
        ids=["all", "3", "two", "two of each", "a mask"],
    )
    def test_to_keep(self, keep: Tensor | int, training: bool) -> None:
        stock, fast = _pair()
        inputs, shift_labels = _batch("none")
        expected = stock(**inputs, logits_to_keep=keep, use_cache=False).logits
        for labels in (None, shift_labels):
            actual = (
                no_dropout(fast)
                .train(training)(**inputs, logits_to_keep=keep, shift_labels=labels, use_cache=False)
                .logits
            )
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() <= 1e-5
        if not isinstance(keep, int):
            return
        fell_back = fast.eval()(**inputs, logits_to_keep=keep, use_cache=True)
        assert (fell_back.logits - expected).abs().max() <= 1e-5

    @pytest.mark.parametrize("selection", [True, [0, -1]], ids=str)
    def test_hidden_states(self, selection: object) -> None:
        stock, fast = _pair()
        inputs, shift_labels = _batch("right")
        expected = no_dropout(stock)(**inputs, output_hidden_states=True).hidden_states
        actual = no_dropout(fast)(**inputs, shift_labels=shift_labels, output_hidden_states=selection).hidden_states
        for i in (0, -1):
            assert (actual[i] - expected[i])[inputs["attention_mask"].bool()].abs().max() <= 1e-5


class TestWayOfACall:
    """Which calls run packed, and which transformers serves."""

    @pytest.mark.parametrize("name", ["BertModel", "BertLMHeadModel"])
    @pytest.mark.parametrize("use_cache", [None, True, False])
    def test_training_has_no_cache(self, name: str, use_cache: bool | None) -> None:
        _, fast = _pair(name)
        assert fast.train()(**batch("BertModel", None), use_cache=use_cache).past_key_values is None
        _only_packed(fast)

    @pytest.mark.parametrize("name", ["BertModel", "BertLMHeadModel"])
    @pytest.mark.parametrize("use_cache", [None, True])
    def test_evaluation_with_a_cache(self, name: str, use_cache: bool | None) -> None:
        stock, fast = _pair(name)
        inputs = batch("BertModel", None)
        expected, actual = (m(**inputs, use_cache=use_cache) for m in (stock, fast))
        torch.testing.assert_close(actual[0], expected[0])
        assert actual.past_key_values.get_seq_length() == LENGTH
        assert fastbert.report(fast).fallbacks == {"a decoder that returns a cache": 1}

    def test_evaluation_with_labels_has_no_cache(self) -> None:
        stock, fast = _pair()
        inputs, _ = _batch("none")
        expected, actual = (m(**inputs, labels=inputs["input_ids"]) for m in (stock, fast))
        assert list(actual.keys()) == list(expected.keys())
        assert abs(actual.loss - expected.loss) <= 1e-5
        _only_packed(fast)

    @pytest.mark.parametrize("training", [False, True])
    def test_a_cache_that_is_read(self, training: bool) -> None:
        stock, fast = _pair()
        inputs = batch("BertModel", None)["input_ids"]
        outputs = []
        for model in (stock, fast):
            past = model.eval()(inputs[:, :9]).past_key_values
            outputs.append(no_dropout(model).train(training)(inputs[:, 9:], past_key_values=past).logits)
        torch.testing.assert_close(*outputs)
        assert fastbert.report(fast).fallbacks["cross-attention or a cache"] == 1

    @pytest.mark.parametrize("training", [False, True])
    def test_cross_attention(self, training: bool) -> None:
        stock, fast = _pair(add_cross_attention=True)
        inputs = batch("BertModel", None) | {"encoder_hidden_states": torch.randn(BATCH, 4, 48)}
        labels = inputs["input_ids"]
        losses = [no_dropout(m).train(training)(**inputs, labels=labels).loss for m in (stock, fast)]
        torch.testing.assert_close(*losses)
        assert fastbert.report(fast).fallbacks == {"a decoder with cross-attention": 1}
        assert "decoder with cross-attention" in str(fastbert.report(fast))

    def test_a_4d_mask(self) -> None:
        stock, fast = _pair()
        inputs = batch("BertModel", None) | {"attention_mask": MASK_4D, "use_cache": False}
        torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits)
        assert list(fastbert.report(fast).fallbacks) == ["an attention_mask that is not 2-D"]

    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_generation(self, use_cache: bool, beams: int) -> None:
        stock, fast = _pair()
        inputs = batch("BertModel", mask_named("left"))
        tokens = [
            m.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=use_cache)
            for m in (stock, fast)
        ]
        assert torch.equal(*tokens)
        assert (fastbert.report(fast).fallbacks.total() > 0) == use_cache

    @pytest.mark.parametrize("is_causal", [None, False, True])
    @pytest.mark.parametrize("is_decoder", [False, True])
    def test_another_mask_than_the_configuration_says(self, is_decoder: bool, is_causal: bool | None) -> None:
        stock, fast = _pair(is_decoder=is_decoder)
        inputs = batch("BertModel", None)
        expected, actual = (m(**inputs, is_causal=is_causal, use_cache=False).logits for m in (stock, fast))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        same = is_causal in (None, is_decoder)
        assert fastbert.report(fast).fallbacks == ({} if same else {"is_causal": 1})

    @pytest.mark.parametrize("is_decoder", [False, True])
    def test_a_configuration_that_changed(self, is_decoder: bool) -> None:
        stock, fast = _pair(is_decoder=not is_decoder)
        inputs = batch("BertModel", None)
        for model in (stock, fast):
            model.config.is_decoder = is_decoder
        torch.testing.assert_close(fast(**inputs, use_cache=False).logits, stock(**inputs, use_cache=False).logits)
        assert fastbert.report(fast).fallbacks.total() == 1

    def test_no_decoder(self) -> None:
        """Then it sees both sides, as in transformers."""
        stock, fast = _pair(is_decoder=False)
        inputs, _ = _batch("right")
        assert (fast(**inputs).logits - stock(**inputs).logits)[inputs["attention_mask"].bool()].abs().max() <= 1e-5
        _only_packed(fast)


class TestAroundIt:
    def test_patched(self) -> None:
        stock, _ = _pair()
        inputs, shift_labels = _batch("right")
        patched = fastbert.patch(copy.deepcopy(stock), strict=True)
        assert type(patched) is fastbert.BertLMHeadModel
        assert patched.train()(**inputs, shift_labels=shift_labels).loss.isfinite()
        assert type(fastbert.unpatch(patched)) is type(stock)

    def test_saved_and_loaded(self, tmp_path: Any) -> None:
        stock, fast = _pair()
        fast.save_pretrained(tmp_path)
        for library in (transformers, fastbert):
            again = library.BertLMHeadModel.from_pretrained(tmp_path)
            assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight
            for (key, a), b in zip(again.state_dict().items(), stock.state_dict().values(), strict=True):
                assert torch.equal(a, b), key

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant: bool) -> None:
        _, fast = _pair()
        other = copy.deepcopy(fast).train()
        fast.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            fast.enable_input_require_grads()
        packed, _ = _packed_and_padded()
        torch.testing.assert_close(_step(fast, packed), _step(other, packed))
        assert_gradients_close(fast, other)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
@settings(max_examples=25, deadline=None)
def test_what_is_to_the_right_changes_nothing(seqlens: list[int], data: st.DataObject) -> None:
    """Of a packed batch, whatever its lengths: no bit of what stands left of a token that changes."""
    torch.manual_seed(0)
    model = fastbert.BertLMHeadModel(_config()).eval()
    T = sum(seqlens)
    ids = torch.randint(1, 100, (1, T))
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    seq = data.draw(st.integers(0, len(seqlens) - 1))
    place = int(cu_seqlens[seq]) + data.draw(st.integers(0, seqlens[seq] - 1))
    changed = ids.clone()
    changed[0, place] = ids[0, place] % 99 + 1
    with torch.no_grad():
        before, after = (
            model(i, cu_seq_lens_q=cu_seqlens, max_length_q=max(seqlens)).logits[0] for i in (ids, changed)
        )
    differs = (before - after).abs().amax(-1) > 1e-6
    own = torch.zeros(T, dtype=torch.bool)
    own[place : int(cu_seqlens[seq + 1])] = True
    assert torch.equal(differs, differs & own)
    assert differs[place]


@pytest.mark.kernel
def test_on_the_kernels(device: str) -> None:
    """A training step with dropout, packed and padded, through the operators as they are served here."""
    _, fast = _pair(num_hidden_layers=2, num_attention_heads=2)
    fast, other = fast.train().to(device), copy.deepcopy(fast).train().to(device)
    packed, padded = _packed_and_padded(device)
    torch.testing.assert_close(_step(fast, packed, label_rows=_label_rows(packed)), _step(other, padded))
    assert_gradients_close(fast, other)


@pytest.mark.kernel
def test_equals_transformers_on_the_kernels(device: str) -> None:
    stock, fast = (no_dropout(m.to(device)) for m in _pair(num_hidden_layers=2, num_attention_heads=2))
    _, padded = _packed_and_padded(device)
    labels = padded.pop("shift_labels")
    losses = [_step(m, padded, labels=labels, shift_labels=labels) for m in (stock, fast)]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
    assert_gradients_close(fast, stock)
