"""fastbert's eight classes against transformers' own: values, gradients, outputs, every row of the contract."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert import reference_encoder
from tests.models import (
    BATCH,
    HEADS,
    LENGTH,
    MASKS,
    assert_gradients_close,
    assert_outputs_equal,
    batch,
    mask_named,
    minilm,
    no_dropout,
    pair,
    shared,
    tiny_config,
)

TOKEN_HEADS = ("BertForPreTraining", "BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", HEADS)
def test_values_equal_transformers(name: str, mask: str) -> None:
    stock, fast = pair(name)
    inputs = batch(name, mask_named(mask))
    with torch.no_grad():
        expected, actual = stock(**inputs), fast(**inputs)
    assert_outputs_equal(actual, expected, inputs.get("attention_mask"))
    pools = name in ("BertModel", "BertForPreTraining", "BertForNextSentencePrediction")
    pools |= name in ("BertForSequenceClassification", "BertForMultipleChoice")
    fell_back = {"left": pools, "holes": False}.get(mask, False)
    assert (fastbert.report(fast).fallbacks.total() == 1) == fell_back


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        (name, mask)
        for name in HEADS[1:]
        for mask in ("none", "right", "holes")
        if name != "BertForQuestionAnswering" or mask == "none"  # test_question_answering_... has the others
    ],
)
def test_losses_and_gradients_equal_transformers(name: str, mask: str) -> None:
    stock, fast = pair(name)
    inputs = batch(name, mask_named(mask))
    if name == "BertForQuestionAnswering":
        inputs |= {"start_positions": torch.zeros(BATCH).long(), "end_positions": torch.tensor([1, 99, 16, 3, 0])}
    for model in (stock, fast):
        no_dropout(model)(**inputs).loss.backward()
    assert_gradients_close(fast, stock)
    assert abs(fast(**inputs).loss - stock(**inputs).loss) <= 1e-5


@pytest.mark.parametrize("mask", ["none", "right", "left", "holes", "empty row"])
def test_base_model_gradients(mask: str) -> None:
    stock, fast = (m.double() for m in pair("BertModel"))
    inputs = batch("BertModel", mask_named(mask))
    weights = torch.randn(BATCH, LENGTH, 48, dtype=torch.float64)
    if mask != "none":
        weights *= inputs["attention_mask"][..., None]
    for model in (stock, fast):
        (model(**inputs).last_hidden_state * weights).sum().backward()
    assert_gradients_close(fast, stock, 1e-12)


def test_question_answering_leaves_padding_out_of_the_softmax() -> None:
    stock, fast = pair("BertForQuestionAnswering", tiny_config(num_labels=2))
    inputs = batch("BertForQuestionAnswering", mask_named("right"))
    answers = {"start_positions": torch.tensor([3, 2, 0, 5, 8]), "end_positions": torch.tensor([4, 4, 0, 99, 8])}
    expected = 0.0
    for row in range(BATCH):  # one sequence at a time, transformers has no padding either
        n = int(inputs["attention_mask"][row].sum())
        one = {key: t[row : row + 1, :n] for key, t in inputs.items()}
        logits = stock(**one)
        for scores, position in (
            (logits.start_logits, answers["start_positions"]),
            (logits.end_logits, answers["end_positions"]),
        ):
            counted = 4 if position is answers["end_positions"] else 5  # 99 lies outside and is left out
            if position[row] < LENGTH:
                expected += nn.functional.cross_entropy(scores, position[row : row + 1]) / counted / 2
    actual = fast(**inputs, **answers)
    assert abs(actual.loss - expected) <= 1e-5
    assert (actual.start_logits[inputs["attention_mask"] == 0] == -1000).all()


def test_an_answer_on_padding_falls_back() -> None:
    stock, fast = pair("BertForQuestionAnswering", tiny_config(num_labels=2))
    inputs = batch("BertForQuestionAnswering", mask_named("right"))
    inputs |= {"start_positions": torch.full((BATCH,), 12), "end_positions": torch.full((BATCH,), 12)}
    assert abs(fast(**inputs).loss - stock(**inputs).loss) <= 1e-6
    assert fastbert.report(fast).fallbacks == {"labels on padding": 1}


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForTokenClassification"])
def test_labels_on_padding_fall_back(name: str) -> None:
    stock, fast = pair(name)
    inputs = batch(name, mask_named("right"))
    inputs["labels"] = inputs["input_ids"] % 3
    assert abs(fast(**inputs).loss - stock(**inputs).loss) <= 1e-6
    assert fastbert.report(fast).fallbacks == {"labels on padding": 1}


def test_padded_rows_are_zeros() -> None:
    _, fast = pair("BertModel")
    mask = mask_named("holes")
    output = fast(**batch("BertModel", mask), output_hidden_states=True)
    for hidden in (output.last_hidden_state, *output.hidden_states):
        assert (hidden[mask == 0] == 0).all()
        assert (hidden[mask == 1] != 0).any(-1).all()


def test_positions_and_embeddings_given_by_the_user() -> None:
    stock, fast = pair("BertModel")
    mask = mask_named("holes")
    inputs = batch("BertModel", mask)
    inputs["position_ids"] = torch.arange(LENGTH).flip(0)[None] + 30
    assert_outputs_equal(fast(**inputs), stock(**inputs), mask)
    vectors = torch.randn(BATCH, LENGTH, 48)
    del inputs["input_ids"]
    leaves = [vectors.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((stock, fast), leaves, strict=True):
        (model(inputs_embeds=leaf, **inputs).last_hidden_state * mask[..., None]).square().sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, atol=1e-4, rtol=1e-4)


class TestPackedInput:
    LENGTHS = (4, 1, 9, 3)

    def _inputs(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The same sequences packed and padded."""
        rows, L = len(self.LENGTHS), max(self.LENGTHS)
        mask = torch.arange(L)[None] < torch.tensor(self.LENGTHS)[:, None]
        padded = torch.randint(1, 100, (rows, L)) * mask
        cu_seqlens = torch.tensor([0, *torch.tensor(self.LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        packed = {"input_ids": padded[mask][None], "cu_seq_lens_q": cu_seqlens, "max_length_q": L}
        return packed, {"input_ids": padded, "attention_mask": mask.long()}

    def test_equals_padded_input(self) -> None:
        _, fast = pair("BertModel")
        packed, padded = self._inputs()
        actual, expected = fast(**packed), fast(**padded)
        assert actual.last_hidden_state.shape == (1, sum(self.LENGTHS), 48)
        torch.testing.assert_close(
            actual.last_hidden_state[0], expected.last_hidden_state[padded["attention_mask"].bool()]
        )
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output)

    @pytest.mark.parametrize("name", [h for h in HEADS[1:] if h != "BertForMultipleChoice"])
    def test_losses_and_gradients_equal_padded_input(self, name: str) -> None:
        _, fast = pair(name, tiny_config(num_labels=2))
        other = copy.deepcopy(fast)
        packed, padded = self._inputs()
        mask, rows = padded["attention_mask"].bool(), len(self.LENGTHS)
        if name == "BertForQuestionAnswering":
            answers = {"start_positions": torch.tensor([3, 0, 2, 1]), "end_positions": torch.tensor([3, 0, 8, 2])}
            packed |= answers
            padded |= answers
        elif name in TOKEN_HEADS:
            labels = torch.where(mask, padded["input_ids"] % 2, -100)
            packed["labels"], padded["labels"] = labels[mask][None], labels
            if name == "BertForPreTraining":
                packed["next_sentence_label"] = padded["next_sentence_label"] = torch.randint(0, 2, (rows,))
        else:
            packed["labels"] = padded["labels"] = torch.randint(0, 2, (rows,))
        losses = [no_dropout(m)(**inputs).loss for m, inputs in ((fast, packed), (other, padded))]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        assert_gradients_close(fast, other)

    def test_no_packed_batch_falls_back(self) -> None:
        _, fast = pair("BertModel")
        packed, _ = self._inputs()
        with pytest.raises(ValueError, match=r"cu_seq_lens_q.*output_attentions"):
            fast(**packed, output_attentions=True)


class TestOutputs:
    def test_tuple_and_dict(self) -> None:
        _, fast = pair("BertModel")
        inputs = batch("BertModel", mask_named("right"))
        as_dict, as_tuple = fast(**inputs), fast(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple, as_dict.to_tuple())

    @pytest.mark.parametrize("selection", [True, [0, -1], 2, [1], []], ids=str)
    def test_hidden_states(self, selection: object) -> None:
        stock, fast = pair("BertModel")
        mask = mask_named("right")
        inputs = batch("BertModel", mask)
        expected = stock(**inputs, output_hidden_states=True).hidden_states
        actual = fast(**inputs, output_hidden_states=selection).hidden_states
        wanted = range(4) if selection is True else [selection] if isinstance(selection, int) else selection
        wanted = {i % 4 for i in wanted}
        for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
            assert (a is not None) == (i in wanted)
            if a is not None:
                assert (a - e)[mask.bool()].abs().max() <= 1e-5

    @pytest.mark.parametrize("mask", ["none", "right"])
    def test_hidden_states_have_gradients(self, mask: str) -> None:
        stock, fast = pair("BertModel")
        inputs = batch("BertModel", mask_named(mask))
        gradients = []
        for model in (stock, fast):
            output = model(**inputs, output_hidden_states=True)
            for hidden in output.hidden_states:
                hidden.retain_grad()
            output.pooler_output.square().sum().backward()
            gradients.append([hidden.grad for hidden in output.hidden_states])
        for e, a in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)

    def test_attentions_fall_back(self) -> None:
        stock, fast = pair("BertModel", tiny_config(attn_implementation="eager"))
        inputs = batch("BertModel", mask_named("right"))
        expected, actual = (m(**inputs, output_attentions=True).attentions for m in (stock, fast))
        assert len(actual) == 3
        torch.testing.assert_close(actual, expected)
        assert fastbert.report(fast).fallbacks == {"output_attentions": 1}

    def test_4d_mask_falls_back(self) -> None:
        stock, fast = pair("BertModel")
        inputs = batch("BertModel", None)
        inputs["attention_mask"] = torch.ones(BATCH, 1, LENGTH, LENGTH).tril().bool()
        torch.testing.assert_close(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
        assert fastbert.report(fast).packed_calls == 0

    def test_a_decoder_falls_back(self) -> None:
        stock, fast = pair("BertModel", tiny_config(is_decoder=True, add_cross_attention=True))
        inputs = batch("BertModel", None) | {"encoder_hidden_states": torch.randn(BATCH, 4, 48), "use_cache": True}
        actual, expected = fast(**inputs), stock(**inputs)
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
        assert actual.past_key_values is not None
        assert "decoder" in str(fastbert.report(fast))

    def test_strict_raises_instead(self) -> None:
        stock, _ = pair("BertModel")
        fast = fastbert.patch(stock, strict=True)
        with pytest.raises(fastbert.FellBack, match="output_attentions"):
            fast(**batch("BertModel", None), output_attentions=True)
        fast(**batch("BertModel", None))


def test_a_shortened_encoder() -> None:
    stock, fast = pair("BertModel")
    for model in (stock, fast):
        model.encoder.layer = model.encoder.layer[:2]
    inputs = batch("BertModel", None)
    expected, actual = (m(**inputs, output_hidden_states=True) for m in (stock, fast))
    assert len(actual.hidden_states) == 3
    assert_outputs_equal(actual, expected, None)


@pytest.mark.parametrize("name", [h for h in HEADS[1:] if h != "BertForQuestionAnswering"])
def test_losses_honour_num_items_in_batch(name: str) -> None:
    """Shares of unequal batches add up to the mean over all of their labels."""
    _, fast = pair(name)
    batches = [batch(name, mask_named("none")), batch(name, mask_named("right"))]
    counts = [(b["labels"] != -100).sum() for b in batches]
    means = [fast(**b).loss for b in batches]
    shares = [fast(**b, num_items_in_batch=sum(counts)).loss for b in batches]
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(sum(shares), expected)


class TestAutocast:
    @pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining", "BertForTokenClassification"])
    def test_dtypes_and_values_equal_transformers(self, name: str) -> None:
        stock, fast = pair(name)
        mask = mask_named("right")
        inputs = batch(name, mask)
        with torch.autocast("cpu", torch.bfloat16):
            expected, actual = (m(**inputs, output_hidden_states=True) for m in (stock, fast))
        exact = stock(**inputs, output_hidden_states=True)
        for key in expected:
            pairs = zip(
                *(out[key] if isinstance(out[key], tuple) else [out[key]] for out in (actual, expected, exact)),
                strict=True,
            )
            for a, e, x in pairs:
                assert a.dtype == e.dtype, key
                keep = mask.bool() if a.shape[:2] == mask.shape else ...
                error, allowed = (a - x)[keep].abs().max(), (e - x)[keep].abs().max()
                assert error <= 2 * allowed + 2**-8 * x[keep].abs().max(), key

    def test_gradients(self) -> None:
        stock, fast = pair("BertForMaskedLM")
        inputs = batch("BertForMaskedLM", mask_named("right"))
        for model in (stock, fast):
            with torch.autocast("cpu", torch.bfloat16):
                loss = no_dropout(model)(**inputs).loss
            loss.backward()
        assert_gradients_close(fast, stock, 0.03)
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in fast.parameters())

    def test_residual_dtype(self) -> None:
        stock, _ = pair("BertModel")
        inputs = batch("BertModel", mask_named("right"))
        expected = stock(**inputs).last_hidden_state
        fast = fastbert.patch(stock, residual_dtype="bf16")
        with torch.autocast("cpu", torch.bfloat16):
            actual = fast(**inputs).last_hidden_state
        assert actual.dtype == torch.bfloat16
        keep = inputs["attention_mask"].bool()
        assert (actual - expected)[keep].abs().max() < 0.1
        assert fast(**inputs).last_hidden_state.dtype == torch.float32  # without autocast it changes nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    stock, fast = pair("BertModel")
    mask = mask_named("right")
    inputs = batch("BertModel", mask)
    exact = copy.deepcopy(stock).double()(**inputs).last_hidden_state[mask.bool()]
    naive, actual = (m.to(dtype)(**inputs).last_hidden_state[mask.bool()] for m in (stock, fast))
    assert actual.dtype == dtype
    allowed = 2 * (naive - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (actual - exact).abs().max() <= allowed


class TestDropout:
    def _train(self) -> nn.Module:
        return fastbert.BertForMaskedLM(tiny_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)).train()

    def test_seeds(self) -> None:
        model, inputs = self._train(), batch("BertForMaskedLM", mask_named("right"))
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(**inputs).loss.item())
        assert losses[0] == losses[1] != losses[2]
        assert model.eval()(**inputs).loss == model(**inputs).loss

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_replays_under_gradient_checkpointing(self, reentrant: bool) -> None:
        model, inputs = self._train(), batch("BertForMaskedLM", mask_named("right"))
        other = copy.deepcopy(model)
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            other.enable_input_require_grads()
        for m in (model, other):
            torch.manual_seed(3)
            m(**inputs).loss.backward()
        assert_gradients_close(other, model, 1e-7)

    def test_the_whole_encoder_equals_the_reference_under_the_same_masks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        config = tiny_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3)
        model = fastbert.BertModel(config, add_pooling_layer=False).double().train()
        inputs = batch("BertModel", mask_named("right"))
        seed = torch.tensor(-987654321)
        monkeypatch.setattr("fastbert.functional.draw_seed", lambda device: seed)
        actual = model(**inputs, output_hidden_states=True).hidden_states
        keep = inputs["attention_mask"].bool()
        seqlens = keep.sum(-1)
        expected = reference_encoder.encoder(
            dict(model.named_parameters()),
            inputs["input_ids"][keep],
            inputs["token_type_ids"][keep],
            torch.arange(LENGTH).expand(BATCH, LENGTH)[keep],
            torch.cat([torch.zeros(1), seqlens.cumsum(0)]).int(),
            num_heads=4,
            eps=config.layer_norm_eps,
            hidden_dropout_p=0.2,
            attention_dropout_p=0.3,
            seed=seed,
        )
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a[keep], e, atol=1e-12, rtol=1e-12)


class TestStateAndCopies:
    @pytest.mark.parametrize("name", HEADS)
    def test_state_dict_and_reload_in_transformers(self, name: str, tmp_path: object) -> None:
        stock, fast = pair(name)
        assert list(fast.state_dict()) == list(stock.state_dict())
        fast.save_pretrained(tmp_path)
        reloaded = getattr(transformers, name).from_pretrained(tmp_path)
        again = getattr(fastbert, name).from_pretrained(tmp_path)
        for key, value in fast.state_dict().items():
            assert torch.equal(reloaded.state_dict()[key], value)
            assert torch.equal(again.state_dict()[key], value)
        assert type(reloaded).__module__.startswith("transformers.")
        assert reloaded.config.architectures == [name]
        if "MaskedLM" in name:
            assert again.cls.predictions.decoder.weight is again.bert.embeddings.word_embeddings.weight

    def test_legacy_names_load(self, tmp_path: object) -> None:
        stock, _ = pair("BertModel")
        stock.save_pretrained(tmp_path)
        state = {
            f"bert.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for key, t in stock.state_dict().items()
        }
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        fast = fastbert.BertModel.from_pretrained(tmp_path).eval()
        inputs = batch("BertModel", None)
        torch.testing.assert_close(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)

    def test_deepcopy_and_pickle(self) -> None:
        _, fast = pair("BertForMaskedLM")
        inputs = batch("BertForMaskedLM", mask_named("right"))
        buffer = io.BytesIO()
        torch.save(fast, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)):
            assert type(other) is type(fast)
            assert torch.equal(other(**inputs).logits, fast(**inputs).logits)
            assert other.bert.embeddings.word_embeddings.weight is other.cls.predictions.decoder.weight

    def test_resized_embeddings(self) -> None:
        stock, fast = pair("BertForMaskedLM")
        inputs = batch("BertForMaskedLM", None)
        for model in (stock, fast):
            model.resize_token_embeddings(120, mean_resizing=False)
        fast.load_state_dict(stock.state_dict())
        inputs["input_ids"][0, 0] = 119
        torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "gelu_fast"])
def test_activations(activation: str) -> None:
    stock, fast = pair("BertForMaskedLM", tiny_config(hidden_act=activation))
    inputs = batch("BertForMaskedLM", None)
    torch.testing.assert_close(fast(**inputs).logits, stock(**inputs).logits, atol=1e-5, rtol=1e-5)
    fused = "linear + bias + GELU" in fastbert.report(fast).fused
    assert fused == (activation in ("gelu", "gelu_new", "gelu_pytorch_tanh"))


@pytest.mark.parametrize("mask", ["none", "right"])
def test_compile(mask: str) -> None:
    stock, fast = pair("BertForMaskedLM", tiny_config(num_hidden_layers=2))
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=mask == "none")
    inputs = batch("BertForMaskedLM", mask_named(mask))
    with torch.no_grad():
        expected = stock(**inputs)
        actual = compiled(**inputs)
    keep = ... if mask == "none" else inputs["attention_mask"].bool()
    torch.testing.assert_close(actual.logits[keep], expected.logits[keep], atol=1e-5, rtol=1e-5)
    compiled = torch.compile(no_dropout(fast), backend="aot_eager")
    for model in (no_dropout(stock), compiled):
        model(**inputs).loss.backward()
    assert_gradients_close(fast, stock)


def test_export_gives_transformers_own_program() -> None:
    _, fast = pair("BertModel")
    inputs = batch("BertModel", mask_named("right"))
    expected = fast(**inputs).last_hidden_state
    program = torch.export.export(fast, (), inputs)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(program.module()(**inputs).last_hidden_state[keep], expected[keep], atol=1e-5, rtol=1e-5)
    assert not any("fastbert" in str(node.target) for node in program.graph.nodes)


class TestRealCheckpoints:
    def test_minilm_gives_the_published_values(self) -> None:
        path = minilm()
        model = fastbert.BertModel.from_pretrained(path).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(path)(
            "The quick brown fox jumps over the lazy dog.", return_tensors="pt"
        )
        actual = model(**tokens).last_hidden_state[0, 0, :3]
        torch.testing.assert_close(actual, torch.tensor([0.046444, 0.338061, 0.208205]), atol=2e-6, rtol=0)

    def test_pretraining_heads(self) -> None:
        path = shared("checkpoints/bert-pretraining-rxnfp")
        stock = transformers.BertForPreTraining.from_pretrained(path).eval()
        fast = fastbert.BertForPreTraining.from_pretrained(path).eval()
        mask = (torch.arange(40)[None] < torch.tensor([40, 11, 1])[:, None]).long()
        ids = torch.randint(5, 500, (3, 40)) * mask
        expected, actual = (m(ids, attention_mask=mask, output_hidden_states=True) for m in (stock, fast))
        torch.testing.assert_close(
            actual.seq_relationship_logits, expected.seq_relationship_logits, atol=1e-5, rtol=1e-5
        )
        keep = mask.bool()
        torch.testing.assert_close(
            actual.prediction_logits[keep], expected.prediction_logits[keep], atol=1e-5, rtol=1e-5
        )
        for a, e in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert (a - e)[keep].abs().max() <= 1e-5
