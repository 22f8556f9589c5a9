"""The counter-based dropout that all operators share."""

import math
import os

import pytest
import torch
from torch import Tensor

from fastbert import reference
from fastbert.kernels import _cpu, _device
from fastbert.kernels._triton import tl, triton
from tests.optional import needs

_C = _cpu._C
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SEEDS = [0, 1, -1, -(2**63), 2**63 - 1, 123456789012345]


def _mask(shape: tuple[int, int, int], p: float = 0.1, seed: int = 3, stream: int = 2, first_row: int = 0) -> Tensor:
    heads, rows, cols = shape
    return reference.keep_mask(heads, first_row, rows, cols, p, torch.tensor(seed), stream)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_known_answers(counter: list[int], key: list[int], words: str) -> None:
    """Random123's own test vectors for 7 rounds, https://github.com/DEShawResearch/random123."""
    seed = torch.tensor((key[1] << 32 | key[0]) - (2**64 if key[1] >> 31 else 0))
    assert " ".join(f"{int(w):08x}" for w in reference.philox(tuple(torch.tensor(c) for c in counter), seed)) == words


@needs("fastbert._C")
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(1, 7, 768), (3, 5, 17), (2, 4, 16), (1, 2, 2100), (2, 0, 5), (2, 3, 0), (1, 1, 1)])
def test_cpp_equals_the_reference(shape: tuple[int, int, int], seed: int) -> None:
    heads, rows, cols = shape
    for p, stream, first_row in ((0.1, 0, 0), (0.5, 40, 513), (1.0, 1, 0), (0.001, 3, 7)):
        for scores in (False, True):
            expected = reference.keep_mask(heads, first_row, rows, cols, p, torch.tensor(seed), stream, scores=scores)
            threshold = reference.drop_threshold(p)
            actual = _C.keep_mask(heads, first_row, rows, cols, threshold, seed, stream, scores)
            assert torch.equal(torch.from_numpy(actual), expected)


@needs("fastbert._C")
@pytest.mark.parametrize("seed", SEEDS)
def test_cpp_equals_the_reference_for_rows_in_any_order(seed: int) -> None:
    numbers = torch.tensor([5, 0, 2**31 + 3, 5, 2**32 - 1, 12])
    for heads, first_row, rows, cols, scores in ((1, 0, 6, 768, False), (1, 2, 3, 17, False), (3, 1, 5, 70, True)):
        sizes = heads, first_row, rows, cols
        expected = reference.keep_mask(*sizes, 0.3, torch.tensor(seed), 2, scores=scores, numbers=numbers)
        threshold = reference.drop_threshold(0.3)
        actual = _C.keep_mask(*sizes, threshold, seed, 2, scores=scores, numbers=numbers.numpy())
        assert torch.equal(torch.from_numpy(actual), expected)
        one = reference.keep_mask(heads, 5, 1, cols, 0.3, torch.tensor(seed), 2, scores=scores)
        assert torch.equal(expected[:, 3 - first_row], one[:, 0])


@needs("fastbert._C")
def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        _C.keep_mask(1, 0, -1, 4, 26, 0, 0)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 256\]"):
        _C.keep_mask(1, 0, 1, 4, 257, 0, 0)
    for numbers in (torch.arange(3), torch.zeros(4, 4).long()):
        with pytest.raises(ValueError, match="numbers must have one dimension and reach to the last row"):
            _C.keep_mask(1, 2, 2, 4, 26, 0, 0, numbers=numbers.numpy())


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("scores", [False, True])
def test_rate_and_independence(p: float, scores: bool) -> None:
    """Of rows, heads, columns, layers (stream) and steps (seed)."""
    seed = torch.tensor(3)
    keep = reference.keep_mask(4, 0, 256, 512, p, seed, 2, scores=scores).double()
    exact = 1 - reference.drop_threshold(p) / 256
    assert abs(exact - (1 - p)) <= 1 / 512
    spread = math.sqrt(exact * (1 - exact))
    assert abs(keep.mean() - exact) <= 5 * spread / math.sqrt(keep.numel())
    others = (
        reference.keep_mask(4, 0, 256, 512, p, seed + 1, 2, scores=scores),
        reference.keep_mask(4, 0, 256, 512, p, seed, 3, scores=scores),
        reference.keep_mask(4, 256, 256, 512, p, seed, 2, scores=scores),
        keep.roll(1, 0),
        keep.roll(1, 1),
        keep.roll(1, 2),
        keep.roll(16, 2),
    )
    for other in others:
        correlation = ((keep - exact) * (other.double() - exact)).mean() / spread**2
        assert abs(correlation) <= 5 / math.sqrt(keep.numel())


def test_a_row_is_the_same_wherever_a_call_starts() -> None:
    assert torch.equal(_mask((2, 10, 33))[:, 4:], _mask((2, 6, 33), first_row=4))
    assert torch.equal(_mask((2, 10, 33))[..., :20], _mask((2, 10, 20)))


def test_the_scale_keeps_the_mean() -> None:
    for p in (0.0, 0.001, 0.1, 0.5, 0.9):
        kept = 1 - reference.drop_threshold(p) / 256
        assert reference.keep_scale(p) == pytest.approx(1 / kept)
    assert reference.keep_scale(1.0) == 0
    assert reference.drop_threshold(1e-9) == 1
    assert reference.drop_threshold(0.0) == 0


@needs("fastbert._C")
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_in_place_on_a_cpu_with_and_without_the_extension(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor(5)
    for x in (torch.randn(6, 40), torch.randn(3, 6, 40)):
        keep = reference.keep_mask(len(x) if x.ndim == 3 else 1, 2, 6, 40, p, seed, 9, scores=x.ndim == 3).view(x.shape)
        expected = x * keep * reference.keep_scale(p)
        torch.testing.assert_close(_cpu.dropout_(x.clone(), 2, p, seed, 9), expected)
        monkeypatch.setattr(_cpu, "_C", None)
        torch.testing.assert_close(_cpu.dropout_(x.clone(), 2, p, seed, 9), expected)
        monkeypatch.undo()


@triton.jit
def _masks_kernel(
    features_ptr, scores_ptr, transposed_ptr, seed_ptr, first_row, first_col,
    THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    offs = rows[:, None] * COLS + tl.arange(0, COLS)[None, :]
    seed = tl.load(seed_ptr)
    tl.store(
        features_ptr + offs, _device.keep_features(seed, first_row + rows, first_col, 7, THRESHOLD, COLS).to(tl.int8)
    )
    keep = _device.keep_scores(seed, first_row + rows, first_col, 3, 7, THRESHOLD, COLS)
    tl.store(scores_ptr + offs, keep.to(tl.int8))
    keep = _device.keep_scores_transposed(seed, first_row, first_col, 3, 7, THRESHOLD, ROWS, COLS)
    tl.store(transposed_ptr + tl.trans(offs), keep.to(tl.int8))


@pytest.mark.kernel
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cols", [16, 32, 64, 128])
def test_the_device_functions_equal_the_reference(cols: int, seed: int, device: str) -> None:
    if device == "cpu" and not INTERPRETED:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    seed_tensor = torch.tensor(seed, device=device)
    for p, first_row, first_col in ((0.001, 0, 0), (0.1, 513, 2 * cols), (0.5, 7, cols), (0.51, 8, cols), (1.0, 1, 0)):
        features, scores, transposed = torch.empty(3, 32, cols, dtype=torch.int8, device=device)
        threshold = reference.drop_threshold(p)
        _masks_kernel[(1,)](features, scores, transposed, seed_tensor, first_row, first_col, threshold, 32, cols)
        sizes = first_row, 32, first_col + cols, p, seed_tensor, 7
        assert torch.equal(features.bool(), reference.keep_mask(1, *sizes)[0, :, first_col:])
        expected = reference.keep_mask(4, *sizes, scores=True)[3, :, first_col:]
        assert torch.equal(scores.bool(), expected)
        assert torch.equal(transposed.bool(), expected)
