"""`reference.encoder`, the specification, against transformers in float64."""

import pytest
import torch
import transformers

from fastbert import reference
from tests.models import minilm, shared, tiny_config


def _compare(model: transformers.BertModel, approximate: str = "none", longest: int = 40) -> None:
    model = model.double().eval()
    config = model.config
    seqlens = [longest, 1, 7, 7, 12]
    cu_seqlens = torch.tensor([0, *torch.tensor(seqlens).cumsum(0).tolist()], dtype=torch.int32)
    ids = torch.randint(1, config.vocab_size, (sum(seqlens),))
    types = torch.randint(0, config.type_vocab_size, (sum(seqlens),))
    actual = reference.encoder(
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
    *_, actual = reference.encoder(
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
