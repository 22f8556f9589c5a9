"""`reference_encoder.encoder`, the specification, against transformers in float64; and fastbert against it."""

from itertools import accumulate
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastbert
from fastbert import reference_encoder
from tests.families import BASES
from tests.models import batch, config_of, mask_named, minilm, pair, shared, tiny_config


def _compare(model: transformers.BertModel, approximate: str = "none", longest: int = 40) -> None:
    model = model.double().eval()
    config = model.config
    seqlens = [longest, 1, 7, 7, 12]
    cu_seqlens = torch.tensor([0, *torch.tensor(seqlens).cumsum(0).tolist()], dtype=torch.int32)
    ids = torch.randint(1, config.vocab_size, (sum(seqlens),))
    types = torch.randint(0, config.type_vocab_size, (sum(seqlens),))
    actual = reference_encoder.encoder(
        dict(model.named_parameters()),
        ids,
        types,
        torch.cat([torch.arange(n) for n in seqlens]),
        cu_seqlens,
        num_heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
        approximate=approximate,
    )
    assert len(actual) == config.num_hidden_layers + 1
    for i, n in enumerate(seqlens):
        own = slice(int(cu_seqlens[i]), int(cu_seqlens[i]) + n)
        one = model(ids[None, own], token_type_ids=types[None, own], output_hidden_states=True)
        for a, e in zip(actual, one.hidden_states, strict=True):
            torch.testing.assert_close(a[own], e[0], atol=1e-11, rtol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize(("activation", "approximate"), [("gelu", "none"), ("gelu_new", "tanh")])
def test_random_model(activation: str, approximate: str) -> None:
    model = transformers.BertModel(tiny_config(hidden_act=activation))
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p))
    _compare(model, approximate)


@torch.no_grad()
def test_minilm() -> None:
    _compare(transformers.BertModel.from_pretrained(minilm()))


@torch.no_grad()
def test_pretrained_rxnfp() -> None:
    _compare(transformers.BertModel.from_pretrained(shared("checkpoints/bert-pretraining-rxnfp")))


@torch.no_grad()
def test_causal() -> None:
    """A token's states do not depend on what is to its right, and equal transformers' decoder's."""
    model = transformers.BertModel(tiny_config(is_decoder=True, use_cache=False)).double().eval()
    ids = torch.randint(1, 100, (9,))
    *_, actual = reference_encoder.encoder(
        dict(model.named_parameters()),
        ids,
        torch.zeros_like(ids),
        torch.arange(9),
        torch.tensor([0, 9], dtype=torch.int32),
        num_heads=4,
        eps=model.config.layer_norm_eps,
        causal=True,
    )
    torch.testing.assert_close(actual, model(ids[None]).last_hidden_state[0], atol=1e-11, rtol=1e-11)


def _base(name: str, **changes: object) -> Any:
    """A tiny base model in float64 whose weights are all random."""
    return pair(name, config_of(name, **changes))[0].double()


def _specified(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The specification with a model's weights, of right-padded inputs."""
    config, keep = model.config, inputs["attention_mask"].bool()
    seqlens = keep.sum(-1).tolist()
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    ids = inputs["input_ids"][keep]
    types, tasks = (inputs[n][keep] if n in inputs else None for n in ("token_type_ids", "task_type_ids"))
    positions = torch.cat([torch.arange(n) for n in seqlens])
    if hasattr(model.embeddings, "padding_idx"):
        positions = reference_encoder.counted_positions(ids, cu_seqlens, model.embeddings.padding_idx)
    if "Albert" in type(model).__name__:
        per_group = config.num_hidden_layers / config.num_hidden_groups
        groups = [int(i / per_group) for i in range(config.num_hidden_layers)]
        options["layers"] = [f"{group}.{i}" for group in groups for i in range(config.inner_group_num)]
        options["approximate"] = "tanh"
    return reference_encoder.encoder(
        reference_encoder.bert_names(dict(model.named_parameters())),
        ids,
        torch.zeros_like(ids) if types is None else types,
        positions,
        cu_seqlens,
        num_heads=config.num_attention_heads,
        eps=getattr(config, "layer_norm_eps", 1e-12),
        task_type_ids=tasks,
        **options,
    )


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_every_family(name: str) -> None:
    model, inputs = _base(name), batch(name, mask_named("right"))
    inputs["input_ids"][0, 3] = 1  # that of padding, for RoBERTa, inside a text
    keep = inputs["attention_mask"].bool()
    expected = model(**inputs, output_hidden_states=True).hidden_states
    if model.config.model_type == "electra":  # which returns what is not projected yet
        expected = expected[1:]
    actual = _specified(model, inputs)[-len(expected) :]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e[keep], atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", ["AlbertModel", "DistilBertModel"])
def test_dropout_of_layers_that_run_twice_or_drop_in_other_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"AlbertModel": (0.2, 0.2, 0.0), "DistilBertModel": (0.2, 0.0, 0.2)}[name]
    names = "hidden_dropout_prob", "dropout", "attention_probs_dropout_prob", "attention_dropout"
    model = _base(name, **dict(zip(names, (0.2, 0.2, 0.3, 0.3), strict=True)))
    inputs, seed = batch(name, mask_named("right")), torch.tensor(-987654321)
    monkeypatch.setattr("fastbert.functional.draw_seed", lambda device: seed)
    expected = _specified(model, inputs, hidden_dropout_p=rates, attention_dropout_p=0.3, seed=seed)[-1]
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    expected_gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    keep = inputs["attention_mask"].bool()
    actual = fastbert.patch(model.train(), strict=True)(**inputs).last_hidden_state[keep]
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    actual.backward(gradient)
    for n, grad in expected_gradients.items():
        torch.testing.assert_close(model.get_parameter(n).grad, grad, atol=1e-10, rtol=1e-9)
