"""The public operators: autocast, compilation, and checks that name the argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastbert import functional

CU_SEQLENS = torch.tensor([0, 3, 7], dtype=torch.int32)
IDS = torch.tensor([1, 2, 3])
OPERATORS: dict[str, tuple[Callable[..., Any], list[torch.Tensor]]] = {
    "layer_norm": (
        lambda x, w, b, r: functional.layer_norm(x, w, b, residual=r, x_bias=b, dropout_p=0.1, seed=torch.tensor(1)),
        [torch.randn(2, 3, 8), torch.randn(8), torch.randn(8), torch.randn(2, 3, 8)],
    ),
    "embedding": (
        lambda word, position, w, b: functional.embedding(IDS, IDS, IDS, word, position, position, w, b),
        [torch.randn(9, 8), torch.randn(4, 8), torch.randn(8), torch.randn(8)],
    ),
    "attention": (
        lambda q, k, v: functional.attention(q, k, v, CU_SEQLENS, 4),
        [torch.randn(7, 2, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)],
    ),
    "linear_gelu": (functional.linear_gelu, [torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)]),
    "linear_cross_entropy": (
        lambda x, w, b: functional.linear_cross_entropy(x, w, b, torch.tensor([2, -100, 5])),
        [torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)],
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_without_graph_breaks(name: str) -> None:
    operator, tensors = OPERATORS[name]
    results = []
    for function in (operator, torch.compile(operator, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(name: str) -> None:
    """Products in bf16; norms and losses stay float32, and so do gradients of float32 leaves."""
    operator, tensors = OPERATORS[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autocast("cpu", torch.bfloat16):
        y = operator(*leaves)
    assert y.dtype == (torch.bfloat16 if name in ("attention", "linear_gelu") else torch.float32)
    torch.testing.assert_close(y.float(), operator(*tensors), atol=0.2, rtol=0.05)
    y.float().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_layer_norm_keeps_the_residuals_dtype() -> None:
    x, weight = torch.randn(4, 8).bfloat16(), torch.ones(8)
    residual = torch.randn(4, 8)
    y = functional.layer_norm(x, weight, weight, residual=residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.layer_norm(x.float() + residual, (8,), weight, weight, 1e-12))


def test_dropout_is_drawn_from_pytorchs_generator() -> None:
    x, weight = torch.randn(4, 64), torch.ones(64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(functional.layer_norm(x, weight, weight, dropout_p=0.5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    seed = torch.tensor(3)
    streams = [functional.layer_norm(x, weight, weight, dropout_p=0.5, seed=seed, stream=s) for s in (0, 0, 1)]
    assert torch.equal(streams[0], streams[1])
    assert not torch.equal(streams[0], streams[2])


def _layer_norm(**changes: Any) -> None:
    arguments = {"x": torch.randn(3, 8), "weight": torch.ones(8), "bias": torch.zeros(8)}
    functional.layer_norm(**{**arguments, **changes})


def _embedding(**changes: Any) -> None:
    arguments = {"input_ids": IDS, "position_ids": IDS, "token_type_ids": IDS, "word_weight": torch.randn(9, 8)}
    arguments |= {"position_weight": torch.randn(9, 8), "token_type_weight": torch.randn(9, 8)}
    functional.embedding(**{**arguments, "weight": torch.ones(8), "bias": torch.zeros(8), **changes})


def _attention(**changes: Any) -> None:
    q, k, v = torch.randn(3, 7, 2, 8).unbind()
    functional.attention(**{"q": q, "k": k, "v": v, "cu_seqlens": CU_SEQLENS, "max_seqlen": 4, **changes})


def _linear_gelu(**changes: Any) -> None:
    arguments = {"x": torch.randn(2, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6)}
    functional.linear_gelu(**{**arguments, **changes})


def _cross_entropy(**changes: Any) -> None:
    arguments = {"x": torch.randn(2, 8), "weight": torch.randn(6, 8), "bias": None, "labels": torch.tensor([1, 2])}
    functional.linear_cross_entropy(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (_layer_norm, {"weight": torch.ones(7)}, r"weight is \(7,\), not \(8,\)"),
        (_layer_norm, {"bias": torch.ones(1, 8)}, r"bias is \(1, 8\), not \(8,\)"),
        (_layer_norm, {"residual": torch.ones(2, 8)}, r"residual is \(2, 8\), but x \(3, 8\)"),
        (_layer_norm, {"x_bias": torch.ones(3, 8)}, r"x_bias is \(3, 8\), not \(8,\)"),
        (_layer_norm, {"weight": torch.ones(8, device="meta")}, "weight is on meta"),
        (_layer_norm, {"dropout_p": 1.5}, r"dropout_p must be in \[0, 1\], but is 1.5"),
        (_layer_norm, {"dropout_p": -0.1}, r"dropout_p must be in \[0, 1\], but is -0.1"),
        (_embedding, {"position_ids": IDS[:2]}, r"position_ids is \(2,\), but input_ids \(3,\)"),
        (_embedding, {"token_type_ids": IDS.float()}, "token_type_ids must be int64 or int32, but is torch.float32"),
        (_embedding, {"position_weight": torch.ones(9, 7)}, r"position_weight is \(9, 7\), not \(_, 8\)"),
        (_embedding, {"word_weight": torch.ones(9, 8, device="meta")}, "word_weight is on meta"),
        (_attention, {"q": torch.ones(7, 16)}, r"q must be \(tokens, heads, head_dim\), but is \(7, 16\)"),
        (_attention, {"v": torch.ones(7, 2, 4)}, r"v is \(7, 2, 4\), but q \(7, 2, 8\)"),
        (_attention, {"cu_seqlens": CU_SEQLENS.long()}, r"cu_seqlens must be \(batch \+ 1,\) int32, but is .*int64"),
        (_attention, {"k": torch.ones(7, 2, 8, device="meta")}, "k is on meta"),
        (_linear_gelu, {"weight": torch.ones(6, 7)}, r"weight is \(6, 7\), but x has 8 features"),
        (_linear_gelu, {"bias": torch.ones(7)}, r"bias is \(7,\), not \(6,\)"),
        (_linear_gelu, {"approximate": "erf"}, "approximate must be 'none' or 'tanh', but is 'erf'"),
        (_cross_entropy, {"labels": torch.tensor([1])}, r"labels are \(1,\), but x is \(2, 8\)"),
        (_cross_entropy, {"labels": torch.tensor([1, 6])}, r"labels has 6, not in \[0, 6\)"),
        (_cross_entropy, {"labels": torch.tensor([-1, 0])}, r"labels has -1, not in \[0, 6\)"),
    ],
)
def test_bad_arguments(call: Callable[..., None], change: dict[str, Any], message: str) -> None:
    call()
    with pytest.raises(ValueError, match=message):
        call(**change)


@pytest.mark.parametrize("head_dim", [0, 257])
def test_head_dim(head_dim: int) -> None:
    q = torch.ones(7, 2, head_dim)
    with pytest.raises(ValueError, match=rf"head_dim must be in \[1, 256\], but is {head_dim}"):
        functional.attention(q, q, q, CU_SEQLENS, 4)
