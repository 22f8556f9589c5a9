"""linear_gelu_fwd, gelu_bwd."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import functional, reference
from fastbert.kernels.ffn import gelu_bwd, linear_gelu_fwd
from tests.oracle import assert_operator_accurate

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _inputs(M: int, K: int, N: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,)))
    return [x.to(dtype), (weight * K**-0.5).to(dtype), bias.to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 768, 33), (31, 64, 256), (0, 8, 8)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(M: int, K: int, N: int, dtype: torch.dtype, approximate: str, device: str) -> None:
    tensors = _inputs(M, K, N, dtype, device)
    for keep_pre in (True, False):
        assert_operator_accurate(linear_gelu_fwd, reference.linear_gelu, [*tensors, approximate, keep_pre])
    pre = (3 * torch.randn(M, N, device=device)).to(dtype)
    assert_operator_accurate(gelu_bwd, reference.gelu_backward, [torch.randn_like(pre), pre, approximate], factor=4.0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_and_pytorch(approximate: str) -> None:
    leaves = [t.requires_grad_() for t in _inputs(4, 5, 3, torch.float64)]
    assert torch.autograd.gradcheck(lambda *a: functional.linear_gelu(*a, approximate=approximate), leaves)
    actual = functional.linear_gelu(*leaves, approximate=approximate)
    expected = F.gelu(F.linear(*leaves), approximate=approximate)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_derivative_far_out(approximate: str) -> None:
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None].requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(z, approximate=approximate).sum(), z)
    for bwd in (gelu_bwd, reference.gelu_backward):
        actual, _ = bwd(torch.ones_like(z), z.detach(), approximate)
        torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-12)


def test_registration() -> None:
    tensors = _inputs(4, 8, 6, torch.float32)
    torch.library.opcheck(gelu_bwd, [torch.randn(4, 6), torch.randn(4, 6), "none"])
    torch.library.opcheck(linear_gelu_fwd, [*tensors, "tanh", False])
    torch.library.opcheck(linear_gelu_fwd, [*(t.requires_grad_() for t in tensors), "none", True])


def test_pre_is_kept_only_where_a_gradient_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    operator = functional.linear_gelu_fwd
    monkeypatch.setattr(functional, "linear_gelu_fwd", lambda *a: kept.append(a[-1]) or operator(*a))
    x, weight, bias = _inputs(4, 8, 6, torch.float32)
    functional.linear_gelu(x, weight, bias)
    functional.linear_gelu(x, weight, bias.requires_grad_()).sum().backward()
    with torch.no_grad():
        functional.linear_gelu(x, weight, bias)
    assert kept == [False, True, False]
    assert bias.grad is not None
