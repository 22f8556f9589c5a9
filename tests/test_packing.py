"""Packing, and the C++ that it calls."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fastbert import packing
from fastbert.packing import Packing
from tests.optional import given, needs, st

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def _equal(a: Packing, b: Packing) -> bool:
    def same(x: Tensor | None, y: Tensor | None) -> bool:
        return x is y or (x is not None and y is not None and torch.equal(x, y) and x.dtype == y.dtype)

    tensors = all(same(getattr(a, name), getattr(b, name)) for name in ("cu_seqlens", "position_ids", "indices"))
    return tensors and (a.max_seqlen, a.shape) == (b.max_seqlen, b.shape)


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_any_mask(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    p = Packing.from_mask(mask)
    x = torch.arange(mask.numel()).view(mask.shape) + 1.0
    assert torch.equal(p.pack(x), x[mask])
    assert torch.equal(p.unpack(p.pack(x)), x * mask)
    assert torch.equal(p.unpack(p.pack(x), -7.0)[~mask], torch.full((int((~mask).sum()),), -7.0))
    assert torch.equal(p.position_ids, torch.arange(5).expand_as(mask)[mask])
    assert p.cu_seqlens.diff().tolist() == mask.sum(-1).tolist()
    assert p.max_seqlen == (int(mask.sum(-1).max()) if not mask.all() else 5)
    assert (p.tokens, p.sequences) == (int(mask.sum()), len(rows))
    assert (p.indices is None) == bool(mask.all())
    firsts = [row[m][0] if m.any() else torch.tensor(0.0) for row, m in zip(x, mask, strict=True)]
    assert torch.equal(p.first(p.pack(x)[:, None]).squeeze(1), torch.stack(firsts))


@given(LENGTHS, st.integers(0, 3))
def test_lengths_agree_with_mask_and_cu_seqlens(lengths: list[int], spare: int) -> None:
    L = max(lengths) + spare
    given_lengths = Packing.from_lengths(lengths, L)
    mask = torch.arange(L) < torch.tensor(lengths)[:, None]
    if 0 < given_lengths.tokens < mask.numel():
        assert _equal(given_lengths, Packing.from_mask(mask))
    packed = Packing.from_cu_seqlens(given_lengths.cu_seqlens, max(lengths), sum(lengths))
    assert packed.shape == (1, sum(lengths))
    assert torch.equal(packed.position_ids, given_lengths.position_ids)
    assert _equal(Packing.from_lengths(torch.tensor(lengths), L), given_lengths)
    if sum(lengths) > 0:
        rows, x = packed.per_sequence(), torch.randn(sum(lengths), 2)
        expected = Packing.from_lengths(lengths)
        assert torch.equal(rows.unpack(x), expected.unpack(x))


@given(LENGTHS)
def test_without_the_extension(lengths: list[int]) -> None:
    expected = Packing.from_lengths(lengths, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_C", None)
        assert _equal(Packing.from_lengths(lengths, 9), expected)


def test_full_is_a_view() -> None:
    p = Packing.full(3, 4, "cpu")
    x = torch.randn(3, 4, 2)
    assert p.pack(x).data_ptr() == x.data_ptr() == p.unpack(p.pack(x)).data_ptr()
    assert _equal(p, Packing.from_mask(torch.ones(3, 4)))
    assert _equal(p, Packing.from_lengths([4, 4, 4]))


def test_gradients_pass_through() -> None:
    p = Packing.from_mask(torch.tensor([[1, 0, 1], [0, 1, 1]]))
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: p.unpack(x).square(), x)
    y = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: p.pack(y).square(), y)


def test_to_moves_everything() -> None:
    p = Packing.from_lengths([2, 1]).to("meta")
    assert {t.device.type for t in (p.cu_seqlens, p.position_ids, p.indices)} == {"meta"}


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [([1, 5], r"lengths\[1\] is 5, not in \[0, 4\]"), ([-1], r"lengths\[0\] is -1, not in \[0, 4\]")],
)
def test_bad_lengths(lengths: list[int], message: str, extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not extension:
        monkeypatch.setattr(packing, "_C", None)
    with pytest.raises(ValueError, match=message):
        Packing.from_lengths(lengths, 4)


@needs("fastbert._C")
class TestExtension:
    _C = packing._C

    @given(LENGTHS, st.integers(0, 3))
    def test_equals_numpy(self, lengths: list[int], spare: int) -> None:
        L = max(lengths) + spare
        indices, cu_seqlens, position_ids = self._C.pack_lengths(np.array(lengths), L)
        assert (indices.dtype, cu_seqlens.dtype, position_ids.dtype) == (np.int64, np.int32, np.int64)
        rows = [np.arange(n) for n in lengths]
        np.testing.assert_array_equal(position_ids, np.concatenate(rows))
        np.testing.assert_array_equal(indices, np.concatenate([row * L + r for row, r in enumerate(rows)]))
        np.testing.assert_array_equal(cu_seqlens, np.cumsum([0, *lengths]))

    def test_too_many_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"more than 2\^31 - 1 tokens"):
            self._C.pack_lengths([2**30, 2**30], 2**30)

    def test_bad_shape(self) -> None:
        with pytest.raises(ValueError, match="one dimension"):
            self._C.pack_lengths(np.ones((2, 2), dtype=np.int64), 4)
