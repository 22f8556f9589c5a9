"""Masked-LM corruption in the C++ core: laws, and the distributions that it promises."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import transformers

from fastbert.data.masking import Masker
from fastbert.errors import InputError
from tests.optional import given, settings, st

_C = pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")
VOCABULARY = 1000
SPECIAL = (0, 1, 2, 3, 4)  # [PAD] [UNK] [CLS] [SEP] [MASK]
CLS, SEP, MASK = 2, 3, 4
PIECES = range(700, VOCABULARY)  # ## pieces
KINDS = np.zeros(VOCABULARY, np.uint8)
KINDS[list(SPECIAL)] = 1
KINDS[list(PIECES)] = 2
Array = npt.NDArray[np.int64]


def _sequences(count: int, length: int, seed: int = 0) -> tuple[Array, Array]:
    """[CLS] A [SEP] B [SEP] `count` times, about three tenths of it ## pieces, and where each starts."""
    ids = np.random.default_rng(seed).integers(len(SPECIAL), VOCABULARY, (count, length))
    ids[:, 0], ids[:, length // 2], ids[:, -1] = CLS, SEP, SEP
    return ids.reshape(-1), np.arange(count + 1) * length


def _corrupt(ids: Array, cu_seqlens: Array, *, seed: int = 0, epoch: int = 0, **options: Any) -> tuple[Array, ...]:
    calls = {key: options.pop(key) for key in ("unit_starts", "first_index", "threads") if key in options}
    return _C.corrupt(ids, cu_seqlens, KINDS, MASK, _C.Masking(**options), seed=seed, epoch=epoch, **calls)


def _words(ids: Array, unit_starts: npt.NDArray[np.uint8] | None = None) -> Array:
    """Which word each token belongs to; -1 for special ones."""
    special = np.isin(ids, SPECIAL)
    starts = ~np.isin(ids, PIECES) if unit_starts is None else unit_starts != 0
    starts = starts | np.concatenate([[True], special[:-1]])
    return np.where(special, -1, np.cumsum(starts & ~special))


def _within(count: float, trials: float, p: float, sigmas: float = 5.0) -> None:
    """A share of independent trials, or of ones that repel each other."""
    assert abs(count - trials * p) <= sigmas * math.sqrt(trials * p * (1 - p)), f"{count / trials:.5f}, not {p}"


@pytest.mark.parametrize("unit", ["token", "whole-word", "span"])
@pytest.mark.parametrize("rate", [0.05, 0.15, 0.4])
def test_the_rate(unit: str, rate: float) -> None:
    ids, cu_seqlens = _sequences(4000, 128)
    _, labels, rows = _corrupt(ids, cu_seqlens, unit=unit, rate=rate)
    ordinary = int((~np.isin(ids, SPECIAL)).sum())
    assert len(rows) / ordinary == pytest.approx(rate, rel=0.01)
    if unit == "token":
        a_sequence = (labels != -100).reshape(4000, 128).sum(1)
        assert set(a_sequence) <= {math.floor(rate * 125), math.ceil(rate * 125)}


@pytest.mark.parametrize(("mask", "other"), [(0.8, 0.1), (1.0, 0.0), (0.8, 0.0), (0.0, 0.2), (0.8, 0.2), (0.0, 1.0)])
@pytest.mark.parametrize("unit", ["token", "whole-word", "span"])
def test_what_becomes_of_the_chosen(unit: str, mask: float, other: float) -> None:
    """The mask strategies of the paper's appendix C.2, and others."""
    ids, cu_seqlens = _sequences(3000, 128)
    corrupted, _, rows = _corrupt(ids, cu_seqlens, unit=unit, replace_by_mask=mask, replace_by_random=other)
    after, before = corrupted[rows], ids[rows]
    assert not np.isin(after[after != MASK], SPECIAL).any()
    sigmas = 5.0 if unit != "span" else 12.0  # the tokens of a span share their fate
    if 0 < mask < 1:
        _within((after == MASK).sum(), len(rows), mask, sigmas)
    if 0 < other < 1:
        same = 1 / (VOCABULARY - len(SPECIAL))
        _within(((after != MASK) & (after != before)).sum(), len(rows), other * (1 - same), sigmas)
    if mask == 1.0:
        assert (after == MASK).all()
    if mask + other == 0.8:
        assert ((after == MASK) | (after == before)).all()


def test_random_tokens_are_uniform() -> None:
    ids, cu_seqlens = _sequences(20000, 128)
    corrupted, _, rows = _corrupt(ids, cu_seqlens, replace_by_mask=0.0, replace_by_random=1.0)
    counts = np.bincount(corrupted[rows], minlength=VOCABULARY)
    assert not counts[list(SPECIAL)].any()
    counts = counts[len(SPECIAL) :]
    expected = counts.mean()
    statistic = ((counts - expected) ** 2 / expected).sum()  # chi-square, 994 degrees of freedom
    assert abs(statistic - 994) < 5 * math.sqrt(2 * 994)


@pytest.mark.parametrize("unit", ["token", "whole-word", "span"])
def test_places_are_equally_likely(unit: str) -> None:
    """Also the first and the last word of a segment."""
    count, length = 30000, 32
    ids = np.random.default_rng(0).integers(len(SPECIAL), PIECES[0], (count, length))
    ids[:, 0], ids[:, 16], ids[:, -1] = CLS, SEP, SEP
    _, labels, _ = _corrupt(ids.reshape(-1), np.arange(count + 1) * length, unit=unit)
    chosen = (labels != -100).reshape(count, length).sum(0)
    assert not chosen[[0, 16, 31]].any()
    places = np.delete(chosen, [0, 16, 31])
    expected = places.mean()
    if unit == "token":
        statistic = ((places - expected) ** 2 / (expected * (1 - expected / count))).sum()
        assert abs(statistic - 28) < 5 * math.sqrt(2 * 28)
    else:
        assert abs(places / expected - 1).max() < 0.04


def test_long_words_are_as_likely_as_short_ones() -> None:
    ids, cu_seqlens = _sequences(20000, 96)
    _, labels, _ = _corrupt(ids, cu_seqlens, unit="whole-word")
    words = _words(ids)
    sizes = np.bincount(words[words >= 0])
    size = np.where(words >= 0, sizes[words], 0)
    for n in range(1, 5):
        of_size = size == n
        assert (labels[of_size] != -100).mean() == pytest.approx(0.15, rel=0.04), f"words of {n} pieces"


@pytest.mark.parametrize("unit", ["whole-word", "span"])
def test_words_are_whole(unit: str) -> None:
    ids, cu_seqlens = _sequences(500, 128)
    _, labels, _ = _corrupt(ids, cu_seqlens, unit=unit)
    words, chosen = _words(ids), labels != -100
    sizes = np.bincount(words[words >= 0])
    hits = np.bincount(words[chosen], minlength=len(sizes))
    assert ((hits == 0) | (hits == sizes)).all()


def test_given_units_are_whole() -> None:
    """ERNIE's: phrases and entities that somebody else has found."""
    ids, cu_seqlens = _sequences(500, 128)
    starts = (np.random.default_rng(1).random(len(ids)) < 0.4).astype(np.uint8)
    _, labels, _ = _corrupt(ids, cu_seqlens, unit="whole-word", unit_starts=starts)
    units, chosen = _words(ids, starts), labels != -100
    sizes = np.bincount(units[units >= 0])
    hits = np.bincount(units[chosen], minlength=len(sizes))
    assert ((hits == 0) | (hits == sizes)).all()
    assert sizes.max() > 5


def test_spans_have_geometric_lengths_and_one_fate() -> None:
    count, length = 50, 40000
    ids = np.random.default_rng(0).integers(len(SPECIAL), PIECES[0], (count, length))
    corrupted, labels, _ = _corrupt(ids.reshape(-1), np.arange(count + 1) * length, unit="span", rate=0.01)
    chosen = (labels != -100).reshape(count, length)
    fate = np.where(corrupted.reshape(count, length) == MASK, 2, 1) * chosen
    runs = []
    for row, kinds in zip(chosen, fate, strict=True):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row, [0]])))
        runs += [(end - start, len(set(kinds[start:end]))) for start, end in edges.reshape(-1, 2)]
    lengths = np.array([n for n, _ in runs])
    expected = 0.2 * 0.8 ** np.arange(10)
    expected /= expected.sum()
    found = np.bincount(lengths, minlength=12)[1:11] / len(lengths)
    np.testing.assert_allclose(found[:9], expected[:9], atol=0.015)  # neighbours join, and each sequence's last is cut
    assert np.mean([kinds == 1 for _, kinds in runs]) > 0.98
    assert lengths.mean() == pytest.approx(3.8, rel=0.05)


def test_tokens_are_chosen_independently_of_each_other() -> None:
    """Neighbours are both chosen as often as any two places, which without replacement is k (k - 1) / n (n - 1)."""
    count, length = 20000, 101
    ids = np.random.default_rng(0).integers(len(SPECIAL), VOCABULARY, (count, length))
    _, labels, _ = _corrupt(ids.reshape(-1), np.arange(count + 1) * length)
    chosen = (labels != -100).reshape(count, length)
    k = chosen.sum(1).astype(float)
    expected = (k * (k - 1)).mean() / (length * (length - 1))
    for distance in (1, 2, 50):
        both = (chosen[:, distance:] & chosen[:, :-distance]).mean()
        assert both == pytest.approx(expected, rel=0.03)
    again = (_corrupt(ids.reshape(-1), np.arange(count + 1) * length, epoch=1)[1] != -100).reshape(count, length)
    assert (chosen & again).mean() == pytest.approx((k.mean() / length) ** 2, rel=0.03)


@pytest.mark.parametrize("unit", ["token", "whole-word", "span"])
def test_a_cap_on_predictions(unit: str) -> None:
    ids, cu_seqlens = _sequences(500, 128)
    _, labels, _ = _corrupt(ids, cu_seqlens, unit=unit, max_predictions=7)
    a_sequence = (labels != -100).reshape(500, 128).sum(1)
    assert a_sequence.max() <= 7
    assert a_sequence.mean() > 6 if unit != "span" else a_sequence.mean() > 4


def test_draws_depend_on_seed_epoch_and_index_alone() -> None:
    ids, cu_seqlens = _sequences(300, 64)
    one = _corrupt(ids, cu_seqlens, threads=1)
    for threads in (2, 7):
        for a, b in zip(one, _corrupt(ids, cu_seqlens, threads=threads), strict=True):
            np.testing.assert_array_equal(a, b)
    tail = _corrupt(ids[100 * 64 :], cu_seqlens[:201], first_index=100)
    np.testing.assert_array_equal(tail[1], one[1][100 * 64 :])
    for other in ({"seed": 1}, {"epoch": 1}, {"first_index": 1}):
        assert (_corrupt(ids, cu_seqlens, **other)[1] != one[1]).mean() > 0.2


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    unit=st.sampled_from(["token", "whole-word", "span"]),
    rate=st.floats(0, 1),
    mask=st.floats(0, 1),
    cap=st.integers(0, 5),
    given_units=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_laws(lengths: list[int], unit: str, rate: float, mask: float, cap: int, given_units: bool, seed: int) -> None:
    generator = np.random.default_rng(seed % 2**32)
    cu_seqlens = np.cumsum([0, *lengths])
    ids = generator.integers(0, VOCABULARY, cu_seqlens[-1])
    ids[generator.random(len(ids)) < 0.2] = SEP
    starts = generator.integers(0, 2, len(ids)).astype(np.uint8) if given_units and unit != "token" else None
    corrupted, labels, rows = _corrupt(
        ids,
        cu_seqlens,
        seed=seed,
        unit=unit,
        rate=rate,
        replace_by_mask=mask,
        replace_by_random=1 - mask,
        max_predictions=cap,
        unit_starts=starts,
    )
    chosen = labels != -100
    np.testing.assert_array_equal(rows, np.flatnonzero(chosen))
    np.testing.assert_array_equal(labels[chosen], ids[chosen])
    np.testing.assert_array_equal(corrupted[~chosen], ids[~chosen])
    special = np.isin(ids, SPECIAL)
    assert not chosen[special].any()
    for start, end in pairwise(cu_seqlens):
        if cap:
            assert chosen[start:end].sum() <= cap
        if rate > 0 and cap == 0 and not special[start:end].all():
            assert chosen[start:end].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "words"}, "token, whole-word, span"),
        ({"rate": 1.5}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"replace_by_mask": 0.9, "replace_by_random": 0.2}, "add up"),
        ({"max_predictions": -1}, "max_predictions"),
        ({"span_p": 0.0}, "span_p"),
        ({"max_span": 0}, "max_span"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _C.Masking(**options)


def test_bad_input() -> None:
    ids, cu_seqlens = _sequences(2, 16)
    with pytest.raises(ValueError, match="not in the vocabulary"):
        _corrupt(ids + VOCABULARY, cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens"):
        _corrupt(ids, cu_seqlens[:-1])
    with pytest.raises(ValueError, match="unit_starts"):
        _corrupt(ids, cu_seqlens, unit_starts=np.ones(3, np.uint8))
    with pytest.raises(ValueError, match="only special"):
        _C.corrupt(ids, cu_seqlens, np.ones(VOCABULARY, np.uint8), MASK, _C.Masking(), seed=0, epoch=0)


def _tokenizer() -> transformers.BertTokenizer:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", "##x", "##y"]
    return transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})


def test_the_masker_goes_by_its_tokenizer() -> None:
    tokenizer = _tokenizer()
    ids = np.array(tokenizer("a bx c dxy e f g h")["input_ids"] * 50)
    cu_seqlens = np.arange(51) * (len(ids) // 50)
    masker = Masker(tokenizer, unit="whole-word", rate=0.3, replace_by_mask=1.0, replace_by_random=0.0)
    masked = masker(ids, cu_seqlens)
    special = np.isin(ids, tokenizer.all_special_ids)
    assert (masked.input_ids[masked.label_rows] == tokenizer.mask_token_id).all()
    assert not (masked.labels[special] != -100).any()
    chosen = masked.labels != -100
    pieces = np.isin(ids, tokenizer.convert_tokens_to_ids(["##x", "##y"]))
    np.testing.assert_array_equal(chosen[pieces], chosen[:-1][pieces[1:]])
    np.testing.assert_array_equal(masked.label_rows, np.flatnonzero(chosen))
    whole = np.zeros(len(ids), bool)  # a sequence is one unit
    whole[cu_seqlens[:-1]] = True
    together = masker(ids, cu_seqlens, unit_starts=whole)
    counts = (together.labels != -100).reshape(50, -1).sum(1)
    assert set(counts) == {(~special[: len(ids) // 50]).sum()}


def test_a_masker_that_cannot_be() -> None:
    tokenizer = _tokenizer()
    with pytest.raises(InputError, match="rate"):
        Masker(tokenizer, rate=2.0)
    with pytest.raises(InputError, match="not in the vocabulary"):
        Masker(tokenizer)([99], [0, 1])
    with pytest.raises(InputError, match="cu_seqlens"):
        Masker(tokenizer)([5, 6], [0, 1])
    tokenizer.mask_token = None
    with pytest.raises(InputError, match="no mask token"):
        Masker(tokenizer)
