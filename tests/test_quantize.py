"""Rows as int8: alone, behind a GELU (quantize_rows_fwd), and behind a LayerNorm (layer_norm_int8_fwd)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels.quantize import layer_norm_int8_fwd, quantize_rows_fwd
from tests.optional import given, settings, st
from tests.oracle import assert_accurate, far_rows, opcheck, to_float64

pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 768), (7, 1024), (5, 1), (3, 130), (9, 384), (2, 8191), (0, 8)]


def assert_quantized(q: Tensor, scale: Tensor, naive: Tensor, exact_q: Tensor, exact: Tensor, h: Tensor) -> None:
    """Scales by the three-way oracle; whole numbers are the exact ones but where those are next to a half.

    h: (M, N) float64, what was quantised, exactly.
    """
    assert_accurate(scale, naive, exact)
    assert q.dtype == torch.int8
    place = h / exact[:, None]
    near = 0.5 + 127 * 1e-3 * (1 if scale.dtype == torch.float32 else 1e-6)
    assert ((q.double() - place).abs() <= near).all()
    clear = ((place - place.floor()) - 0.5).abs() > near - 0.5
    assert torch.equal(q[clear], exact_q[clear])
    if q.numel():
        assert (q.abs().amax(-1) == 127).all() or (h == 0).all(-1).any()


def check_rows(x: Tensor, gelu: str | None) -> None:
    q, scale = quantize_rows_fwd(x, gelu)
    _, naive = reference.quantize_rows(x, gelu)
    exact_q, exact = reference.quantize_rows(x.double(), gelu)
    h = x.double() if gelu is None else torch.nn.functional.gelu(x.double(), approximate=gelu)
    assert_quantized(q, scale, naive, exact_q, exact, h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize(("M", "N"), SHAPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_rows(M: int, N: int, gelu: str | None, dtype: torch.dtype, device: str) -> None:
    x = 3 * torch.randn(M, N, device=device)
    check_rows((x.abs() if N == 1 else x).to(dtype), gelu)  # PyTorch's own gelu(-5) has no digit in float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("M", "N"), SHAPES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_layer_norm(M: int, N: int, with_residual: bool, dtype: torch.dtype, device: str) -> None:
    x, residual = torch.randn(2, M, N, device=device).to(dtype).unbind()
    x_bias, weight, bias = torch.randn(3, N, device=device).to(dtype).unbind()
    arguments: list[Any] = [x, x_bias if with_residual else None, residual if with_residual else None, weight, bias]
    arguments.append(1e-12 if N > 1 else 1.0)
    y, q, scale = layer_norm_int8_fwd(*arguments)
    naive_y, _, naive = reference.layer_norm_int8(*arguments)
    exact_y, exact_q, exact = reference.layer_norm_int8(*map(to_float64, arguments))
    assert_accurate(y, naive_y, exact_y)
    assert_quantized(q, scale, naive, exact_q, exact, exact_y)


def test_layer_norm_is_the_plain_one_and_its_rows(device: str) -> None:
    x, residual = torch.randn(2, 5, 96, device=device).unbind()
    weight, bias, x_bias = torch.randn(3, 96, device=device).unbind()
    options = {"residual": residual, "x_bias": x_bias, "eps": 1e-5}
    y, q, scale = functional.layer_norm_int8(x, weight, bias, **options)
    torch.testing.assert_close(y, functional.layer_norm(x, weight, bias, **options))
    expected_q, expected_scale = functional.quantize_rows(y)
    torch.testing.assert_close(scale, expected_scale)
    assert (q.int() - expected_q.int()).abs().max() <= 1


@pytest.mark.parametrize("N", [16, 24, 768])
def test_rounds_to_even(N: int, device: str) -> None:
    x = torch.zeros(1, N, device=device)
    x[0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    q, scale = quantize_rows_fwd(x, None)
    assert scale.tolist() == [1.0]
    assert q[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    q, _ = quantize_rows_fwd(-x, None)
    assert q[0, :8].tolist() == [-127, 0, -2, -2, 0, 2, 2, -126]


@pytest.mark.parametrize("N", [16, 48, 768])
def test_zeros_the_smallest_and_the_largest(N: int, device: str) -> None:
    values = [0.0, 1e-45, 1e-38, 3e38]
    x = torch.tensor(values, device=device)[:, None].repeat(1, N)
    q, scale = quantize_rows_fwd(x, None)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    torch.testing.assert_close(q * scale[:, None], x, atol=1e-31, rtol=1e-2)
    assert not q[0].any()


@pytest.mark.parametrize("place", [0, 15, 47])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost(value: float, place: int, device: str) -> None:
    x = torch.randn(3, 48, device=device)
    x[1, place] = value
    _, scale = quantize_rows_fwd(x, None)
    assert torch.isfinite(scale).tolist() == [True, False, True]


def test_rows_of_wider_tensors_and_beyond_32_bits(device: str) -> None:
    x = torch.randn(5, 40, device=device)
    expected = quantize_rows_fwd(x, "none")
    wide = torch.full((5, 60), float("nan"), device=device)
    wide[:, 7:47] = x
    for view in (wide[:, 7:47], *([far_rows(x)] if device == "cpu" else [])):
        for actual, e in zip(quantize_rows_fwd(view, "none"), expected, strict=True):
            assert torch.equal(actual, e)


@given(M=st.integers(0, 20), N=st.integers(1, 300), dtype=st.sampled_from(DTYPES[1:]), power=st.integers(-12, 12))
@settings(max_examples=15, deadline=None)
def test_any_size(M: int, N: int, dtype: torch.dtype, power: int) -> None:
    torch.manual_seed(N)
    check_rows((torch.randn(M, N) * 2.0**power).to(dtype), None)


def test_functional(device: str) -> None:
    x = torch.randn(2, 3, 16, device=device, requires_grad=True)
    q, scale = functional.quantize_rows(x)
    assert (q.shape, scale.shape, scale.requires_grad) == (x.shape, (2, 3), False)
    assert ((q * scale[..., None] - x).abs() <= 0.501 * scale[..., None]).all()
    with pytest.raises(ValueError, match="approximate must be"):
        functional.quantize_rows(x, gelu="erf")
    with pytest.raises(ValueError, match="there must be 1 to 8192 features"):
        functional.quantize_rows(x[..., :0])
    with pytest.raises(ValueError, match=r"x_bias is \(3,\), not \(16,\)"):
        functional.layer_norm_int8(x, x[0, 0], x[0, 0], x_bias=x[0, 0, :3])


def test_registration() -> None:
    x, residual = torch.randn(2, 4, 24).unbind()
    vector = torch.randn(24)
    for gelu in (None, "tanh"):
        opcheck(quantize_rows_fwd, [x, gelu])
    opcheck(layer_norm_int8_fwd, [x, vector, residual, vector, vector, 1e-12])
    opcheck(layer_norm_int8_fwd, [x.half(), None, None, vector, vector, 1e-12])
