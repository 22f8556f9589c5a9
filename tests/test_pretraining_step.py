"""BertForPreTraining's training step, heads and all: on a CPU, on a GPU, and with TRITON_INTERPRET=1 on the kernels.

Against `reference_encoder.pretraining_loss`, with dropout on and the same masks; that itself against transformers.
"""

import re
from itertools import accumulate

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert import reference_encoder
from fastbert.demo import load_fables
from tests.models import tiny_config

SEED = -987654321
DROPOUT = {"hidden_dropout_p": 0.2, "attention_dropout_p": 0.3}
STEPS = 50
Batch = dict[str, Tensor]


def _model(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    model = fastbert.BertForPreTraining(tiny_config(**rates, **changes)).train()
    with torch.no_grad():
        for p in model.parameters():  # as initialised, biases are 0 and LayerNorms 1: a swap would go unseen
            p.add_(0.1 * torch.randn_like(p))
    return model


def _batch(seqlens: list[int], device: str = "cpu", vocabulary: int = 100) -> Batch:
    """Packed; every fourth token has a label, a [CLS] among them."""
    T = sum(seqlens)
    labels = torch.randint(0, vocabulary, (T,)).where(torch.arange(T) % 4 == 0, -100)
    batch = {
        "input_ids": torch.randint(1, vocabulary, (T,)),
        "token_type_ids": torch.randint(0, 2, (T,)),
        "cu_seqlens": torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32),
        "labels": labels,
        "next_sentence_label": torch.randint(0, 2, (len(seqlens),)),
    }
    return {name: t.to(device) for name, t in batch.items()}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    ids, types, labels = (batch[name][None] for name in ("input_ids", "token_type_ids", "labels"))
    cu_seqlens = batch["cu_seqlens"]
    return model(
        input_ids=ids,
        token_type_ids=types,
        labels=labels,
        next_sentence_label=batch["next_sentence_label"],
        cu_seq_lens_q=cu_seqlens,
        max_length_q=int(cu_seqlens.diff().max()),
    ).loss


def _reference_loss(model: nn.Module, weights: dict[str, Tensor], batch: Batch, **options: object) -> Tensor:
    cu_seqlens = batch["cu_seqlens"]
    position_ids = torch.cat([torch.arange(n, device=cu_seqlens.device) for n in cu_seqlens.diff().tolist()])
    config = model.config
    return reference_encoder.pretraining_loss(
        weights,
        batch["input_ids"],
        batch["token_type_ids"],
        position_ids,
        cu_seqlens,
        batch["labels"],
        batch["next_sentence_label"],
        num_heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
        approximate="none" if config.hidden_act == "gelu" else "tanh",
        **options,
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_the_reference_is_transformers(activation: str) -> None:
    config = tiny_config(hidden_act=activation)
    model = transformers.BertForPreTraining(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = _batch([12, 12, 12])  # of one length: what stock BERT can take without padding
    expected = model(
        input_ids=batch["input_ids"].view(3, 12),
        token_type_ids=batch["token_type_ids"].view(3, 12),
        labels=batch["labels"].view(3, 12),
        next_sentence_label=batch["next_sentence_label"],
    ).loss
    actual = _reference_loss(model, dict(model.named_parameters()), batch)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("seqlens", "activation"), [([17, 1, 30], "gelu"), ([60, 5, 40], "gelu_new")], ids=["apart", "one product"]
)
def test_a_training_step_equals_the_reference(
    seqlens: list[int], activation: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, and every parameter's gradient, against float64."""
    model = _model(hidden_act=activation, num_hidden_layers=2, num_attention_heads=2).to(device)
    batch = _batch(seqlens, device)
    seed = torch.tensor(SEED, device=device)
    monkeypatch.setattr("fastbert.functional.draw_seed", lambda device: seed)
    loss = _loss(model, batch)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    exact = _reference_loss(model, weights, batch, seed=seed, **DROPOUT)
    assert abs(loss.item() - exact.item()) <= 1e-6 * exact.item()
    loss.backward()
    exact.backward()
    largest = max(t.grad.abs().max() for t in weights.values())
    for name, p in model.named_parameters():
        error = (p.grad - weights[name].grad).abs().max() / largest
        assert error <= 2e-6, f"{name}: {error:.1e}"


def _fables() -> tuple[list[Batch], int]:
    """Masked sentence pairs of Aesop's fables, packed, and the size of their vocabulary."""
    sentences = [re.findall(r"[a-z]+", s) for f in load_fables() for s in f.text.lower().split(". ")]
    sentences = [s[:20] for s in sentences if len(s) > 3][:200]
    vocabulary = {word: i for i, word in enumerate(sorted({w for s in sentences for w in s}), start=5)}
    generator = torch.Generator().manual_seed(1)
    batches = []
    for start in range(0, 32, 4):
        ids, types, seqlens, follows = [], [], [], []
        for i in range(start, start + 4):
            other = int(torch.randint(0, len(sentences), (), generator=generator))
            follows.append(int(i % 2 == 1))
            first, second = sentences[i], sentences[other if follows[-1] else i + 1]
            pair = [2, *(vocabulary[w] for w in first), 3, *(vocabulary[w] for w in second), 3]
            ids += pair
            types += [0] * (len(first) + 2) + [1] * (len(second) + 1)
            seqlens.append(len(pair))
        input_ids = torch.tensor(ids)
        masked = (torch.rand(len(ids), generator=generator) < 0.15) & (input_ids > 4)
        batches.append(
            {
                "input_ids": input_ids.masked_fill(masked, 4),
                "token_type_ids": torch.tensor(types),
                "cu_seqlens": torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32),
                "labels": input_ids.where(masked, -100),
                "next_sentence_label": torch.tensor(follows),
            }
        )
    return batches, 5 + len(vocabulary)


def test_fifty_steps_on_real_text_follow_the_reference(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW in float32, dropout on, the same masks: the loss curve to 1e-4."""
    batches, vocabulary = _fables()
    batches = [{name: t.to(device) for name, t in batch.items()} for batch in batches]
    model = _model(vocab_size=vocabulary, num_hidden_layers=2).to(device)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizers = [torch.optim.AdamW(parameters, lr=2e-3) for parameters in (model.parameters(), weights.values())]
    curves: tuple[list[float], list[float]] = [], []
    for step in range(STEPS):
        seed, batch = torch.tensor(1000 + step, device=device), batches[step % len(batches)]
        monkeypatch.setattr("fastbert.functional.draw_seed", lambda device, seed=seed: seed)
        losses = _loss(model, batch), _reference_loss(model, weights, batch, seed=seed, **DROPOUT)
        for loss, optimizer, curve in zip(losses, optimizers, curves, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    actual, expected = (torch.tensor(curve) for curve in curves)
    assert expected[-8:].mean() < 0.85 * expected[:8].mean(), "it learns nothing"
    torch.testing.assert_close(actual, expected, atol=0.0, rtol=1e-4)
