"""linear_int8_fwd: a product of int8 with scales, bias and GELU behind it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels import _launch, _product, linear_int8
from fastbert.kernels._product import Product, Tiles
from fastbert.kernels.linear_int8 import default_tiles, linear_int8_fwd
from tests.optional import given, needs, settings, st
from tests.oracle import assert_accurate, far_rows, opcheck, to_float64

pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TILES = Tiles(32, 64, 32, 4, 2, GROUP_M=2)  # small, so that there are several; and two groups of rows


def _inputs(M: int, K: int, N: int, dtype: torch.dtype, device: str = "cpu", with_bias: bool = True) -> list[Any]:
    x, weight = (torch.randint(-127, 128, (rows, K), dtype=torch.int8, device=device) for rows in (M, N))
    x_scale, weight_scale = (torch.rand(rows, device=device).add_(0.1) / 127 for rows in (M, N))
    bias = torch.randn(N, device=device).to(dtype) if with_bias else None
    return [x, x_scale, weight, weight_scale * K**-0.5, bias]


def check(arguments: list[Any], gelu: str | None, dtype: torch.dtype) -> None:
    actual = linear_int8_fwd(*arguments, gelu, dtype)
    naive = reference.linear_int8(*arguments, gelu, dtype)
    exact = reference.linear_int8(*map(to_float64, arguments), gelu, torch.float64)
    assert actual.dtype == dtype
    assert_accurate(actual, naive, exact)


def _use(monkeypatch: pytest.MonkeyPatch, x: Tensor, weight: Tensor, gelu: str | None, tiles: Tiles = TILES) -> None:
    capability = _launch.chip(x.device).capability
    entries = {Product(capability, torch.int8, gelu, *weight.shape, rows): tiles for rows in (1, 4, 16, 64)}
    monkeypatch.setattr(_product, "TILES", entries)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gelu", [None, "none", "tanh"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 768, 33), (75, 48, 136), (100, 112, 264), (37, 7, 1), (0, 8, 8)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(
    M: int, K: int, N: int, gelu: str | None, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _inputs(M, K, N, dtype, device, with_bias=gelu is None)
    _use(monkeypatch, arguments[0], arguments[2], gelu)
    check(arguments, gelu, dtype)


@needs("triton")
def test_rows_that_begin_anywhere_have_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has no registers for the bytes of a large one."""
    launched = []
    monkeypatch.setattr(_launch, "launch", lambda kernel, grid, *args, **meta: launched.append(meta["BLOCK_M"]))
    large, small = default_tiles(_launch.chip(torch.device("cpu"))).M, linear_int8.BYTEWISE.M
    for K, start in ((64, 0), (64, 16), (64, 3), (72, 0)):
        x, x_scale, weight, weight_scale, bias = _inputs(200, 128, 140, torch.float32)
        x, weight = (
            t[:, start : start + K].contiguous() if start == 0 else t[:, start : start + K] for t in (x, weight)
        )
        linear_int8._launch_fwd(x, x_scale, weight, weight_scale, bias, None, torch.float32)
    assert launched == [large, large, small, small]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_tiles_of_a_call(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    chip = _launch.Chip(capability, 3)
    monkeypatch.setattr(_launch, "chip", lambda device: chip)
    assert (128 if capability == (9, 0) else 64) == default_tiles(chip).K
    check(_inputs(131, 208, 140, torch.float32), None, torch.float32)


def test_sums_are_exact(device: str) -> None:
    """Where float32 could not hold them, and where all are as large as can be."""
    K = 4099
    x, weight = (torch.randint(-127, 128, (rows, K), dtype=torch.int8, device=device) for rows in (5, 17))
    x[0] = weight[0] = -127
    ones = torch.ones(17, device=device)
    y = linear_int8_fwd(x, ones[:5], weight, ones, None, None, torch.float32)
    exact = F.linear(x.double(), weight.double())
    assert torch.equal(y, exact.float())
    assert y[0, 0] == 127 * 127 * K > 2**24


def test_scales_belong_to_rows_and_channels(device: str) -> None:
    x, _, weight, *_ = _inputs(6, 24, 9, torch.float32, device)
    x_scale, weight_scale = torch.arange(6.0, device=device), torch.arange(9.0, device=device)
    y = linear_int8_fwd(x, x_scale, weight, weight_scale, None, None, torch.float32)
    sums = F.linear(x.double(), weight.double())
    assert torch.equal(y.double(), sums * x_scale.double()[:, None] * weight_scale.double())
    x_scale[2] = float("nan")
    y = linear_int8_fwd(x, x_scale, weight, weight_scale, None, None, torch.float32)
    assert torch.equal(y.isnan().any(1), x_scale.isnan())


def test_rows_of_wider_tensors_and_beyond_32_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, x_scale, weight, weight_scale, bias = _inputs(4, 32, 16, torch.float32, device)
    _use(monkeypatch, x, weight, None)
    expected = linear_int8_fwd(x, x_scale, weight, weight_scale, bias, None, torch.float32)
    wide_x, wide_weight = (F.pad(t, (3, 2), value=99)[:, 3:-2] for t in (x, weight))
    actual = linear_int8_fwd(wide_x, x_scale, wide_weight, weight_scale, bias, None, torch.float32)
    torch.testing.assert_close(actual, expected)
    if device == "cpu":
        actual = linear_int8_fwd(far_rows(x), x_scale, weight, weight_scale, bias, None, torch.float32)
        torch.testing.assert_close(actual, expected)
        actual = linear_int8_fwd(x, x_scale, far_rows(weight[:4]), weight_scale[:4], bias[:4], None, torch.float32)
        torch.testing.assert_close(actual, expected[:, :4])


@given(
    M=st.integers(0, 70),
    K=st.integers(1, 100) | st.sampled_from([16, 48, 96]),
    N=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES[1:]),
    gelu=st.sampled_from([None, "none"]),
)
@settings(max_examples=12, deadline=None)
def test_any_size(M: int, K: int, N: int, dtype: torch.dtype, gelu: str | None) -> None:
    torch.manual_seed(N)
    arguments = _inputs(M, K, N, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use(monkeypatch, arguments[0], arguments[2], gelu)
        check(arguments, gelu, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_feed_forward_is_close_to_the_plain_one(dtype: torch.dtype, device: str) -> None:
    """Quantised by the operators, from end to end: the error of int8, which is some 1 % of what a row holds."""
    x, weight, out_weight = torch.randn(9, 64), torch.randn(128, 64) / 8, torch.randn(64, 128) / 11
    bias = torch.randn(128)
    x, weight, out_weight, bias = (t.to(device, dtype) for t in (x, weight, out_weight, bias))
    first, second = functional.quantize_rows(weight), functional.quantize_rows(out_weight)
    pre = functional.linear_int8(*functional.quantize_rows(x), *first, bias, out_dtype=dtype)
    y = functional.linear_int8(*functional.quantize_rows(pre, gelu="none"), *second, out_dtype=dtype)
    assert y.dtype == dtype
    exact = F.linear(F.gelu(F.linear(x.double(), weight.double(), bias.double())), out_weight.double())
    assert F.cosine_similarity(y.double(), exact).min() > 0.9995


def test_functional(device: str) -> None:
    x, x_scale, weight, weight_scale, bias = _inputs(6, 8, 5, torch.float32, device)
    y = functional.linear_int8(x.view(2, 3, 8), x_scale.view(2, 3), weight, weight_scale, bias, gelu="tanh")
    assert (y.shape, y.dtype) == ((2, 3, 5), torch.float32)
    torch.testing.assert_close(
        y.view(6, 5), reference.linear_int8(x, x_scale, weight, weight_scale, bias, "tanh", torch.float32)
    )
    wrong: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("x_int8 must be int8, but is torch.float32", [x.float(), x_scale, weight, weight_scale], {}),
        (r"x_scale is \(5,\) torch.float32, not \(6,\)", [x, weight_scale, weight, weight_scale], {}),
        (r"weight_scale is \(6,\) torch.float32, not \(5,\)", [x, x_scale, weight, x_scale], {}),
        (r"weight is \(5, 3\), but x has 8", [x, x_scale, weight[:, :3], weight_scale], {}),
        ("approximate must be", [x, x_scale, weight, weight_scale], {"gelu": "erf"}),
        ("out_dtype must be floating point", [x, x_scale, weight, weight_scale], {"out_dtype": torch.int32}),
    ]
    for message, arguments, options in wrong:
        with pytest.raises(ValueError, match=message):
            functional.linear_int8(*arguments, **options)


def test_registration() -> None:
    arguments = _inputs(4, 8, 6, torch.float32)
    opcheck(linear_int8_fwd, [*arguments, None, torch.bfloat16])
    opcheck(linear_int8_fwd, [*arguments[:-1], None, "none", torch.float32])
