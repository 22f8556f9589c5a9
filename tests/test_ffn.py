"""linear_gelu_fwd, feed_forward_fwd, gelu_bwd."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gelu import DTYPES as GELU_DTYPES
from bench.gelu import FORMS, errors
from fastbert import functional, reference
from fastbert.kernels import _cpu, _launch
from fastbert.kernels.ffn import feed_forward_fwd, gelu_bwd, linear_gelu_fwd
from tests.optional import given, settings, st
from tests.oracle import assert_operator_accurate, far_rows, opcheck

pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _inputs(M: int, K: int, N: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, weight, bias, out_weight."""
    x, weight, bias, out_weight = (torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,), (K, N)))
    return [x.to(dtype), (weight * K**-0.5).to(dtype), bias.to(dtype), (out_weight * N**-0.5).to(dtype)]


def _backward_inputs(M: int, N: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """dy, pre."""
    return [torch.randn(M, N, device=device).to(dtype), (3 * torch.randn(M, N, device=device)).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 768, 33), (31, 64, 256), (67, 48, 300), (0, 8, 8)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(M: int, K: int, N: int, dtype: torch.dtype, approximate: str, device: str) -> None:
    x, weight, bias, out_weight = _inputs(M, K, N, dtype, device)
    for keep_pre in (True, False):
        rest = approximate, keep_pre
        assert_operator_accurate(linear_gelu_fwd, reference.linear_gelu, [x, weight, bias, *rest])
        assert_operator_accurate(feed_forward_fwd, reference.feed_forward, [x, weight, bias, out_weight, *rest])
    for keep_y in (True, False):
        backward = [*_backward_inputs(M, N, dtype, device), approximate, keep_y]
        assert_operator_accurate(gelu_bwd, reference.gelu_backward, backward, factor=4.0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_and_pytorch(approximate: str) -> None:
    leaves = [t.requires_grad_() for t in _inputs(4, 5, 3, torch.float64)]
    pairs = (
        (functional.linear_gelu, lambda *a: F.gelu(F.linear(*a), approximate=approximate), leaves[:3]),
        (
            functional.feed_forward,
            lambda x, weight, bias, out: F.linear(F.gelu(F.linear(x, weight, bias), approximate=approximate), out),
            leaves,
        ),
    )
    for function, pytorch, given_ in pairs:
        assert torch.autograd.gradcheck(lambda *a, f=function: f(*a, approximate=approximate), given_)
        actual, expected = function(*given_, approximate=approximate), pytorch(*given_)
        torch.testing.assert_close(actual, expected)
        dy = torch.randn_like(expected)
        torch.testing.assert_close(torch.autograd.grad(actual, given_, dy), torch.autograd.grad(expected, given_, dy))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3])
def test_all_gradients_in_all_dtypes(dtype: torch.dtype, frozen: int | None, device: str) -> None:
    """Through autograd, with one input that needs none."""
    leaves = _inputs(37, 24, 300, dtype, device)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    dy = torch.randn(37, 24, device=device)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def gradients(function, dtype: torch.dtype) -> list[Tensor]:
        copies = [leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for leaf in leaves]
        function(*copies).backward(dy.to(dtype))
        assert frozen is None or copies[frozen].grad is None
        return [copy.grad for copy in copies if copy.grad is not None]

    def pytorch(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, weight, bias)), out_weight)

    actual, naive = gradients(functional.feed_forward, dtype), gradients(pytorch, dtype)
    exact = gradients(pytorch, torch.float64)
    assert len(actual) == len(wanted)
    for a, n, e in zip(actual, naive, exact, strict=True):
        assert_operator_accurate(lambda a=a: a, lambda e=e: e, [], naive=lambda n=n: n, factor=4.0)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_derivative_far_out(approximate: str) -> None:
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None].requires_grad_()
    (expected,) = torch.autograd.grad(F.gelu(z, approximate=approximate).sum(), z)
    for bwd in (gelu_bwd, reference.gelu_backward):
        actual, _, _ = bwd(torch.ones_like(z), z.detach(), approximate, False)
        torch.testing.assert_close(actual, expected, atol=1e-14, rtol=1e-12)


@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="of the kernels: needs TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("dtype", GELU_DTYPES)
@pytest.mark.parametrize("approximate", FORMS)
def test_error_of_every_value(dtype: str, approximate: str) -> None:
    """Every float16 and bfloat16 there is, and a grid of float32: `python -m bench gelu` prints these."""
    error = errors(dtype, approximate)
    wide = dtype == "float32"
    assert error.value < (6e-7 if wide else 1.3e-5)
    assert error.relative < (2e-5 if wide else 8e-5)  # in float32 the square of x is rounded, and exp shows that
    assert error.slope < (2.5e-6 if wide else 3.6e-5)


def test_rows_of_wider_tensors(device: str) -> None:
    x, weight, bias, out_weight = _inputs(9, 48, 40, torch.float32, device)
    x, weight, out_weight = (
        torch.cat((t, torch.full_like(t, float("nan"))), 1)[:, : t.shape[1]] for t in (x, weight, out_weight)
    )
    arguments = [x, weight, bias, out_weight, "none", True]
    assert_operator_accurate(feed_forward_fwd, reference.feed_forward, arguments)
    dy, pre = _backward_inputs(9, 40, torch.float32, device)
    dy = torch.cat((dy, torch.full_like(dy, float("nan"))), 1)[:, :40]
    assert_operator_accurate(gelu_bwd, reference.gelu_backward, [dy, pre, "none", True], factor=4.0)


def test_offsets_beyond_32_bits() -> None:
    dy, pre = _backward_inputs(4, 32, torch.float16)
    expected = gelu_bwd(dy, pre, "none", True)
    torch.testing.assert_close(gelu_bwd(far_rows(dy), pre, "none", True), expected)


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU takes them: 33 rows, five at a time."""
    monkeypatch.setattr(_cpu, "CHUNK", 5 * 96)
    backward = [*_backward_inputs(33, 96, torch.bfloat16), "none", True]
    assert_operator_accurate(gelu_bwd, reference.gelu_backward, backward, factor=4.0)


def test_more_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "chip", lambda device: _launch.Chip((8, 0), 1))
    backward = [*_backward_inputs(203, 520, torch.float32), "none", True]
    assert_operator_accurate(gelu_bwd, reference.gelu_backward, backward, factor=4.0)


def test_two_runs_are_bitwise_equal(device: str) -> None:
    backward = [*_backward_inputs(200, 96, torch.bfloat16, device), "none", True]
    for first, second in zip(gelu_bwd(*backward), gelu_bwd(*backward), strict=True):
        assert torch.equal(first, second)


@given(
    M=st.integers(0, 40),
    K=st.integers(1, 40),
    N=st.integers(8, 530),  # of one or two sums of many rows, plain PyTorch may have each right by chance
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    approximate=st.sampled_from(["none", "tanh"]),
)
@settings(max_examples=12, deadline=None)
def test_any_size(M: int, K: int, N: int, dtype: torch.dtype, approximate: str) -> None:
    torch.manual_seed(N)
    forward = [*_inputs(M, K, N, dtype), approximate, True]
    assert_operator_accurate(feed_forward_fwd, reference.feed_forward, forward)
    backward = [*_backward_inputs(M, N, dtype), approximate, True]
    assert_operator_accurate(gelu_bwd, reference.gelu_backward, backward, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_one_row_of_one_feature(dtype: torch.dtype) -> None:
    near = max(4 * torch.finfo(dtype).eps, 2e-6)
    for operator, specification, inputs in (
        (feed_forward_fwd, reference.feed_forward, _inputs(1, 1, 1, dtype)),
        (gelu_bwd, reference.gelu_backward, _backward_inputs(1, 1, dtype)),
    ):
        for actual, expected in zip(operator(*inputs, "none", True), specification(*inputs, "none", True), strict=True):
            torch.testing.assert_close(actual, expected, rtol=near, atol=near)


@given(st.lists(st.floats(-30, 30, width=16), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_gelu_of_x_and_of_minus_x_differ_by_x(values: list[float]) -> None:
    """x Phi(x) - (-x) Phi(-x) = x."""
    pre = torch.tensor([values, [-v for v in values]])
    _, _, y = gelu_bwd(torch.ones_like(pre), pre, "none", True)
    torch.testing.assert_close(y[0] - y[1], pre[0], atol=1e-6, rtol=1e-6)


def test_registration() -> None:
    x, weight, bias, out_weight = _inputs(4, 8, 6, torch.float32)
    opcheck(gelu_bwd, [torch.randn(4, 6), torch.randn(4, 6), "none", True])
    opcheck(linear_gelu_fwd, [x, weight, bias, "tanh", False])
    opcheck(feed_forward_fwd, [x, weight, bias, out_weight, "tanh", False])
    leaves = [t.requires_grad_() for t in (x, weight, bias, out_weight)]
    opcheck(linear_gelu_fwd, [*leaves[:3], "none", True])
    opcheck(feed_forward_fwd, [*leaves, "none", True])


@pytest.mark.plain
def test_compiles_into_one_graph() -> None:
    leaves = [t.requires_grad_() for t in _inputs(6, 8, 16, torch.float32)]
    compiled = torch.compile(functional.feed_forward, fullgraph=True, backend="aot_eager")
    expected = functional.feed_forward(*leaves)
    torch.testing.assert_close(compiled(*leaves), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves).sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
    )


@pytest.mark.parametrize("name", ["linear_gelu", "feed_forward"])
def test_pre_is_kept_only_where_a_gradient_needs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    operator = getattr(functional, f"{name}_fwd")
    monkeypatch.setattr(functional, f"{name}_fwd", lambda *a: kept.append(a[-1]) or operator(*a))
    function = getattr(functional, name)
    x, weight, bias, *out_weight = _inputs(4, 8, 6, torch.float32)[: 3 if name == "linear_gelu" else 4]
    function(x, weight, bias, *out_weight)
    function(x, weight, bias.requires_grad_(), *out_weight).sum().backward()
    with torch.no_grad():
        function(x, weight, bias, *out_weight)
    assert kept == [False, True, False]
    assert bias.grad is not None


def test_gelu_itself_is_not_kept() -> None:
    """Of a feed-forward: x and pre."""
    leaves = [t.requires_grad_() for t in _inputs(50, 16, 64, torch.float32)]
    kept: dict[int, int] = {}
    parameters = {t.data_ptr() for t in leaves[1:]}

    def keep(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = functional.feed_forward(*leaves)
    assert sorted(kept.values()) == [50 * 16, 50 * 64]
    out.sum().backward()


def test_bad_input_is_named() -> None:
    x, weight, bias, out_weight = _inputs(4, 8, 6, torch.float32)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh', but is 'erf'"):
        functional.feed_forward(x, weight, bias, out_weight, approximate="erf")
    with pytest.raises(ValueError, match=r"out_weight is \(8, 5\), not \(_, 6\)"):
        functional.feed_forward(x, weight, bias, out_weight[:, :5])
