"""linear_fwd, and the product that it shares with linear_gelu."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels import _launch, _product
from fastbert.kernels._product import Product, Tiles
from fastbert.kernels.ffn import feed_forward_fwd, linear_gelu_fwd
from fastbert.kernels.linear import linear_fwd
from tests.optional import given, needs, settings, st
from tests.oracle import assert_operator_accurate, far_rows, opcheck

pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TILES = Tiles(32, 64, 16, 4, 2, PARTS=2, GROUP_M=2)  # small, so that there are several; and two groups of rows
CHIPS = {"pointers": (8, 0), "TMA": (9, 0)}


def _inputs(M: int, K: int, N: int, dtype: torch.dtype, device: str = "cpu", with_bias: bool = True) -> list:
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,)))
    return [x.to(dtype), (weight * K**-0.5).to(dtype), bias.to(dtype) if with_bias else None]


@pytest.fixture(params=CHIPS)
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a CPU a chip of that kind, with two multiprocessors; a GPU is what it is."""
    answer = _launch.chip
    capability = CHIPS[request.param]
    monkeypatch.setattr(
        _launch, "chip", lambda device: _launch.Chip(capability, 2) if device.type == "cpu" else answer(device)
    )
    return request.param


def _use(monkeypatch: pytest.MonkeyPatch, *products: tuple[Tensor, Tensor, str | None], tiles: Tiles = TILES) -> None:
    """Entries for these products: of x, weight and activation."""
    monkeypatch.setattr(
        _product,
        "TILES",
        {
            Product(_launch.chip(x.device).capability, x.dtype, activation, *weight.shape, rows): tiles
            for x, weight, activation in products
            for rows in (1, 4, 16, 64)
        },
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 768, 33), (75, 40, 136), (200, 104, 264), (37, 7, 1), (0, 8, 8)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(
    M: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    with_bias: bool,
    device: str,
    chip: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = _inputs(M, K, N, dtype, device, with_bias)
    _use(monkeypatch, (*arguments[:2], None))
    assert_operator_accurate(linear_fwd, reference.linear, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("M", "K", "N"), [(1, 40, 33), (75, 40, 136), (0, 8, 8)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_with_gelu(
    M: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    approximate: str,
    device: str,
    chip: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """linear_gelu and feed_forward where the table sends their products here."""
    x, weight, bias = _inputs(M, K, N, dtype, device)
    out_weight = weight.T.contiguous()
    _use(monkeypatch, (x, weight, approximate), (x, out_weight, None))
    launched = []
    launch = _product.launch
    monkeypatch.setattr(_product, "launch", lambda *a: launched.append(a) or launch(*a))
    for keep_pre in (True, False):
        assert_operator_accurate(linear_gelu_fwd, reference.linear_gelu, [x, weight, bias, approximate, keep_pre])
        arguments = [x, weight, bias, out_weight, approximate, keep_pre]
        assert_operator_accurate(feed_forward_fwd, reference.feed_forward, arguments)
    on_kernels = device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    assert len(launched) == (6 if on_kernels and dtype != torch.float64 else 0)


@pytest.mark.parametrize(
    "tiles",
    [Tiles(64, 64, 32, 4, 2, PARTS=4), Tiles(16, 128, 16, 4, 3, programs=2), Tiles(128, 32, 64, 8, 1, GROUP_M=1)],
    ids=str,
)
def test_any_tiles(tiles: Tiles, chip: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = _inputs(150, 72, 200, torch.float16, device)
    _use(monkeypatch, (*arguments[:2], None), tiles=tiles)
    assert_operator_accurate(linear_fwd, reference.linear, arguments)


def test_rows_of_wider_tensors(chip: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting anywhere: what TMA cannot reach takes pointers."""
    for columns, start in ((8, 0), (8, 8), (3, 0), (7, 1)):
        x, weight, bias = _inputs(70, 40, 72, torch.float16, device)
        x, weight = (F.pad(t, (start, columns), value=float("nan"))[:, start : start + 40] for t in (x, weight))
        _use(monkeypatch, (x, weight, None))
        reachable = (40 + columns + start) % 8 == 0 and start % 8 == 0
        assert _product.takes_tma(_launch.chip(x.device), x, weight) == (reachable and chip == "TMA")
        assert_operator_accurate(linear_fwd, reference.linear, [x, weight, bias])


def test_offsets_beyond_32_bits(chip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = _inputs(4, 32, 16, torch.float16)
    _use(monkeypatch, (x, weight, None))
    expected = linear_fwd(x, weight, bias)
    torch.testing.assert_close(linear_fwd(far_rows(x), weight, bias), expected)
    torch.testing.assert_close(linear_fwd(x, far_rows(weight[:4]), bias[:4]), expected[:, :4])


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_and_pytorch(with_bias: bool) -> None:
    leaves = [t.requires_grad_() for t in _inputs(4, 5, 3, torch.float64, with_bias=with_bias) if t is not None]
    rest = [] if with_bias else [None]
    assert torch.autograd.gradcheck(lambda *a: linear_fwd(*a, *rest), leaves)
    actual, expected = linear_fwd(*leaves, *rest), F.linear(*leaves)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, dy), torch.autograd.grad(expected, leaves, dy))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_the_gradients_that_are_needed(frozen: int) -> None:
    leaves = [t.requires_grad_(i != frozen) for i, t in enumerate(_inputs(4, 5, 3, torch.float32))]
    linear_fwd(*leaves).sum().backward()
    assert [t.grad is None for t in leaves] == [i == frozen for i in range(3)]


@given(
    M=st.integers(0, 100),
    K=st.integers(1, 100),
    N=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    capability=st.sampled_from(list(CHIPS.values())),
    parts=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=15, deadline=None)
def test_any_size(M: int, K: int, N: int, dtype: torch.dtype, capability: tuple[int, int], parts: int) -> None:
    torch.manual_seed(N)
    arguments = _inputs(M, K, N, dtype)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(_launch, "chip", lambda device: _launch.Chip(capability, 3))
        _use(monkeypatch, (*arguments[:2], None), tiles=TILES._replace(PARTS=parts))
        assert_operator_accurate(linear_fwd, reference.linear, arguments)


@needs("triton")
def test_entries_are_for_a_size_class(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {1: 1, 3: 1, 4: 4, 63: 16, 64: 64, 16383: 4096, 16384: 16384, 65535: 16384, 65536: 65536, 10**7: 65536}
    assert {rows: _product.size_class(rows) for rows in classes} == classes
    x, weight, _ = _inputs(100, 8, 16, torch.bfloat16)
    entry = Product(_launch.chip(x.device).capability, torch.bfloat16, None, 16, 8, 16)
    monkeypatch.setattr(_product, "TILES", {entry: TILES})
    answers = [_product.tiles_for(x[:rows], weight, None) for rows in (15, 16, 63, 64)]
    assert answers == [None, TILES, TILES, None]
    assert _product.tiles_for(x[:60], weight, "none") is None
    assert _product.tiles_for(x[:60].half(), weight.half(), None) is None
    assert _product.tiles_for(x[:60], weight[:8], None) is None


@needs("triton")
def test_functional_takes_the_operator_only_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = _inputs(24, 8, 16, torch.float32)
    calls = []
    operator = functional.linear_fwd
    monkeypatch.setattr(functional, "linear_fwd", lambda *a: calls.append(a) or operator(*a))
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(functional.linear(x, weight, bias), expected)
    assert not calls
    _use(monkeypatch, (x, weight, None))
    torch.testing.assert_close(functional.linear(x.view(2, 12, 8), weight, bias), expected.view(2, 12, 16))
    assert len(calls) == 1
    torch.testing.assert_close(functional.linear(x, weight[:5], bias[:5]), expected[:, :5])
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert functional.linear(x, weight, bias).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"bias is \(16,\), not \(5,\)"):
        functional.linear(x, weight[:5], bias)


def test_registration() -> None:
    leaves = [t.requires_grad_() for t in _inputs(4, 8, 6, torch.float32)]
    opcheck(linear_fwd, leaves)
    opcheck(linear_fwd, [*leaves[:2], None])


@pytest.mark.plain
def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [t.requires_grad_() for t in _inputs(6, 8, 16, torch.float32)]
    _use(monkeypatch, (*leaves[:2], None))
    compiled = torch.compile(functional.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), F.linear(*leaves))
