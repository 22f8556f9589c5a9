"""layer_norm_fwd, layer_norm_bwd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels import _cpu
from fastbert.kernels.layer_norm import layer_norm_bwd, layer_norm_fwd
from tests.optional import given, settings, st
from tests.oracle import assert_accurate, assert_operator_accurate, far_rows, opcheck, to_float64

EPS = 1e-12  # BERT's own
pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 768), (7, 1024), (33, 100), (4, 6), (0, 64)]


def _forward_inputs(M: int, N: int, dtype: torch.dtype, device: str, parts: str, dropout_p: float = 0.0) -> list:
    """x has a mean worth subtracting. "mixed" is what autocast makes: float32 but for x."""
    x, residual = torch.randn(2, M, N, device=device) + 3.0
    x_bias, weight, bias = torch.randn(3, N, device=device)
    wide = torch.float32 if parts == "mixed" and dtype.itemsize == 2 else dtype
    seed = torch.tensor(-1234567890123, device=device) if dropout_p else None
    return [
        x.to(dtype),
        None if parts == "plain" else x_bias.to(wide),
        None if parts == "plain" else residual.to(wide),
        weight.to(wide),
        bias.to(wide),
        EPS,
        dropout_p,
        seed,
        5,
    ]


def _backward_inputs(M: int, N: int, dtype: torch.dtype, device: str, parts: str, dropout_p: float) -> list:
    x, x_bias, residual, weight, _bias, *rest = forward = _forward_inputs(M, N, dtype, device, parts, dropout_p)
    y, mean, rstd = reference.layer_norm(*forward)
    return [torch.randn_like(y), x, x_bias, residual, weight, mean, rstd, *rest[1:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", ["all", "plain", "mixed"])
@pytest.mark.parametrize(("M", "N"), SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(M: int, N: int, dtype: torch.dtype, parts: str, dropout_p: float, device: str) -> None:
    forward = _forward_inputs(M, N, dtype, device, parts, dropout_p)
    assert_operator_accurate(layer_norm_fwd, reference.layer_norm, forward)
    backward = _backward_inputs(M, N, dtype, device, parts, dropout_p)
    if parts == "mixed" and dtype.itemsize == 2 and not dropout_p:
        # The exact one has one dtype, where dresidual is dx and is not returned: compare with that.
        (dx, dresidual, *rest), exact = (
            layer_norm_bwd(*backward),
            reference.layer_norm_backward(*map(to_float64, backward)),
        )
        naive = reference.layer_norm_backward(*backward)
        for actual, n, e in zip((dx, dresidual, *rest), naive, (exact[0], exact[0], *exact[2:]), strict=True):
            assert_accurate(actual, n, e, factor=4.0)
        return
    assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, backward, factor=4.0)


@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", ["all", "mixed"])
def test_rows_in_chunks(dtype: torch.dtype, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU takes them: 33 rows, five at a time."""
    monkeypatch.setattr(_cpu, "CHUNK", 5 * 96)
    forward = _forward_inputs(33, 96, dtype, "cpu", parts, 0.1)
    backward = _backward_inputs(33, 96, dtype, "cpu", parts, 0.1)
    for numbers in ([], [torch.randperm(99)[:33]]):
        assert_operator_accurate(layer_norm_fwd, reference.layer_norm, [*forward, *numbers])
        assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, [*backward, *numbers], factor=4.0)


@pytest.mark.parametrize("N", [1, 15, 17, 255, 384, 1536, 4096, 8192])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.usefixtures("poisoned_allocations")
def test_any_hidden_size(N: int, dropout_p: float, device: str) -> None:
    """And more rows than the backward has programs."""
    forward = _forward_inputs(19 if N < 2000 else 4, N, torch.float32, device, "all", dropout_p)
    if N == 1:
        forward[5] = 1.0  # the variance is 0: without an eps of some size the gradient is rounding alone
    assert_operator_accurate(layer_norm_fwd, reference.layer_norm, forward)
    x, x_bias, residual, weight, _bias, *rest = forward
    y, mean, rstd = reference.layer_norm(*forward)
    backward = [torch.randn_like(y), x, x_bias, residual, weight, mean, rstd, *rest[1:]]
    assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, backward, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("N", [48, 768])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.usefixtures("poisoned_allocations")
def test_numbers_of_a_subset_of_rows(dtype: torch.dtype, N: int, dropout_p: float, device: str) -> None:
    """Some rows of a larger tensor, in any order, one of them twice: each with the mask that it has there."""
    rows = torch.tensor([30, 2, 2**32 - 1, 2, 0, 19, 2**31, 5, 7], device=device)
    forward = [*_forward_inputs(9, N, dtype, device, "all", dropout_p), rows]
    assert_operator_accurate(layer_norm_fwd, reference.layer_norm, forward)
    backward = [*_backward_inputs(9, N, dtype, device, "all", dropout_p), rows]
    backward[5:7] = reference.layer_norm(*forward)[1:]
    backward[1:5] = forward[:4]
    assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, backward, factor=4.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_subset_of_rows_equals_those_rows_of_the_whole(dropout_p: float, device: str) -> None:
    x, x_bias, residual, weight, bias, *_ = _forward_inputs(40, 72, torch.float32, device, "all")
    options = {"x_bias": x_bias, "dropout_p": dropout_p, "seed": torch.tensor(7, device=device), "stream": 2}
    rows = torch.tensor([39, 0, 3, 17, 3], device=device)
    leaves = [t.requires_grad_() for t in (x, residual, x_bias, weight, bias)]
    whole = functional.layer_norm(x, weight, bias, residual=residual, **options)[rows]
    some = functional.layer_norm(x[rows], weight, bias, residual=residual[rows], rows=rows, **options)
    torch.testing.assert_close(some, whole, atol=1e-6, rtol=1e-6)
    dy = torch.randn_like(some)
    actual, expected = (torch.autograd.grad(y, leaves, dy) for y in (some, whole))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for wrong in (rows[1:], rows.int()):
        with pytest.raises(ValueError, match=r"rows is .*, not \(5,\) int64"):
            functional.layer_norm(x[rows], weight, bias, rows=wrong)


def test_rows_of_a_wider_tensor(device: str) -> None:
    forward = _forward_inputs(9, 48, torch.float32, device, "all", 0.1)
    for i, copies in ((0, 1), (2, 2)):
        forward[i] = torch.cat((forward[i], *[torch.full_like(forward[i], float("nan"))] * copies), dim=1)[:, :48]
    assert_operator_accurate(layer_norm_fwd, reference.layer_norm, forward)
    y, mean, rstd = reference.layer_norm(*forward)
    dy = torch.cat((y, y.new_full(y.shape, float("nan"))), dim=1)[:, :48]
    backward = [dy, *forward[:4], mean, rstd, *forward[6:]]
    assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, backward, factor=4.0)


def test_offsets_beyond_32_bits() -> None:
    forward = _forward_inputs(4, 32, torch.float16, "cpu", "all")
    expected = layer_norm_fwd(*forward)
    forward[0] = far_rows(forward[0])
    for actual, e in zip(layer_norm_fwd(*forward), expected, strict=True):
        assert torch.equal(actual, e)


@pytest.mark.plain
def test_two_runs_are_bitwise_equal(device: str) -> None:
    backward = _backward_inputs(40, 96, torch.float32, device, "all", 0.1)
    for first, second in zip(layer_norm_bwd(*backward), layer_norm_bwd(*backward), strict=True):
        assert torch.equal(first, second)


@pytest.mark.plain
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("parts", ["all", "plain"])
def test_gradcheck(parts: str, dropout_p: float) -> None:
    arguments = _forward_inputs(3, 5, torch.float64, "cpu", parts, dropout_p)
    tensors = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(lambda *a: layer_norm_fwd(*a)[0], tensors)


def test_registration() -> None:
    for parts, dropout_p in (("all", 0.1), ("plain", 0.0), ("mixed", 0.0)):
        forward = _forward_inputs(5, 32, torch.float32, "cpu", parts, dropout_p)
        for a in forward[:5]:
            if a is not None:
                a.requires_grad_()
        opcheck(layer_norm_fwd, forward)
        backward = _backward_inputs(5, 32, torch.float32, "cpu", parts, dropout_p)
        opcheck(layer_norm_bwd, backward)
        rows = torch.tensor([3, 3, 9, 0, 1])
        opcheck(layer_norm_fwd, [*forward, rows])
        opcheck(layer_norm_bwd, [*backward, rows])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_equals_pytorch(dropout_p: float) -> None:
    """Not our own formulas: F.layer_norm and autograd, with the mask given."""
    arguments = _forward_inputs(9, 24, torch.float64, "cpu", "all", dropout_p)
    leaves = [a.requires_grad_() for a in arguments[:5]]
    x, x_bias, residual, weight, bias = leaves
    keep = torch.ones(9, 24, dtype=torch.bool)
    if dropout_p:
        (keep,) = reference.keep_mask(1, 0, 9, 24, dropout_p, arguments[7], 5)
    h = (x + x_bias) * keep * 256 / (256 - round(256 * dropout_p)) + residual
    expected = F.layer_norm(h, (24,), weight, bias, EPS)
    actual, *_ = layer_norm_fwd(*arguments)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy))


def test_second_derivatives_raise() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = functional.layer_norm(x, torch.ones(8), torch.zeros(8))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="layer_norm_bwd has no derivative"):
        dx.sum().backward()


def test_rows_may_be_strided() -> None:
    x, residual = torch.randn(2, 6, 64)
    weight, bias = torch.randn(2, 64)
    torch.testing.assert_close(
        functional.layer_norm(x[::2], weight, bias, residual=residual[::2]),
        functional.layer_norm(x, weight, bias, residual=residual)[::2],
    )


@given(M=st.integers(1, 5), N=st.integers(2, 200), shift=st.floats(-8, 8))
@settings(max_examples=25, deadline=None)
def test_a_constant_shift_changes_nothing(M: int, N: int, shift: float) -> None:
    x = torch.randn(M, N, dtype=torch.float64)
    ones, zeros = torch.ones(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    torch.testing.assert_close(
        functional.layer_norm(x + shift, ones, zeros), functional.layer_norm(x, ones, zeros), atol=1e-6, rtol=1e-6
    )


@given(
    M=st.integers(0, 20),
    N=st.integers(8, 70),  # with two features the gradient is what rounding leaves of 0
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    parts=st.sampled_from(["all", "plain"]),
    dropout_p=st.sampled_from([0.0, 0.1]),
)
@settings(max_examples=8, deadline=None)
def test_any_size(M: int, N: int, dtype: torch.dtype, parts: str, dropout_p: float) -> None:
    torch.manual_seed(N)
    forward = _forward_inputs(M, N, dtype, "cpu", parts, dropout_p)
    assert_operator_accurate(layer_norm_fwd, reference.layer_norm, forward)
    x, x_bias, residual, weight, _bias, *rest = forward
    y, mean, rstd = reference.layer_norm(*forward)
    backward = [torch.randn_like(y), x, x_bias, residual, weight, mean, rstd, *rest[1:]]
    assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, backward, factor=4.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.usefixtures("poisoned_allocations")
def test_a_bias_without_a_residual_and_a_residual_without_a_bias(dropout_p: float, device: str) -> None:
    for i in (1, 2):
        forward = _forward_inputs(19, 48, torch.float32, device, "all", dropout_p)
        forward[i] = None
        assert_operator_accurate(layer_norm_fwd, reference.layer_norm, forward)
        x, x_bias, residual, weight, _bias, *rest = forward
        y, mean, rstd = reference.layer_norm(*forward)
        backward = [torch.randn_like(y), x, x_bias, residual, weight, mean, rstd, *rest[1:]]
        assert_operator_accurate(layer_norm_bwd, reference.layer_norm_backward, backward, factor=4.0)
