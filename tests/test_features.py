"""Tokenised examples in batches and in Arrow files, data that is set aside, figures with their intervals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastbert.errors import InputError
from fastbert.inference.tokens import Tokens
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Features
from fastbert.tasks.scores import Scores
from fastbert.tasks.split import held_out
from fastbert.training.batches import ShuffledBatches
from tests.optional import given, needs, st

LENGTHS = [3, 1, 4, 2, 5, 1]


def tokens_of(lengths: list[int], *, types: bool = True) -> Tokens:
    T = sum(lengths)
    kinds = (np.arange(T) % 2).astype(np.int8) if types else None
    return Tokens(np.arange(100, 100 + T, dtype=np.int32), np.asarray(lengths, np.int64), 2, kinds, 1)


def of_kind(kind: str) -> Features:
    T, items = sum(LENGTHS), len(LENGTHS)
    ones = np.ones(items, np.int64)
    return {
        "classes": lambda: Features(tokens_of(LENGTHS, types=False), {"labels": np.arange(items)}, ones),
        "several": lambda: Features(tokens_of(LENGTHS), {"labels": np.eye(items, 3, dtype=np.float32)}, ones),
        "numbers": lambda: Features(tokens_of(LENGTHS), {"labels": np.linspace(0, 1, items, dtype=np.float32)}, ones),
        "tokens": lambda: Features(
            tokens_of(LENGTHS), {"labels": np.arange(T)}, np.asarray(LENGTHS, np.int64), per_token=True
        ),
        "choices": lambda: Features(tokens_of(LENGTHS), {"labels": np.asarray([1, 0])}, np.asarray([1, 1]), group=3),
        "spans": lambda: Features(
            tokens_of(LENGTHS), {"start_positions": np.arange(items), "end_positions": np.arange(items) + 1}, ones
        ),
    }[kind]()


KINDS = ["classes", "several", "numbers", "tokens", "choices", "spans"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_has_its_items_and_no_others(kind: str) -> None:
    features = of_kind(kind)
    items = np.asarray([1, 0])
    batch = features.batch(items)
    starts, group = np.cumsum([0, *LENGTHS]), features.group
    rows = [int(i) * group + j for i in items for j in range(group)]
    places = [place for row in rows for place in range(starts[row], starts[row + 1])]
    assert batch["input_ids"].tolist() == [[100 + place for place in places]]
    assert batch["cu_seq_lens_q"].tolist() == np.cumsum([0, *(LENGTHS[row] for row in rows)]).tolist()
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == max(LENGTHS[row] for row in rows)
    assert ("token_type_ids" in batch) == (kind != "classes")
    if kind != "classes":
        assert batch["token_type_ids"].tolist() == [[place % 2 for place in places]]
    for name, values in features.labels.items():
        assert batch[name].tolist() == ([values[places].tolist()] if kind == "tokens" else values[items].tolist())
        assert batch[name].dtype == torch.from_numpy(values).dtype
    assert features.lengths.tolist() == [sum(LENGTHS[i : i + group]) for i in range(0, len(LENGTHS), group)]


@needs("pyarrow")
class TestArrow:
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_read_is_what_was_written(self, kind: str, tmp_path: Path) -> None:
        features, path, about = of_kind(kind), tmp_path / "more" / "features.arrow", {"made_of": "ä"}
        features.write(path, about)
        found = Features.read(path, about)
        assert found is not None
        for name in ("ids", "lengths", "types"):
            equal(getattr(found.tokens, name), getattr(features.tokens, name))
        assert list(found.labels) == list(features.labels)
        for name, values in features.labels.items():
            equal(found.labels[name], values)
        equal(found.weights, features.weights)
        assert (found.per_token, found.group) == (features.per_token, features.group)
        assert (found.tokens.unknown, found.tokens.cut) == (2, 1)
        assert [file.name for file in path.parent.iterdir()] == ["features.arrow"]
        last, same = (of.batch(np.asarray([len(of) - 1])) for of in (found, features))
        assert {name: np.asarray(t).tolist() for name, t in last.items()} == {
            name: np.asarray(t).tolist() for name, t in same.items()
        }

    def test_of_something_else_or_none_there_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "features.arrow"
        assert Features.read(path, {"made_of": "a"}) is None
        of_kind("classes").write(path, {"made_of": "a"})
        assert Features.read(path, {"made_of": "b"}) is None
        assert Features.read(path, {"made_of": "a", "more": "c"}) is None
        of_kind("several").write(path, {"made_of": "b"})
        found = Features.read(path, {"made_of": "b"})
        assert found is not None
        assert found.labels["labels"].shape == (6, 3)

    @pytest.mark.parametrize("keep", [0, 5, 0.5, -3])
    def test_a_damaged_file(self, keep: float, tmp_path: Path) -> None:
        path = tmp_path / "features.arrow"
        of_kind("classes").write(path, {})
        whole = path.read_bytes()
        path.write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)])
        with pytest.raises(InputError, match=r"features\.arrow is damaged: remove it, and it is made anew"):
            Features.read(path, {})

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(InputError, match=r"cannot write .*folder"):
            of_kind("classes").write(tmp_path / "folder", {})
        assert [file.name for file in tmp_path.iterdir()] == ["folder"]


def equal(actual: Any, expected: Any) -> None:
    if expected is None:
        assert actual is None
        return
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == expected.dtype


class TestShuffledBatches:
    def test_an_epoch_has_all_items_once_in_an_order_of_its_own(self) -> None:
        batches = ShuffledBatches(of_kind("classes"), 4, 3, seed=1)
        assert (batches.steps_an_epoch, batches.steps) == (2, 6)
        epochs = [np.concatenate([batches.items(2 * epoch + i) for i in range(2)]) for epoch in range(3)]
        assert [sorted(epoch.tolist()) for epoch in epochs] == [list(range(6))] * 3
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert [batch["weight"] for batch in batches] == [4, 2] * 3

    @pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 2)])
    def test_a_step_has_the_same_items_however_it_is_divided(self, world_size: int, accumulation: int) -> None:
        parts = {"world_size": world_size, "accumulation": accumulation}
        each = [list(ShuffledBatches(of_kind("classes"), 5, 2, 7, rank=r, **parts)) for r in range(world_size)]
        whole = list(ShuffledBatches(of_kind("classes"), 5, 2, 7))
        for step, expected in enumerate(whole):
            some = [batch for of in each for batch in of[step * accumulation : (step + 1) * accumulation]]
            counted = [label for batch in some if batch["weight"] for label in batch["labels"].tolist()]
            assert sorted(counted) == sorted(expected["labels"].tolist())
            assert sum(batch["weight"] for batch in some) == expected["weight"]
        assert {len(of) for of in each} == {len(whole) * accumulation}

    def test_goes_on_where_it_was(self) -> None:
        batches, again = (ShuffledBatches(of_kind("classes"), 4, 2, seed=3) for _ in range(2))
        again.load_state_dict(batches.state_dict(3))
        assert [b["labels"].tolist() for b in again] == [b["labels"].tolist() for b in list(batches)[3:]]
        with pytest.raises(InputError, match="this is no state of 6 items"):
            again.load_state_dict({"step": 1, "items": 7})

    def test_more_parts_than_items_are_refused(self) -> None:
        with pytest.raises(InputError, match="a batch of 3 cannot be divided by 2 processes x 2 accumulated"):
            ShuffledBatches(of_kind("classes"), 3, 1, 0, world_size=2, accumulation=2)


def examples_of(rows: list[tuple[str, Any]]) -> Examples:
    examples = Examples("made up")
    for i, (text, label) in enumerate(rows):
        examples.add(text, label, f"line {i}")
    return examples


ROWS = st.lists(st.tuples(st.text("ab", max_size=3), st.sampled_from(["yes", "no"])), min_size=4, max_size=40)


class TestHeldOut:
    @given(ROWS, st.randoms(use_true_random=False), st.sampled_from([0.1, 0.3, 0.5]))
    def test_no_text_is_on_both_sides_whatever_the_order(self, rows: list[Any], draw: Any, share: float) -> None:
        def divided(rows: list[Any]) -> tuple[Any, ...] | None:
            try:
                return held_out(examples_of(rows), share)
            except InputError:
                return None

        shuffled = list(rows)
        draw.shuffle(shuffled)
        found, again = divided(rows), divided(shuffled)
        assert (found is None) == (again is None)
        if found is None or again is None:
            return
        train, dev = found
        assert not set(train.inputs) & set(dev.inputs)
        assert sorted(zip(train.inputs + dev.inputs, train.labels + dev.labels, strict=True)) == sorted(rows)
        assert set(dev.inputs) == set(again[1].inputs)
        assert len(dev) == len(again[1])

    def test_a_share_of_each_class(self) -> None:
        rows = [(f"text {i}", "rare" if i % 10 == 0 else "often") for i in range(200)]
        train, dev = held_out(examples_of(rows), 0.1)
        assert (dev.labels.count("rare"), dev.labels.count("often")) == (2, 18)
        assert len(train) == 180
        assert train.places != [f"line {i}" for i in range(180)], "it takes some from everywhere"

    def test_questions_and_numbers_are_one_class(self) -> None:
        rows = [((f"context {i}", ("a", "b")), i % 2) for i in range(20)]
        train, dev = held_out(examples_of(rows), 0.25)  # type: ignore[arg-type]
        assert (len(train), len(dev)) == (15, 5)

    def test_questions_on_a_passage_stay_together(self) -> None:
        rows = [((f"question {i}", f"passage {i // 3}"), i) for i in range(60)]
        train, dev = held_out(examples_of(rows), 0.1, lambda item: item[1])  # type: ignore[arg-type]
        assert {passage for _, passage in train.inputs}.isdisjoint(passage for _, passage in dev.inputs)
        assert (len(train), len(dev)) == (54, 6)

    def test_what_was_left_out_is_still_told(self) -> None:
        examples = examples_of([(f"text {i}", "a") for i in range(20)])
        examples.problems.add("no label (left out)", "line 5")
        train, dev = held_out(examples, 0.2)
        assert dict(train.problems.counts) == {"no label (left out)": 1}
        assert not dev.problems.counts

    @pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
    def test_mistakes(self, share: float) -> None:
        with pytest.raises(InputError, match=r"the share to set aside must be in \(0, 1\)"):
            held_out(examples_of([("a", "b")]), share)

    def test_too_few_rows(self) -> None:
        with pytest.raises(InputError, match="made up has too few rows to set 10% aside: give dev data"):
            held_out(examples_of([("a", "x"), ("b", "y")]), 0.1)


class TestIntervals:
    def test_are_the_percentiles_of_samples_drawn_again(self) -> None:
        """Of a mean of n values: near the normal interval, 1.96 standard errors either side."""
        right = np.asarray([1.0] * 300 + [0.0] * 100)
        scores = Scores(lambda rows: {"accuracy": float(right[rows].mean())}, 400)
        low, high = scores.intervals()["accuracy"]
        error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
        assert (low, high) == (pytest.approx(0.75 - error, abs=0.01), pytest.approx(0.75 + error, abs=0.01))
        assert scores.intervals() == scores.intervals()

    def test_leave_out_samples_without_a_figure(self) -> None:
        scores = Scores(lambda rows: {"a": float("nan") if 0 in rows else 2.0, "b": float("nan")}, 5)
        found = scores.intervals(50)
        assert found["a"] == (2.0, 2.0)
        assert np.isnan(found["b"]).all()
