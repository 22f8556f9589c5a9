"""patch, unpatch and report: models of transformers, PEFT, sentence-transformers, with parts that others replaced."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.kernels import _launch, _product
from tests.models import HEADS, assert_gradients_close, batch, mask_named, minilm, no_dropout, pair, tiny_config
from tests.optional import needs


def _classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def test_patch_and_unpatch_swap_classes_and_nothing_else() -> None:
    stock, fast = pair("BertForSequenceClassification")
    before, state = _classes(stock), {key: t.data_ptr() for key, t in stock.state_dict().items()}
    inputs = batch("BertForSequenceClassification", mask_named("right"))
    expected = stock(**inputs)
    assert fastbert.patch(stock) is stock
    assert _classes(stock) == _classes(fast)
    assert {key: t.data_ptr() for key, t in stock.state_dict().items()} == state
    assert [c.__name__ for c in _classes(stock)] == [c.__name__ for c in before]
    torch.testing.assert_close(stock(**inputs).logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert fastbert.report(stock).packed_calls == 1
    assert fastbert.unpatch(stock) is stock
    assert _classes(stock) == before
    assert torch.equal(stock(**inputs).logits, expected.logits)


def test_patching_twice_is_patching_once() -> None:
    stock, _ = pair("BertModel")
    fastbert.patch(fastbert.patch(stock), strict=True)
    with pytest.raises(fastbert.FellBack):
        stock(**batch("BertModel", None), output_attentions=True)


def test_options_belong_to_one_model() -> None:
    first, second = fastbert.patch(pair("BertModel")[0], strict=True), fastbert.patch(pair("BertModel")[0])
    second(**batch("BertModel", None), output_attentions=True)
    assert fastbert.report(first).fallbacks.total() == 0
    other = copy.deepcopy(second)
    other(**batch("BertModel", None))
    assert fastbert.report(second).packed_calls == 0


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("training", [False, True])
def test_a_gpu_that_is_too_old_gets_transformers_own_path(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operator of fastbert's runs; the report says why; strict raises."""
    reason = "a GPU of compute capability 7.5: the kernels need 8.0"
    monkeypatch.setattr(_launch, "why_not", lambda device: reason)
    stock, fast = pair(name)
    no_dropout(stock.train(training)), no_dropout(fast.train(training))
    inputs = batch(name, mask_named("right"))
    with _Operators() as operators:
        actual = fast(**inputs)
    assert operators.names
    assert not [name for name in operators.names if name.startswith("fastbert")]
    expected = stock(**inputs)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
    report = fastbert.report(fast)
    assert report.packed_calls == 0
    assert set(report.fallbacks) == {reason}
    assert reason in str(report).partition("calls:")[0]
    with pytest.raises(fastbert.FellBack, match=r"compute capability 7\.5"):
        fastbert.patch(fast, strict=True)(**inputs)


class _Operators(TorchDispatchMode):
    """Which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capability", "tensor_cores"),
    [
        ((8, 0), "mma"),
        ((8, 9), "mma"),
        ((9, 0), "wgmma"),
        ((10, 3), "tcgen05"),
        ((11, 0), "tcgen05"),
        ((12, 0), "mma"),
        ((12, 1), "mma"),
        ((13, 0), "mma"),
    ],
)
def test_a_chip_is_known_by_what_it_has(capability: tuple[int, int], tensor_cores: str) -> None:
    assert _launch.Chip(capability, 1).tensor_cores == tensor_cores


def test_an_operator_on_a_gpu_that_is_too_old_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_cuda_chip", lambda index: _launch.Chip((7, 5), 40))
    assert _launch.why_not(torch.device("cpu")) is None
    with pytest.raises(RuntimeError, match=r"no kernels for a GPU of compute capability 7\.5: the kernels need 8\.0"):
        _launch.chip(torch.device("cuda", 0))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential()], ids=["linear", "empty"])
def test_nothing_to_patch(model: nn.Module) -> None:
    for verb in (fastbert.patch, fastbert.report):
        with pytest.raises(ValueError, match=r"is no model that fastbert knows\. .*: albert, bert, .*, xlm-roberta"):
            verb(model)
    with pytest.raises(ValueError, match="is not patched"):
        fastbert.unpatch(model)


def test_an_unknown_model_type_is_named() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10)
    model = transformers.GPT2Model(config)
    for root, name in ((model, "GPT2Model"), (nn.Sequential(model), "Sequential with GPT2Model")):
        with pytest.raises(ValueError, match=rf"^{name} is no model that fastbert knows"):
            fastbert.patch(root)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (
            "no/model",
            r"the name 'no/model': fastbert\.{verb}\(transformers\.AutoModel\.from_pretrained\('no/model'\)\)$",
        ),
        (Path("no/model"), "the name 'no/model': "),
        (transformers.BertModel, "the class BertModel: make a model of it first"),
        (SimpleNamespace(model=nn.Linear(2, 2)), "something of type SimpleNamespace: give it its .model$"),
        (None, "something of type NoneType$"),
    ],
)
def test_what_is_no_model(thing: Any, message: str) -> None:
    for verb in (fastbert.patch, fastbert.unpatch, fastbert.report):
        with pytest.raises(TypeError, match=message.replace("{verb}", verb.__name__)):
            verb(thing)


def test_bad_option() -> None:
    with pytest.raises(ValueError, match=r"residual_dtype must be .* but is 'int8'"):
        fastbert.patch(pair("BertModel")[0], residual_dtype="int8")


def test_report_says_what_is_fused_and_why_not() -> None:
    stock, _ = pair("BertForMaskedLM", tiny_config(hidden_act="relu"))
    fastbert.patch(stock)
    report = fastbert.report(stock)
    assert report.fused["packed attention"] == 3
    assert report.fused["bias + dropout + residual + LayerNorm"] == 6
    assert report.plain["linear + bias + GELU: ReLU is no GELU"] == 3
    assert "0 packed, 0 fell back" in str(report)
    assert "attention_fwd" in report.backends
    assert "attention_fwd" not in str(report)  # `fastbert info` says that


def test_report_of_a_model_that_is_not_patched_says_what_would_be_fused() -> None:
    stock, fast = pair("BertForMaskedLM")
    root = nn.Sequential(stock)
    before = [{**m.__dict__} for m in root.modules()], _classes(root)
    report = fastbert.report(root)
    assert ([m.__dict__ for m in root.modules()], _classes(root)) == before
    assert not report.patched
    assert report.fused == fastbert.report(fast).fused
    assert str(report).startswith("Sequential on cpu is not patched; with fastbert.patch:\nwould be fused:\n")
    assert "calls:" not in str(report)


@needs("triton")
def test_report_says_which_way_each_product_takes_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair("BertForMaskedLM")
    products = fastbert.report(fastbert.patch(model)).products
    assert {text.partition(":")[0]: count for text, count in products.items()} == {
        "48 -> 144": 3,
        "48 -> 48": 3,
        "48 -> 96 + GELU": 3,
        "96 -> 48": 3,
        "48 -> 48 + GELU": 1,
    }
    gpu, bf16 = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(_launch, "chip", lambda device: _launch.Chip((9, 0), 132))
    tiles = _product.Tiles(128, 256, 64, 8, 3)
    entries = {_product.Product((9, 0), bf16, "none", 96, 48, rows): tiles for rows in (16384, 65536)}
    monkeypatch.setattr(_product, "TILES", entries)
    way = _product.why(gpu, bf16, "none", 96, 48)
    assert way.startswith("Triton, measured to be faster: 16384 to 65535 tokens tiles 128x256x64")
    assert "from 65536 tokens on tiles" in way
    assert way.endswith("else cuBLAS, then a kernel for the GELU")
    assert _product.why(gpu, bf16, None, 96, 48) == "cuBLAS: no tiles were measured to be faster (sm_90, bfloat16)"
    assert _product.why(gpu, torch.float64, None, 96, 48) == "PyTorch, in float64"


class TestReplacedParts:
    def test_lora(self) -> None:
        """patch then get_peft_model, and get_peft_model then patch: equal to PEFT on transformers' own, and trains."""
        peft = pytest.importorskip("peft")
        stock, _ = pair("BertForSequenceClassification")
        config = peft.LoraConfig(
            r=4,
            target_modules=["query", "value", "dense"],
            task_type="SEQ_CLS",
            init_lora_weights=False,
            lora_dropout=0.0,
        )
        torch.manual_seed(5)
        expected = peft.get_peft_model(copy.deepcopy(stock), config)
        torch.manual_seed(5)
        first = peft.get_peft_model(fastbert.patch(copy.deepcopy(stock)), config)
        second = fastbert.patch(copy.deepcopy(expected))
        inputs = batch("BertForSequenceClassification", mask_named("right"))
        for model in (expected, first, second):
            no_dropout(model)(**inputs).loss.backward()
        for model in (first, second):
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-5)
            assert_gradients_close(model, expected)
            assert fastbert.report(model).packed_calls == 2
            called = "peft.tuners.lora.layer.Linear is called"
            report = fastbert.report(model)
            assert report.plain[f"linear + bias + GELU: {called}"] == 3
            assert report.products == {
                f"48 -> 48: {called}": 9,
                "48 -> 48: Linear is called, for q, k and v cannot be one product": 3,
                f"48 -> 96: {called}": 3,
                f"96 -> 48: {called}": 3,
            }
        merged = first.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, expected(**inputs).logits, atol=1e-5, rtol=1e-5)
        assert fastbert.report(merged).fused["linear + bias + GELU"] == 3

    @pytest.mark.parametrize("part", ["word_embeddings", "query", "dense", "LayerNorm", "decoder"])
    def test_hooks_are_called(self, part: str) -> None:
        stock, fast = pair("BertForMaskedLM")
        calls = []
        for model in (stock, fast):
            for name, module in model.named_modules():
                if name.endswith(part):
                    module.register_forward_hook(
                        lambda m, args, out, model=model: (calls.append(model is fast), 2 * out)[1]
                    )
        inputs = batch("BertForMaskedLM", None)
        expected, actual = no_dropout(stock)(**inputs), no_dropout(fast)(**inputs)
        assert calls.count(True) == calls.count(False) > 0
        torch.testing.assert_close(actual.loss, expected.loss, atol=1e-4, rtol=1e-5)
        for output in (expected, actual):
            output.loss.backward()
        assert_gradients_close(fast, stock)

    def test_a_foreign_part_falls_back(self) -> None:
        class Wrapper(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, *args: object, **kwargs: object) -> object:
                return self.inner(*args, **kwargs)

        stock, fast = pair("BertModel")
        for model in (stock, fast):
            layer = model.encoder.layer[1]
            layer.attention = Wrapper(layer.attention)
        inputs = batch("BertModel", mask_named("right"))
        torch.testing.assert_close(fast(**inputs).last_hidden_state, stock(**inputs).last_hidden_state)
        assert fastbert.report(fast).fallbacks == {"encoder.layer.1.attention: a Wrapper in its place": 1}

    def test_frozen_parameters_get_no_gradient(self) -> None:
        stock, fast = pair("BertForTokenClassification")
        inputs = batch("BertForTokenClassification", mask_named("right"))
        for model in (stock, fast):
            for name, p in model.named_parameters():
                p.requires_grad_("LayerNorm" in name or "intermediate.dense.bias" in name)
            no_dropout(model)(**inputs).loss.backward()
        assert_gradients_close(fast, stock)


def test_sentence_transformer() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SentenceTransformer(minilm(), device="cpu")
    texts = ["A fox.", "The tortoise and the hare agreed on a race and a judge.", "", "Grapes are sour " * 20]
    expected = model.encode(texts)
    fastbert.patch(model)
    actual = model.encode(texts)
    assert abs(actual - expected).max() <= 1e-6
    assert fastbert.report(model).packed_calls >= 1
    assert fastbert.report(model).fallbacks.total() == 0


def test_pipeline(tmp_path: object) -> None:
    path = minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path)
    texts = ["A fox and some grapes.", "A crow."]
    features = transformers.pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    expected = features(texts)
    fastbert.patch(features.model)
    for a, e in zip(features(texts), expected, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(e), atol=1e-5, rtol=1e-5)
