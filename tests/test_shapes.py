"""Shapes, sizes and classes that transformers takes: broadcast inputs, wide heads, wide layers, subclasses."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

import fastbert
from tests.models import (
    BATCH,
    LENGTH,
    assert_gradients_close,
    assert_outputs_equal,
    batch,
    no_dropout,
    pair,
    tiny_config,
)

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
IDS = torch.randint(1, 99, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
TYPES = (torch.arange(LENGTH) > 6).long()
ZEROS = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
MASK = torch.tensor([[1] * 9 + [0] * (LENGTH - 9)] * BATCH)
BROADCAST: dict[str, dict[str, Tensor]] = {
    "position_ids (L,)": {"position_ids": torch.arange(LENGTH).flip(0), "token_type_ids": ZEROS},
    "position_ids (1, L)": {"position_ids": torch.arange(LENGTH).flip(0)[None]},
    "position_ids (B, 1)": {"position_ids": torch.arange(BATCH)[:, None], "token_type_ids": ZEROS},
    "position_ids (1, 1)": {"position_ids": torch.tensor([[3]]), "token_type_ids": ZEROS},
    "position_ids (1,)": {"position_ids": torch.tensor([3]), "token_type_ids": ZEROS},
    "token_type_ids (L,)": {"token_type_ids": TYPES},
    "token_type_ids (1, L)": {"token_type_ids": TYPES[None]},
    "token_type_ids (B, 1)": {"token_type_ids": torch.tensor([[0], [1], [1], [0], [1]])},
    "token_type_ids (1,)": {"token_type_ids": torch.tensor([1])},
    "int32": {"position_ids": torch.arange(LENGTH, dtype=torch.int32)[None], "token_type_ids": TYPES[None].int()},
}


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
@pytest.mark.parametrize("given", BROADCAST)
def test_what_is_broadcast(given: str, name: str) -> None:
    stock, fast = (no_dropout(m) for m in pair(name))
    expected, actual = (model(input_ids=IDS, **BROADCAST[given])[0] for model in (stock, fast))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for output in (expected, actual):
        output.square().sum().backward()
    assert_gradients_close(fast, stock)
    assert fastbert.report(fast).fallbacks.total() == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("ones", [9, LENGTH])
def test_one_mask_for_all_rows(ones: int, dtype: torch.dtype) -> None:
    """transformers takes it where it is all ones."""
    stock, fast = pair("BertModel")
    mask = (torch.arange(LENGTH) < ones)[None].to(dtype)
    expected = stock(input_ids=IDS, attention_mask=mask.expand(BATCH, -1)).last_hidden_state
    actual = fast(input_ids=IDS, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(actual[:, :ones], expected[:, :ones], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(-1,), (BATCH, LENGTH, 1), (BATCH * LENGTH, 1), (1, -1), (LENGTH, BATCH)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForTokenClassification"])
def test_labels_of_any_shape(name: str, training: bool, shape: tuple[int, ...]) -> None:
    """transformers flattens them."""
    stock, fast = pair(name)
    inputs = batch(name, None)
    inputs["labels"] = inputs["labels"].reshape(shape)
    for model in (stock, fast):
        no_dropout(model).train(training)(**inputs).loss.backward()
    assert_gradients_close(fast, stock)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "attention_mask", "labels"])
@pytest.mark.parametrize("shape", [(BATCH, LENGTH - 1), (2, LENGTH), (BATCH, LENGTH, 2), (0,)])
def test_other_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    _, fast = pair("BertForMaskedLM")
    with pytest.raises(ValueError, match=rf"{name} (is \(|must be 2-D)"):
        fast(input_ids=IDS, **{name: torch.zeros(shape, dtype=torch.int64)})


def test_an_empty_batch_is_an_error_of_both_kinds() -> None:
    """transformers' is a RuntimeError."""
    _, fast = pair("BertModel")
    for shape in ((0, 5), (2, 0)):
        for kind in (ValueError, RuntimeError):
            with pytest.raises(kind, match="input_ids is empty"):
                fast(input_ids=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"hidden_size": 320, "num_attention_heads": 1}, "a head of 320 features, more than 256"),
        ({"hidden_size": 8320, "num_attention_heads": 65, "num_hidden_layers": 0}, "8320 features, more than 8192"),
    ],
    ids=["a wide head", "a wide layer"],
)
@pytest.mark.parametrize("training", [False, True])
def test_what_kernels_cannot_do_falls_back(sizes: dict[str, int], reason: str, training: bool) -> None:
    config = tiny_config(**{"num_hidden_layers": 1, "intermediate_size": 16, "max_position_embeddings": 32, **sizes})
    stock, fast = pair("BertForTokenClassification", config)
    inputs = batch("BertForTokenClassification", None)
    expected, actual = (no_dropout(m).train(training)(**inputs) for m in (stock, fast))
    torch.testing.assert_close(actual.loss, expected.loss)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    (found,) = fastbert.report(fast).fallbacks
    assert reason in found
    assert reason in str(fastbert.report(fast))
    with pytest.raises(fastbert.FellBack, match=reason):
        fastbert.patch(fast, strict=True)(**inputs)


class Mine(transformers.BertForMaskedLM):
    """Another __init__ and another method: the forward is the parent's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Linear(2, 2)

    def words(self) -> int:
        return self.config.vocab_size


class MyModel(transformers.BertModel):
    pass


class WithForward(transformers.BertForMaskedLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output


class WithMasks(transformers.BertModel):
    def _create_attention_masks(self, *args: Any, **kwargs: Any) -> Any:
        return super()._create_attention_masks(*args, **kwargs)


class Backwards(RobertaEmbeddings):
    @staticmethod
    def create_position_ids_from_input_ids(input_ids: Tensor, padding_idx: int, *args: Any) -> Tensor:
        return RobertaEmbeddings.create_position_ids_from_input_ids(input_ids.flip(-1), padding_idx).flip(-1)


class TestSubclasses:
    @pytest.mark.parametrize("kind", [Mine, MyModel])
    def test_patched_where_the_forward_is_the_parents(self, kind: type, tmp_path: Any) -> None:
        stock = kind(tiny_config()).eval()
        fast = fastbert.patch(copy.deepcopy(stock))
        assert isinstance(fast, kind)
        assert type(fast).__name__ == kind.__name__
        inputs = {"input_ids": IDS, "attention_mask": MASK}
        keep = inputs["attention_mask"].bool()
        expected = stock(**inputs)[0][keep]
        assert kind is MyModel or fast.words() == 100
        copies = [fast, copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
        for model in copies:
            torch.testing.assert_close(model(**inputs)[0][keep], expected, atol=1e-5, rtol=1e-5)
            assert fastbert.report(model).packed_calls >= 1
            assert fastbert.report(model).fallbacks.total() == 0
        fast.save_pretrained(tmp_path)
        reloaded = kind.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(reloaded(**inputs)[0], stock(**inputs)[0])
        assert reloaded.config.architectures == [kind.__name__]
        assert type(fastbert.unpatch(fast)) is kind
        assert torch.equal(fast(**inputs)[0][keep], expected)

    @pytest.mark.parametrize(("kind", "method"), [(WithForward, "forward"), (WithMasks, "_create_attention_masks")])
    def test_refused_in_words_that_help(self, kind: type, method: str) -> None:
        model = kind(tiny_config(num_hidden_layers=1))
        if kind is WithForward:
            del model.bert
        with pytest.raises(
            ValueError, match=rf"{kind.__name__} cannot be patched: {kind.__name__} has its own {method}"
        ):
            fastbert.patch(model)

    def test_positions_of_ones_own(self) -> None:
        stock = transformers.RobertaModel(transformers.RobertaConfig(**SIZES)).eval()
        stock.embeddings = Backwards(stock.config).eval()
        fast = fastbert.patch(copy.deepcopy(stock))
        torch.testing.assert_close(fast(IDS)[0], stock(IDS)[0], atol=1e-5, rtol=1e-5)

    def test_one_in_a_head(self) -> None:
        stock, _ = pair("BertForMaskedLM")
        stock.bert = MyModel(stock.config, add_pooling_layer=False).eval()
        fast = fastbert.patch(copy.deepcopy(stock))
        torch.testing.assert_close(fast(IDS).logits, stock(IDS).logits, atol=1e-5, rtol=1e-5)
        assert fastbert.report(fast).packed_calls == 1
        assert type(fastbert.unpatch(fast).bert) is MyModel

    def test_a_known_model_inside_of_an_unknown_one(self) -> None:
        """Its own forward gets from the parent's what it would get from transformers'."""
        stock = WithForward(tiny_config()).eval()
        fast = fastbert.patch(copy.deepcopy(stock))
        torch.testing.assert_close(fast(IDS).logits, stock(IDS).logits, atol=1e-5, rtol=1e-5)
        assert fastbert.report(fast).packed_calls == 1

    @pytest.mark.parametrize("parent", [fastbert.BertForMaskedLM, fastbert.BertModel])
    def test_of_fastberts_own_classes(self, parent: Callable[..., Any]) -> None:
        class Ours(parent):  # type: ignore[misc,valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs)[0] * 2

        stock, _ = pair(parent.__name__)
        ours = Ours(stock.config).eval()
        ours.load_state_dict(stock.state_dict())
        torch.testing.assert_close(ours(IDS), 2 * stock(IDS)[0], atol=1e-5, rtol=1e-5)
        assert fastbert.report(ours).packed_calls == 1
        torch.testing.assert_close(fastbert.unpatch(ours)(IDS), 2 * stock(IDS)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_odd_sizes(name: str) -> None:
    """As of SpanBERT, MiniLM, LaBSE and others that are BERT by another name: no size is taken for granted."""
    sizes = {"hidden_size": 40, "num_attention_heads": 5, "intermediate_size": 72, "vocab_size": 101}
    stock, fast = (
        no_dropout(m) for m in pair(name, tiny_config(**sizes, type_vocab_size=1, max_position_embeddings=19))
    )
    fastbert.patch(fast, strict=True)
    inputs = batch(name, MASK) | {"token_type_ids": ZEROS}
    expected, actual = (model(**inputs) for model in (stock, fast))
    assert_outputs_equal(actual, expected, MASK)
    for output in (expected, actual):
        (output.loss if "loss" in output else output.pooler_output.square().sum()).backward()
    assert_gradients_close(fast, stock)
