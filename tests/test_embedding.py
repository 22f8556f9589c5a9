"""embedding_fwd, embedding_bwd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels.embedding import embedding_bwd, embedding_fwd
from tests.oracle import assert_operator_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _inputs(T: int, N: int, dtype: torch.dtype, device: str, dropout_p: float = 0.0, padding_idx: int = 0) -> list:
    ids = [torch.randint(0, n, (T,), device=device) for n in (40, 9, 2)]  # many of them repeat
    tables = [torch.randn(n, N, device=device).to(dtype) for n in (40, 9, 2)]
    weight, bias = torch.randn(2, N, device=device).to(dtype)
    seed = torch.tensor(987654321, device=device) if dropout_p else None
    return [*ids, *tables, weight, bias, padding_idx, 1e-12, dropout_p, seed, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N"), [(1, 768), (61, 1024), (33, 100), (0, 16)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(T: int, N: int, dtype: torch.dtype, dropout_p: float, device: str) -> None:
    *tensors, _bias, padding_idx, _eps, p, seed, stream = forward = _inputs(T, N, dtype, device, dropout_p)
    assert_operator_accurate(embedding_fwd, reference.embedding, forward)
    y, mean, rstd = reference.embedding(*forward)
    backward = [torch.randn_like(y), *tensors, mean, rstd, padding_idx, p, seed, stream]
    assert_operator_accurate(embedding_bwd, reference.embedding_backward, backward, factor=4.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_gradcheck(dropout_p: float) -> None:
    arguments = _inputs(7, 5, torch.float64, "cpu", dropout_p, padding_idx=-1)
    tensors = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(lambda *a: embedding_fwd(*a)[0], tensors)


def test_registration() -> None:
    for dropout_p in (0.0, 0.1):
        *tensors, bias, padding_idx, _eps, p, seed, stream = forward = _inputs(6, 16, torch.float32, "cpu", dropout_p)
        y, mean, rstd = reference.embedding(*forward)
        torch.library.opcheck(embedding_bwd, [y, *tensors, mean, rstd, padding_idx, p, seed, stream])
        for a in (*tensors[3:], bias):
            a.requires_grad_()
        torch.library.opcheck(embedding_fwd, forward)


def test_equals_pytorch() -> None:
    ids, positions, types, word, position, token_type, weight, bias, *_ = _inputs(50, 24, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (word, position, token_type, weight, bias)]
    h = F.embedding(ids, word, padding_idx=0) + F.embedding(positions, position) + F.embedding(types, token_type)
    expected = F.layer_norm(h, (24,), weight, bias, 1e-12)
    actual = functional.embedding(ids, positions, types, *leaves, padding_idx=0)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(expected)
    actual_gradients, expected_gradients = (torch.autograd.grad(y, leaves, dy) for y in (actual, expected))
    torch.testing.assert_close(actual_gradients, expected_gradients)
    assert (ids == 0).any()
    assert (actual_gradients[0][0] == 0).all()


def test_leading_dimensions_and_narrow_ids() -> None:
    ids, positions, types, *tables = _inputs(12, 8, torch.float32, "cpu")[:8]
    flat = functional.embedding(ids, positions, types, *tables)
    shaped = functional.embedding(*(t.view(3, 4).int() for t in (ids, positions, types)), *tables)
    assert torch.equal(shaped, flat.view(3, 4, 8))
