"""The whole encoder on its operators: on a CPU, on a GPU, and with TRITON_INTERPRET=1 on the kernels without one."""

from itertools import accumulate

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert import _library, reference_encoder
from tests.models import assert_gradients_close, minilm, tiny_config
from tests.optional import needs

SEED = -987654321


def _model(**changes: object) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = tiny_config(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, **sizes, **changes)
    model = fastbert.BertModel(config, add_pooling_layer=False).train()
    with torch.no_grad():
        for p in model.parameters():  # as initialised, biases are 0 and LayerNorms 1: a swap would go unseen
            p.add_(0.1 * torch.randn_like(p))
    return model


def _packed(seqlens: list[int], device: str = "cpu") -> dict[str, Tensor]:
    T = sum(seqlens)
    return {
        "input_ids": torch.randint(1, 100, (1, T), device=device),
        "token_type_ids": torch.randint(0, 2, (1, T), device=device),
        "cu_seq_lens_q": torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device),
        "max_length_q": max(seqlens),
    }


def _reference(weights: dict[str, Tensor], inputs: dict[str, Tensor], eps: float) -> Tensor:
    cu_seqlens = inputs["cu_seq_lens_q"]
    *_, last = reference_encoder.encoder(
        weights,
        inputs["input_ids"][0],
        inputs["token_type_ids"][0],
        torch.cat([torch.arange(n, device=cu_seqlens.device) for n in cu_seqlens.diff().tolist()]),
        cu_seqlens,
        num_heads=2,
        eps=eps,
        hidden_dropout_p=0.2,
        attention_dropout_p=0.3,
        seed=torch.tensor(SEED, device=cu_seqlens.device),
    )
    return last


@pytest.mark.kernel
@pytest.mark.parametrize("seqlens", [[17, 1, 30], [60, 5, 40]], ids=["apart", "one product"])
def test_a_training_step_equals_the_reference(seqlens: list[int], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on, the same masks: the output, and every parameter's gradient, against float64."""
    model = _model().to(device)
    inputs = _packed(seqlens, device)
    monkeypatch.setattr("fastbert.functional.draw_seed", lambda device: torch.tensor(SEED, device=device))
    actual = model(**inputs).last_hidden_state[0]
    exact_weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = _reference(exact_weights, inputs, model.config.layer_norm_eps)
    assert (actual - expected).abs().max() <= 2e-5
    d = torch.randn_like(expected)
    actual.backward(d.float())
    expected.backward(d)
    largest = max(t.grad.abs().max() for t in exact_weights.values())
    for name, p in model.named_parameters():
        error = (p.grad - exact_weights[name].grad).abs().max() / largest
        assert error <= 2e-6, f"{name}: {error:.1e}"


@pytest.mark.kernel
@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_replays_under_gradient_checkpointing(reentrant: bool, device: str) -> None:
    inputs = _packed([9, 4], device)
    model = _model().to(device)
    other = _model().to(device)
    other.load_state_dict(model.state_dict())
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        other.enable_input_require_grads()
    for m in (model, other):
        torch.manual_seed(3)
        m(**inputs).last_hidden_state.square().sum().backward()
    assert_gradients_close(other, model, 1e-6)


@pytest.mark.parametrize("seqlens", [[9, 4], [60, 40]], ids=["apart", "one product"])
def test_a_training_step_compiles_without_graph_breaks(seqlens: list[int], device: str) -> None:
    inputs = _packed(seqlens, device)
    model = _model().to(device)
    other = _model().to(device)
    other.load_state_dict(model.state_dict())
    for m, call in ((model, model), (other, torch.compile(other, backend="aot_eager", fullgraph=True))):
        torch.manual_seed(3)
        call(**inputs).last_hidden_state.square().sum().backward()
        assert m.embeddings.word_embeddings.weight.grad is not None
    assert_gradients_close(other, model, 1e-6)


@needs("triton")
def test_every_operator_of_the_encoder_has_kernels() -> None:
    served = _library.backends("cuda")
    for name in (
        "attention_fwd",
        "attention_bwd",
        "layer_norm_fwd",
        "layer_norm_bwd",
        "embedding_fwd",
        "embedding_bwd",
    ):
        assert served[name] == "Triton"


@pytest.mark.kernel
@torch.no_grad()
def test_a_real_checkpoint_gives_the_same_states_through_the_kernels() -> None:
    """The CPU's own kernels have texts of their own: test_inference.py."""
    if _library.backends("cpu")["attention_fwd"] != "Triton":
        pytest.skip("of the kernels: needs TRITON_INTERPRET=1")
    path = minilm()
    texts = ["The hare and the tortoise.", "A fox who had lost his tail spoke to the other foxes about it.", "No."]
    inputs = transformers.AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    stock, fast = (transformers.BertModel.from_pretrained(path).eval() for _ in range(2))
    keep = inputs["attention_mask"].bool()
    expected = stock(**inputs).last_hidden_state[keep]
    torch.testing.assert_close(fastbert.patch(fast)(**inputs).last_hidden_state[keep], expected, atol=1e-5, rtol=1e-5)
