"""Sentence pairs, full sentences and batches from the C++ core: laws, distributions, the same for every schedule."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.data.pretraining import Batch, Phase, PretrainingBatches, Sampling
from fastbert.errors import InputError
from tests.corpora import SPECIAL, MemoryPart, MemoryStore, numbered_store, random_store
from tests.optional import given, settings, st

_C = pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")
NO_MASKS = {"mask_rate": 0.0}


def _batches(
    store: MemoryStore, length: int = 64, steps: int = 4, phases: tuple[Phase, ...] = (), **options: Any
) -> PretrainingBatches:
    schedule = {key: options.pop(key) for key in ("rank", "world_size", "accumulation", "threads") if key in options}
    if "batch_tokens" in options:
        options["batch_size"] = None
    return PretrainingBatches(store, Sampling(**options), phases or (Phase(length, steps),), **schedule)


def _sequences(batch: Batch, name: str = "input_ids") -> list[list[int]]:
    bounds = batch["cu_seq_lens_q"].tolist()
    return [batch[name][0, a:b].tolist() for a, b in itertools.pairwise(bounds)]


def _one_epoch(store: MemoryStore, length: int, **options: Any) -> list[tuple[list[int], list[int], int]]:
    """Ids, token types and next-sentence label of each sequence of the first epoch."""
    batches = _batches(store, length, 1, **options)
    sampler = batches._samplers[0]
    found, document = [], 0
    while document < sampler.documents:
        plan = sampler.plan(0, document)
        batch = batches._write(sampler, [(plan, np.arange(len(plan)))])
        labels = batch.get("next_sentence_label", torch.full((len(plan),), -1)).tolist()
        found += list(zip(_sequences(batch), _sequences(batch, "token_type_ids"), labels, strict=True))
        document = plan.next_document
    return found


def _same(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[name].dtype
            assert torch.equal(value, b[name]), name
        else:
            assert value == b[name], name


def test_what_a_batch_is() -> None:
    for batch in _batches(random_store(), batch_size=32):
        T, B = batch["input_ids"].shape[1], 32
        assert {t.shape for t in (batch["token_type_ids"], batch["position_ids"], batch["labels"])} == {(1, T)}
        assert batch["next_sentence_label"].shape == (B,)
        assert batch["cu_seq_lens_q"].dtype == torch.int32
        lengths = batch["cu_seq_lens_q"].diff()
        assert batch["cu_seq_lens_q"][0] == 0
        assert batch["cu_seq_lens_q"][-1] == T
        assert batch["max_length_q"] == lengths.max() <= 64
        assert torch.equal(batch["label_rows"], (batch["labels"][0] != -100).nonzero()[:, 0])
        for ids, types, positions in zip(
            *(_sequences(batch, name) for name in ("input_ids", "token_type_ids", "position_ids")), strict=True
        ):
            assert positions == list(range(len(ids)))
            assert ids[0] == SPECIAL.cls
            first, last = (i for i, token in enumerate(ids) if token == SPECIAL.sep)
            assert last == len(ids) - 1
            assert types == [0] * (first + 1) + [1] * (last - first)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=8), min_size=2, max_size=6),
    length=st.integers(5, 300),
    short=st.floats(0, 1),
    seed=st.integers(0, 2**40),
)
def test_pairs_are_pieces_of_the_text(lengths: list[list[int]], length: int, short: float, seed: int) -> None:
    """A and B are runs of consecutive tokens; B follows A, or comes from another document, as the label says."""
    store = numbered_store(lengths)
    document_of = np.repeat(np.arange(len(lengths)), [sum(document) for document in lengths])
    seen = set()
    for ids, types, label in _one_epoch(store, length, **NO_MASKS, short_sequences=short, seed=seed, batch_size=1):
        assert 5 <= len(ids) <= length
        a = [i for i, t in zip(ids[1:-1], types[1:-1], strict=True) if t == 0][:-1]
        b = [i for i, t in zip(ids[1:-1], types[1:-1], strict=True) if t == 1]
        assert a
        assert b
        for run in (a, b):
            assert run == list(range(run[0], run[0] + len(run)))
        first, second = document_of[a[0] - 5], document_of[b[0] - 5]
        assert {document_of[i - 5] for i in a} == {first}
        assert {document_of[i - 5] for i in b} == {second}
        if label == 1:
            assert first != second
        else:
            assert first == second
            assert a[-1] < b[0]
            seen |= set(b)
        assert not seen & set(a)
        seen |= set(a)
    if length > 3 + 2 * max(sum(document) for document in lengths):
        assert len(seen) == sum(map(sum, lengths)), "nothing was truncated, so every token is in some A, or B behind it"


def test_half_the_partners_are_random() -> None:
    """Where documents go on. B follows A directly, up to what truncation takes."""
    store = numbered_store([[9] * 40 for _ in range(400)])
    labels = np.array([label for _, _, label in _one_epoch(store, 64, **NO_MASKS)])
    assert abs(labels.mean() - 0.5) < 5 * 0.5 / math.sqrt(len(labels)) + 0.5 * 400 / len(labels)


def test_partners_are_uniform_over_the_other_documents() -> None:
    count = 40
    store = numbered_store([[7] * 8 for _ in range(count)])
    starts, others = np.zeros(8), np.zeros((count, count))
    for seed in range(60):
        for ids, types, label in _one_epoch(store, 16, **NO_MASKS, short_sequences=0.0, seed=seed):
            if label == 1:
                first = (ids[1] - 5) // 56
                b = ids[types.index(1)] - 5
                others[first, b // 56] += 1
                starts[b % 56 // 7] += 1
    assert not others.diagonal().any()
    off = others.sum() / (count * (count - 1))
    per_partner = others.sum(0)
    statistic = ((per_partner - off * (count - 1)) ** 2 / (off * (count - 1))).sum()
    assert abs(statistic - (count - 1)) < 5 * math.sqrt(2 * count)
    assert abs(starts / starts.mean() - 1).max() < 0.15


def test_short_sequences() -> None:
    store = numbered_store([[1] * 4000 for _ in range(20)])
    lengths = np.array([len(ids) for ids, _, _ in _one_epoch(store, 128, **NO_MASKS, short_sequences=0.1)])
    whole = (lengths == 128).mean()
    assert 0.85 < whole < 0.92
    short = lengths[lengths < 128]
    assert 50 < short.mean() < 82
    assert short.min() < 15


def test_truncation_takes_from_both_ends_and_from_the_longer() -> None:
    store = numbered_store([[50, 50, 50, 50] for _ in range(300)])
    fronts, backs, both = [], [], []
    for ids, types, _ in _one_epoch(store, 43, **NO_MASKS, short_sequences=0.0):
        a, b = ids[1 : types.index(1) - 1], ids[types.index(1) : -1]
        both.append((len(a), len(b)))
        if len(a) < 50:
            fronts.append((a[0] - 5) % 50)
            backs.append(49 - (a[-1] - 5) % 50)
    assert set(both) == {(20, 20)}
    assert np.mean(fronts) == pytest.approx(15, rel=0.05)
    assert np.mean(backs) == pytest.approx(15, rel=0.05)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=8), min_size=1, max_size=100),
    length=st.integers(5, 80),
    seed=st.integers(0, 2**40),
)
def test_full_sentences_hold_the_whole_text_once(lengths: list[list[int]], length: int, seed: int) -> None:
    store = numbered_store(lengths)
    tokens = sum(map(sum, lengths))
    document_of = np.repeat(np.arange(len(lengths)), [sum(document) for document in lengths])
    seen: list[int] = []
    for ids, types, _ in _one_epoch(store, length, **NO_MASKS, objective="mlm", seed=seed, batch_size=1):
        assert len(ids) <= length
        assert ids[0] == SPECIAL.cls
        assert ids[-1] == SPECIAL.sep
        assert not any(types)
        pieces = [list(piece) for is_sep, piece in itertools.groupby(ids[1:], lambda i: i == SPECIAL.sep) if not is_sep]
        assert len(pieces) == ids.count(SPECIAL.sep)
        documents = []
        for piece in pieces:
            assert piece == list(range(piece[0], piece[0] + len(piece)))
            documents.append({document_of[i - 5] for i in piece}.pop())
            assert {document_of[i - 5] for i in piece} == {documents[-1]}
            seen += piece
        assert len(set(documents)) == len(documents)
    assert sorted(seen) == list(range(5, 5 + tokens))


def test_full_sentences_are_full() -> None:
    lengths = np.array([len(ids) for ids, _, _ in _one_epoch(random_store(2000), 256, objective="mlm")])
    assert lengths.mean() > 230
    assert lengths.max() <= 256


def test_left_to_right_labels_are_the_next_tokens() -> None:
    for batch in _batches(random_store(), objective="left-to-right", batch_size=16):
        assert "labels" not in batch
        assert "next_sentence_label" not in batch
        for ids, labels in zip(_sequences(batch), _sequences(batch, "shift_labels"), strict=True):
            assert labels == [*ids[1:], -100]
        assert torch.equal(batch["label_rows"], (batch["shift_labels"][0] != -100).nonzero()[:, 0])


@pytest.mark.parametrize("options", [{"batch_size": 24}, {"batch_tokens": 1024}], ids=["sequences", "tokens"])
@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_the_same_for_threads_processes_and_parts(options: dict[str, int], objective: str) -> None:
    """1 process that accumulates 4 batches, 2 that accumulate 2, 4 that accumulate none; 1 thread or 5."""
    store, options = random_store(), {**options, "objective": objective, "window_tokens": 3000}
    whole = list(_batches(store, accumulation=4, threads=1, **options))
    assert len(whole) == 16
    for world_size in (2, 4):
        for rank in range(world_size):
            part = _batches(store, rank=rank, world_size=world_size, accumulation=4 // world_size, threads=5, **options)
            for mine, all_of_it in zip(part, whole[rank::world_size], strict=True):
                _same(mine, all_of_it)
    joined = MemoryStore([_joined(store.parts)])
    for again, before in zip(_batches(joined, accumulation=4, **options), whole, strict=True):
        _same(again, before)


def _joined(parts: list[MemoryPart]) -> MemoryPart:
    tokens, sentences = np.concatenate([part.tokens for part in parts]), [np.zeros(1, np.uint32)]
    documents = [np.zeros(1, np.uint32)]
    for part in parts:
        sentences.append(part.sentences[1:] + sentences[-1][-1])
        documents.append(part.documents[1:] + documents[-1][-1])
    return MemoryPart(tokens, np.concatenate(sentences), np.concatenate(documents))


@pytest.mark.parametrize(
    "options", [{"batch_size": 24}, {"batch_tokens": 1024}, {"batch_size": 24, "objective": "mlm"}], ids=str
)
def test_a_resume_goes_on_where_it_stopped(options: dict[str, Any]) -> None:
    """At every step, also between phases and at the end, across epochs and windows."""
    store = random_store(90)
    phases, options = (Phase(32, 13), Phase(64, 9)), {**options, "window_tokens": 4000}
    undisturbed = _batches(store, phases=phases, **options)
    whole = list(undisturbed)
    assert len(whole) == 22
    states = [undisturbed.state_dict(step) for step in range(23)]
    for step, state in enumerate(states):
        resumed = _batches(store, phases=phases, **options)
        resumed.load_state_dict(state)
        assert resumed.state_dict(step) == state
        for again, before in zip(resumed, whole[step:], strict=True):
            _same(again, before)
        for later in range(step, 23):
            assert resumed.state_dict(later) == states[later]


def test_states_that_are_none() -> None:
    batches = _batches(random_store())
    good = batches.state_dict(0)
    for bad in ({}, {**good, "more": 1}, {**good, "step": -1}, {**good, "step": "1"}, {**good, "step": 5}):
        with pytest.raises(InputError, match="state"):
            batches.load_state_dict(bad)


def test_masks_are_fresh_every_epoch_or_static() -> None:
    store = random_store(20)

    def epochs(**options: Any) -> list[set[tuple[tuple[int, ...], tuple[int, ...]]]]:
        batches = _batches(store, batch_size=1, **options)
        sampler = batches._samplers[0]
        found = []
        for epoch in range(4):
            plan = sampler.plan(epoch, 0)
            batch = batches._write(sampler, [(plan, np.arange(len(plan)))])
            found.append({*zip(map(tuple, _sequences(batch)), map(tuple, _sequences(batch, "labels")), strict=True)})
        return found

    fresh = epochs()
    assert all(len(a & b) < 0.1 * len(a) for a, b in itertools.combinations(fresh, 2))
    static = epochs(static_copies=2)
    assert static[0] == static[2]
    assert static[1] == static[3]
    assert len(static[0] & static[1]) < 0.1 * len(static[0])


def test_an_epoch_sees_every_document_and_in_another_order() -> None:
    store = numbered_store([[3, 3] for _ in range(300)])

    def order(epoch: int) -> list[int]:
        batches = _batches(store, batch_size=1, objective="mlm", window_tokens=1, mask_rate=0.0)
        sampler, found, document = batches._samplers[0], [], 0
        while document < sampler.documents:
            plan = sampler.plan(epoch, document)
            batch = batches._write(sampler, [(plan, np.arange(len(plan)))])
            found.append(sorted({(i - 5) // 6 for i in batch["input_ids"][0].tolist() if i >= 5}))
            document = plan.next_document
        assert len(found) > 3
        assert sorted(itertools.chain(*found)) == list(range(300))
        return list(itertools.chain(*found))

    orders = [order(epoch) for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert abs(np.corrcoef(orders[0], np.arange(300))[0, 1]) < 0.9  # windows are sorted inside here


def test_token_budgets_are_kept_and_filled() -> None:
    store = random_store(2000)
    tokens = [batch["input_ids"].shape[1] for batch in _batches(store, 128, 30, batch_tokens=4096)]
    assert max(tokens) <= 4096
    assert np.mean(tokens) > 0.995 * 4096
    for batch in _batches(store, 128, 8, batch_tokens=4096, grouping="by-length"):
        lengths = batch["cu_seq_lens_q"].diff()
        assert lengths.max() - lengths.min() <= 10
        assert lengths.sum() <= 4096


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    extra=st.integers(0, 200),
    grouping=st.sampled_from(["packed", "by-length"]),
)
def test_groups_hold_everything_once(lengths: list[int], extra: int, grouping: str) -> None:
    budget = max(lengths, default=1) + extra
    sizes = np.array(lengths, np.int64)
    order, offsets = _C.group_into_batches(sizes, budget, grouping=grouping, seed=1, epoch=2, index=3)
    assert sorted(order) == list(range(len(lengths)))
    assert offsets[0] == 0
    assert offsets[-1] == len(lengths)
    loads = [sizes[order[a:b]].sum() for a, b in itertools.pairwise(offsets)]
    assert all(0 < load <= budget for load in loads)
    if grouping == "packed" and len(loads) > 1:
        assert sorted(loads)[0] + sorted(loads)[1] > budget, "two batches would have been one"


def test_wide_tokens_are_the_same_as_narrow_ones() -> None:
    narrow, wide = (list(_batches(random_store(dtype=dtype))) for dtype in (np.uint16, np.uint32))
    for a, b in zip(narrow, wide, strict=True):
        _same(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nsp"}, "objective"),
        ({"masking": "words"}, "whole-word"),
        ({"batch_size": 25, "accumulation": 2}, "25"),
        ({"batch_size": 24, "batch_tokens": 64, "both": True}, "exactly one"),
        ({"batch_tokens": 40}, "shorter than a sequence"),
        ({"mask_rate": 2.0}, "rate"),
        ({"length": 4}, "max_length"),
        ({"length": 70000}, "max_length"),
        ({"short_sequences": -1.0}, "short"),
        ({"static_copies": -1}, "static_copies"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"grouping": "random", "batch_tokens": 999}, "packed, by-length"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    if options.pop("both", False):
        with pytest.raises(InputError, match=message):
            PretrainingBatches(random_store(), Sampling(**options), (Phase(16, 1),))
        return
    with pytest.raises((InputError, ValueError), match=message):
        list(_batches(random_store(), **options))


def test_a_corpus_that_cannot_be() -> None:
    store = random_store(10)
    store.parts[1].tokens[7] = 600
    with pytest.raises(InputError, match="part 1 holds a token that is not in the vocabulary"):
        list(_batches(store, 64, 20))
    for name in ("sentences", "documents"):
        store = random_store(10)
        getattr(store.parts[2], name)[1] = 10**6
        with pytest.raises(InputError, match=f"part 2: its {name} do not add up"):
            _batches(store)
    with pytest.raises(InputError, match="at least two documents"):
        list(_batches(random_store(1, parts=1)))


def test_iteration_can_be_left() -> None:
    """The thread that makes batches ends with the iteration."""
    import threading

    before = threading.active_count()
    for batch in _batches(random_store(), steps=1000):
        assert batch
        break
    assert threading.active_count() == before
