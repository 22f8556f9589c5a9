"""Function transforms, forward-mode and second derivatives, tracing: transformers' values, or one clear error."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastbert
from tests.models import HEADS, batch, mask_named, pair, tiny_config

CONFIG = tiny_config(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0, vocab_size=30,
)  # fmt: skip


@pytest.fixture
def models() -> list[Any]:
    """In float64, so that values are compared and not roundings."""
    stock = transformers.BertForSequenceClassification(CONFIG).double().eval()
    return [stock, fastbert.patch(copy.deepcopy(stock))]


X = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TANGENT = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[2, 7, 8, 3], [2, 9, 5, 3]])
LABELS = torch.tensor([0, 1])


def _of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda embeds: model(inputs_embeds=embeds).logits


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def _loss(model: nn.Module, values: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
    return functional_call(model, values, (ids,), {"labels": labels}).loss


TRANSFORMS: dict[str, Callable[[nn.Module], Any]] = {
    "grad": lambda m: grad(lambda v: _loss(m, v, IDS, LABELS))(_parameters(m)),
    "grad_and_value": lambda m: grad_and_value(lambda v: _loss(m, v, IDS, LABELS))(_parameters(m)),
    "vmap": lambda m: vmap(lambda ids: m(ids[None]).logits)(IDS),
    "vmap of grad": lambda m: vmap(
        grad(lambda v, ids, label: _loss(m, v, ids[None], label[None])), in_dims=(None, 0, 0)
    )(_parameters(m), IDS, LABELS),
    "vmap over models": lambda m: vmap(lambda v: functional_call(m, v, (IDS,)).logits)(
        {name: torch.stack([p, 2 * p]) for name, p in _parameters(m).items()}
    ),
    "jvp": lambda m: jvp(_of(m), (X,), (TANGENT,)),
    "vjp": lambda m: vjp(_of(m), X)[1](torch.ones(2, 3, dtype=torch.float64)),
    "linearize": lambda m: linearize(_of(m), X)[1](TANGENT),
    "jacrev": lambda m: jacrev(_of(m))(X),
    "jacfwd": lambda m: jacfwd(_of(m))(X),
    "hessian": lambda m: hessian(lambda x: _of(m)(x).square().sum())(X[:1, :2]),
    "grad of grad": lambda m: grad(lambda x: grad(lambda y: _of(m)(y).square().sum())(x).square().sum())(X),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_values_equal_transformers(name: str, models: list[Any]) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        expected, actual = (TRANSFORMS[name](model) for model in models)
    for a, b in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)
    before = fastbert.report(models[1])
    if name != "linearize":  # which asks for the value first
        assert before.packed_calls == 0
    assert set(before.fallbacks) <= {
        "a transform of torch.func",
        "forward-mode differentiation",
        "Module.__call__ is replaced",
    }
    models[1](IDS)
    assert fastbert.report(models[1]).packed_calls == before.packed_calls + 1


@pytest.mark.parametrize("name", [*HEADS, "BertLMHeadModel"])
def test_every_class_has_a_directional_derivative(name: str) -> None:
    stock, fast = (
        m.double()
        for m in pair(name, tiny_config(num_labels=2 if "Question" in name else 3, is_decoder="LMHead" in name))
    )
    inputs = batch(name if name in HEADS else "BertForMaskedLM", mask_named("right"))
    values = {key: p.detach() for key, p in stock.named_parameters()}
    tangents = {key: torch.randn_like(p) for key, p in values.items()}
    keep = inputs["attention_mask"].bool()

    def outputs(model: Any) -> Callable[[dict[str, Tensor]], list[Tensor]]:
        def call(v: dict[str, Tensor]) -> list[Tensor]:
            found = functional_call(model, v, (), inputs)
            return [t if t.shape[:2] != keep.shape else t[keep] for t in found.to_tuple() if isinstance(t, Tensor)]

        return call

    with sdpa_kernel(SDPBackend.MATH):
        expected, actual = (jvp(outputs(model), (values,), (tangents,)) for model in (stock, fast))
    loose = {"check_dtype": False, "atol": 1e-5, "rtol": 1e-5}  # transformers' causal loss is in float32
    torch.testing.assert_close(actual, expected, **(loose if "LMHead" in name else {"atol": 1e-8, "rtol": 1e-8}))


def test_dual_numbers(models: list[Any]) -> None:
    results = []
    with sdpa_kernel(SDPBackend.MATH), torch.autograd.forward_ad.dual_level():
        for model in models:
            dual = torch.autograd.forward_ad.make_dual(X, TANGENT)
            results.append(torch.autograd.forward_ad.unpack_dual(_of(model)(dual)).tangent)
    torch.testing.assert_close(results[1], results[0])
    assert results[0].abs().max() > 0


def test_strict_raises(models: list[Any]) -> None:
    fastbert.patch(models[1], strict=True)
    with pytest.raises(fastbert.FellBack, match=r"torch\.func"):
        TRANSFORMS["jacrev"](models[1])


def test_second_derivatives_by_autograd_are_one_error(models: list[Any]) -> None:
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(_of(models[1])(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.grad(first.square().sum(), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["BertModel", "BertForSequenceClassification"])
def test_a_traced_program_is_transformers_own(name: str) -> None:
    stock, fast = pair(name)
    fast.config.return_dict = stock.config.return_dict = False
    inputs = (torch.randint(1, 99, (2, 7)), torch.ones(2, 7, dtype=torch.int64))
    try:
        torch.jit.trace(stock, inputs, strict=False)
    except IndexError as error:  # of transformers 5.5
        with pytest.raises(IndexError, match=str(error)):
            torch.jit.trace(fast, inputs, strict=False)
        return
    traced = torch.jit.trace(fast, inputs, strict=False)
    assert "fastbert::" not in str(traced.inlined_graph)
    other = (torch.randint(1, 99, (2, 7)), torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
    torch.testing.assert_close(traced(*other)[0], stock(*other)[0], atol=1e-5, rtol=1e-5)
