"""The logger `fastbert`: one warning for each reason that a model's calls fall back for."""

import contextlib
import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import fastbert
from fastbert.families import _fallbacks
from fastbert.kernels import _launch
from fastbert.verify import verify
from tests.models import LENGTH, VOCABULARY, batch, mask_named, pair, tiny_config

Call = Callable[[PreTrainedModel], object]
Said = Callable[[], list[logging.LogRecord]]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Said:
    """What the logger `fastbert` has said."""
    return lambda: [record for record in caplog.records if record.name == "fastbert"]


def tiny(name: str = "BertModel") -> PreTrainedModel:
    if name.startswith("Roberta"):
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
        model: PreTrainedModel = getattr(fastbert, name)(config).eval()
        return model
    return pair(name, tiny_config(num_hidden_layers=1, is_decoder=name == "BertLMHeadModel"))[1]


def ids(mask: str = "none", *, name: str = "BertModel", words: bool = False) -> dict[str, Any]:
    inputs = batch(name, mask_named(mask), words=words)
    return {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}


def attentions(model: PreTrainedModel) -> object:
    return model(**ids(), output_attentions=True)


def labels_on_padding(model: PreTrainedModel) -> object:
    inputs = ids("right")
    return model(**inputs, labels=inputs["input_ids"])


def differentiated(model: PreTrainedModel) -> object:
    return torch.func.grad(lambda embeddings: model(inputs_embeds=embeddings)[0].sum())(torch.randn(1, 3, 48))


def dual(model: PreTrainedModel) -> object:
    with torch.autograd.forward_ad.dual_level():
        return model(**ids())


CASES: dict[str, tuple[str, Call]] = {
    "output_attentions": ("BertModel", attentions),
    "an attention_mask that is not 2-D": (
        "BertModel",
        lambda model: model(**ids(), attention_mask=torch.ones(5, 1, LENGTH, LENGTH)),
    ),
    "a decoder that returns a cache": ("BertLMHeadModel", lambda model: model(**ids())),
    "cross-attention or a cache": (
        "BertLMHeadModel",
        lambda model: model(**ids(), past_key_values=model(**ids()).past_key_values),
    ),
    _fallbacks.MASKED_WORDS: ("BertModel", lambda model: model(**ids("right", words=True))),
    "labels on padding": ("BertForMaskedLM", labels_on_padding),
    "the pooler reads each row's first token": ("BertModel", lambda model: model(**ids("left"))),
    "the head reads each row's first token": (
        "RobertaForSequenceClassification",
        lambda model: model(**ids("left", name="RobertaModel")),
    ),
    "a GPU of compute capability": ("BertModel", lambda model: model(**ids())),
    "exporting": ("BertModel", lambda model: torch.export.export(model, (), ids(), strict=False)),
    "a transform of torch.func": ("BertModel", differentiated),
    "forward-mode differentiation": ("BertModel", dual),
}


def test_every_advice_has_a_case() -> None:
    assert CASES.keys() == _fallbacks._ADVICE.keys()


@pytest.mark.parametrize("reason", CASES)
def test_what_is_said_and_how_loud(
    reason: str, said: Said, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, call = CASES[reason]
    model = tiny(name)
    if reason.startswith("a GPU"):
        monkeypatch.setattr(_launch, "why_not", lambda device: "a GPU of compute capability 7.5: the kernels need 8.0")
    caplog.set_level(logging.INFO, "fastbert")
    call(model)
    call(model)
    (record,) = [record for record in said() if reason in record.getMessage()]
    advice = _fallbacks._ADVICE[reason]
    assert record.levelno == (logging.INFO if advice is None else logging.WARNING)
    assert advice is None or advice in record.getMessage()


def test_once_for_each_model_and_reason(said: Said) -> None:
    models = [tiny() for _ in range(2)]
    for model in models:
        model(**ids())
        attentions(model)
        attentions(model)
    assert len(said()) == 2
    models[0].encoder.layer[0].register_forward_hook(lambda *_: None)
    models[0](**ids())
    assert "encoder.layer.0: a forward hook" in said()[-1].getMessage()
    assert _fallbacks._OTHER in said()[-1].getMessage()
    assert len(said()) == 3
    assert fastbert.report(models[0]).fallbacks == {"output_attentions": 2, "encoder.layer.0: a forward hook": 1}


def test_a_head_and_its_encoder_say_it_once(said: Said) -> None:
    model = tiny("BertForMaskedLM")
    model.cls.predictions.transform.register_forward_hook(lambda *_: None)
    model(**ids())
    assert len(said()) == 1
    assert "BertForMaskedLM" in said()[0].getMessage()


def test_off_by_the_logging_module(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("fastbert")
    for level, lines in ((logging.ERROR, 0), (logging.NOTSET, 1)):
        logger.setLevel(level)
        handler = logging.StreamHandler()
        logger.addHandler(handler)
        with contextlib.ExitStack() as stack:
            stack.callback(logger.removeHandler, handler)
            stack.callback(logger.setLevel, logging.NOTSET)
            attentions(tiny())
        assert capfd.readouterr().err.count("fastbert: a call of BertModel fell back") == lines


def test_what_raises_is_not_logged_too(said: Said) -> None:
    model = tiny()
    with pytest.raises(fastbert.FellBack):
        attentions(fastbert.patch(copy.deepcopy(model), strict=True))
    packed = {"input_ids": torch.ones(1, 3, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32)}
    with pytest.raises(ValueError, match="cannot fall back"):
        model(**packed, max_length_q=3, output_attentions=True)
    assert not said()


def test_verify_names_them_in_what_it_finds_instead(said: Said) -> None:
    stock, _ = pair("BertModel", tiny_config(num_hidden_layers=1))
    assert any(case.fallbacks for case in verify(stock).cases)
    assert not said()
    assert logging.getLogger("fastbert").level == logging.NOTSET


def test_compiled(said: Said) -> None:
    """Packed, the graph has no break; a call that falls back says so when it is traced."""
    model = tiny()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(input_ids=ids()["input_ids"])
    assert not said()
    for _ in range(2):
        compiled(input_ids=ids()["input_ids"], attention_mask=torch.ones(5, 1, LENGTH, LENGTH, dtype=torch.bool))
    assert [record.levelno for record in said()] == [logging.WARNING]
    assert "an attention_mask that is not 2-D" in said()[0].getMessage()
