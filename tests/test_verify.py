"""`verify` accepts a right fastbert and catches a wrong one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2Model, PreTrainedModel

import fastbert
from fastbert import functional, verify
from fastbert.errors import InputError
from fastbert.inference.loading import load_model
from tests.checkpoints import tiny_checkpoint
from tests.models import HEADS, config_of, pair, shared

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(AutoModel, tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_class_is_verified(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    loaded = verify.load_architecture(tiny_checkpoint(tmp_path, kind))
    assert type(loaded).__name__ == kind
    found = verify.verify(loaded, dtype=dtype)
    assert found.ok, [row for row in found.rows if not row.ok]
    assert [case.mask for case in found.cases] == list(verify.MASKS)
    outputs = {row.output for row in found.rows}
    assert {"hidden state 0", "hidden state 2", "grad. embeddings", "grad. layer 0", "grad. layer 1"} <= outputs
    parameters = {row.parameter for row in found.rows} - {None}
    unused = {name for name, _ in loaded.named_parameters() if kind == "BertModel" or "pooler" not in name} - parameters
    assert not unused


# One of each kind of layers, embeddings and heads.
OTHERS = ("AlbertForPreTraining", "DistilBertForMaskedLM", "DistilBertForSequenceClassification", "ElectraForMaskedLM")
OTHERS += (
    "ElectraForPreTraining",
    "ErnieForPreTraining",
    "ErnieForMultipleChoice",
    "RobertaForMaskedLM",
    "XLMRobertaXLForMaskedLM",
)


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_is_verified(name: str) -> None:
    stock, _ = pair(name, config_of(name, num_hidden_layers=2))
    found = verify.verify(stock)
    assert found.ok, [row for row in found.rows if not row.ok]
    assert {case.mask for case in found.cases if case.fallbacks} <= {"left padding"}
    outputs = {row.output for row in found.rows}
    assert {"hidden state 2", "grad. embeddings", "grad. layer 0", "grad. layer 1", "grad. heads"} <= outputs
    assert not {name for name, p in stock.named_parameters()} - {row.parameter for row in found.rows}


@pytest.mark.parametrize("path", ["roberta-masked-lm-sapiens-vh", "albert-masked-lm-rxnmapper"])
def test_real_checkpoints_are_verified(path: str) -> None:
    found = verify.verify(verify.load_architecture(shared(f"checkpoints/{path}")))
    assert found.ok, [row for row in found.rows if not row.ok]


def test_gradients_of_keys_biases_do_not_count_as_wrong(model: PreTrainedModel) -> None:
    rows = [row for row in verify.verify(model).rows if row.parameter and row.parameter.endswith("key.bias")]
    assert rows
    assert all(row.stock_error < 1e-6 for row in rows)


def test_left_padding_falls_back_where_there_is_a_pooler(tmp_path: Path) -> None:
    for kind, calls in (("BertModel", 2), ("BertForMaskedLM", 0)):
        found = verify.verify(verify.load_architecture(tiny_checkpoint(tmp_path / kind, kind)))
        counts = {case.mask: case.fallbacks.total() for case in found.cases}
        assert counts == {mask: calls if mask == "left padding" else 0 for mask in verify.MASKS}


def test_the_model_stays_as_it_was(model: PreTrainedModel) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    verify.verify(model, dtype=torch.bfloat16)
    assert type(model).__module__.startswith("transformers.")
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize("sequences", [[[2, 7, 3]], [[2, 7, 8, 3], [2, 3]], [[5]], [[5] * 200, [6]]])
def test_any_texts_do(model: PreTrainedModel, sequences: list[list[int]]) -> None:
    done: list[int] = []
    assert verify.verify(model, sequences, progress=done.append).ok
    assert sum(done) == len(verify.MASKS)


@pytest.mark.parametrize("sequences", [[], [[]], [[24]]])
def test_texts_that_cannot_be_used_are_refused(model: PreTrainedModel, sequences: list[list[int]]) -> None:
    with pytest.raises(InputError, match=r"no tokens|vocabulary of 24"):
        verify.verify(model, sequences)


def test_a_model_that_fastbert_does_not_know_is_refused() -> None:
    with pytest.raises(InputError, match="GPT2Model is no model that fastbert knows"):
        verify.verify(GPT2Model(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10)))


def perturb(parameter: str, share: float) -> Callable[[Any], Any]:
    """`patch`, and then one parameter a little off."""

    def patched(model: PreTrainedModel) -> PreTrainedModel:
        fast = fastbert.patch(model)
        with torch.no_grad():
            fast.get_parameter(parameter).mul_(1 + share)
        return fast

    return patched


@pytest.mark.parametrize(
    ("parameter", "share"),
    [
        ("embeddings.word_embeddings.weight", 1e-3),
        ("encoder.layer.1.attention.self.value.weight", 1e-3),
        ("encoder.layer.0.output.LayerNorm.weight", 1e-4),
        ("pooler.dense.weight", 1e-3),
    ],
)
def test_a_weight_that_is_off_is_caught(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, parameter: str, share: float
) -> None:
    monkeypatch.setattr(verify, "patch", perturb(parameter, share))
    assert not verify.verify(model).ok


def test_bfloat16_catches_what_is_more_than_rounding(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "patch", perturb("encoder.layer.1.output.dense.weight", 0.25))
    assert not verify.verify(model, dtype=torch.bfloat16).ok


def test_a_wrong_gradient_alone_is_caught(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.feed_forward

    def wrong(x: torch.Tensor, *args: Any, **how: Any) -> torch.Tensor:
        y = right(x, *args, **how)
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 1.001)
        return y

    monkeypatch.setattr(functional, "feed_forward", wrong)
    found = verify.verify(model)
    failed = {row.output for row in found.rows if not row.ok}
    assert failed
    assert all(output.startswith("grad.") for output in failed)


def test_padding_that_is_not_zero_is_caught(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbert.packing import Packing

    right = Packing.unpack
    monkeypatch.setattr(Packing, "unpack", lambda self, packed, fill=1.0: right(self, packed, 1.0))
    found = verify.verify(model)
    assert {case.mask for case in found.cases if not case.clean} == {"right padding", "holes", "all-padding row"}
    assert not found.ok


def test_sequences_that_mix_are_caught(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.attention

    def mixed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, *_: Any, **rest: Any) -> Any:
        return right(q, k, v, cu_seqlens[[0, -1]], q.shape[0], **rest)

    monkeypatch.setattr(functional, "attention", mixed)
    wrong = {row.mask for row in verify.verify(model).rows if not row.ok}
    assert wrong == {"none", "right padding", "holes", "all-padding row"}


def test_a_tolerance_replaces_the_rules(model: PreTrainedModel) -> None:
    assert verify.verify(model, tolerance=1e-3).ok
    assert verify.verify(model, dtype=torch.bfloat16, tolerance=10.0).ok
    found = verify.verify(model, tolerance=1e-9)
    assert not found.ok
    worst = {row.output: row for row in found.worst()}
    assert all(row.used <= worst[row.output].used for row in found.rows)


def test_nan_is_not_ok(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "patch", perturb("encoder.layer.1.output.dense.bias", float("nan")))
    found = verify.verify(model)
    assert not found.ok
    assert not any(case.clean for case in found.cases if not case.fallbacks)
