"""linear_cross_entropy_fwd, linear_cross_entropy_bwd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels.cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd
from tests.oracle import assert_operator_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _inputs(M: int, N: int, V: int, dtype: torch.dtype, device: str = "cpu", with_bias: bool = True) -> list:
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((M, N), (V, N), (V,)))
    labels = torch.randint(0, V, (M,), device=device)
    labels[1::3] = -100
    return [x.to(dtype), (weight * N**-0.5).to(dtype), bias.to(dtype) if with_bias else None, labels, -100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("M", "N", "V"), [(1, 64, 591), (37, 48, 1000), (0, 8, 10)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(M: int, N: int, V: int, dtype: torch.dtype, with_bias: bool, device: str) -> None:
    x, weight, bias, labels, ignore = forward = _inputs(M, N, V, dtype, device, with_bias)
    assert_operator_accurate(linear_cross_entropy_fwd, reference.linear_cross_entropy, forward)
    loss, lse = reference.linear_cross_entropy(*forward)
    backward = [torch.rand_like(loss), x, weight, bias, labels, lse, ignore]
    assert_operator_accurate(linear_cross_entropy_bwd, reference.linear_cross_entropy_backward, backward, factor=4.0)


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_and_pytorch(with_bias: bool) -> None:
    x, weight, bias, labels, ignore = _inputs(7, 4, 11, torch.float64, with_bias=with_bias)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    arguments = [x, weight, bias, labels, ignore]
    assert torch.autograd.gradcheck(
        lambda *a: linear_cross_entropy_fwd(*a, *([] if with_bias else [None]), labels, ignore)[0], leaves
    )
    actual = functional.linear_cross_entropy(*arguments[:4])
    expected = F.cross_entropy(F.linear(x, weight, bias), labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many rows of logits exist at a time."""

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        x, weight, bias, labels, _ = _inputs(29, 6, 17, torch.float64)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        loss = functional.linear_cross_entropy(*leaves, labels)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    whole = run()
    chunks = [slice(0, 5), slice(5, 6), slice(6, 29)]
    monkeypatch.setattr(reference, "_row_chunks", lambda rows, vocabulary: chunks)
    torch.testing.assert_close(run(), whole)


def test_chunks_cover_all_rows() -> None:
    for rows, vocabulary in ((1, 10), (5000, 30522), (4397, 30522), (3, 2**27)):
        chunks = reference._row_chunks(rows, vocabulary)
        assert [i for c in chunks for i in range(*c.indices(rows))] == list(range(rows))


def test_num_items_and_ignored_rows() -> None:
    x, weight, bias, labels, _ = _inputs(9, 4, 11, torch.float64)
    counted = int((labels != -100).sum())
    assert 0 < counted < 9
    mean = functional.linear_cross_entropy(x, weight, bias, labels)
    torch.testing.assert_close(
        functional.linear_cross_entropy(x, weight, bias, labels, num_items=100), mean * counted / 100
    )
    other = torch.where(labels == -100, 10, labels)
    torch.testing.assert_close(
        functional.linear_cross_entropy(x, weight, bias, labels.where(labels != -100, 7), ignore_index=7),
        F.cross_entropy(F.linear(x, weight, bias), labels.where(labels != -100, 7), ignore_index=7),
    )
    assert functional.linear_cross_entropy(x, weight, bias, other) != mean
    assert functional.linear_cross_entropy(x, weight, bias, torch.full((9,), -100)).isnan()


def test_registration() -> None:
    x, weight, bias, labels, ignore = forward = _inputs(5, 8, 12, torch.float32)
    loss, lse = reference.linear_cross_entropy(*forward)
    torch.library.opcheck(linear_cross_entropy_bwd, [torch.rand_like(loss), x, weight, bias, labels, lse, ignore])
    torch.library.opcheck(linear_cross_entropy_fwd, [*(t.requires_grad_() for t in (x, weight, bias)), labels, ignore])
    torch.library.opcheck(linear_cross_entropy_fwd, [x, weight, None, labels, ignore])
