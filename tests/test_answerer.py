"""Answers, against a loop over all spans of transformers' windows with stock models, as its pipeline had them."""

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

import fastbert
from fastbert.errors import InputError
from fastbert.inference.answerer import Answer
from tests.heads import DOCUMENTS, LONG, PAIRS, QUERY, checkpoint

FAMILIES = ("Bert", "Roberta", "DistilBert", "Albert", "Electra")
LONGEST, STRIDE = 6, 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {family: checkpoint(tmp_path_factory.mktemp(family), f"{family}ForQuestionAnswering") for family in FAMILIES}


class Reference:
    """Answers of a stock model, by loops over padded windows."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(
        self, question: str, passage: str, *, align: bool = True, impossible: bool = False
    ) -> dict[tuple[int, int], float]:
        """The score of each piece of the passage; (0, 0) for none."""
        batch = self.tokenizer(
            [question],
            [passage],
            truncation="only_second",
            max_length=48,
            stride=STRIDE,
            padding=True,
            return_overflowing_tokens=True,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        output = self.model(**{name: batch[name] for name in names if name in batch})
        found: dict[tuple[int, int], float] = {}
        nulls = []
        for window, (starts, ends) in enumerate(zip(output.start_logits, output.end_logits, strict=True)):
            inside = [i for i, sequence in enumerate(batch.sequence_ids(window)) if sequence == 1]
            start, end = (torch.full_like(x, -torch.inf) for x in (starts, ends))
            start[[0, *inside]], end[[0, *inside]] = starts[[0, *inside]], ends[[0, *inside]]
            start, end = start.softmax(-1), end.softmax(-1)
            nulls.append(float(start[0] * end[0]))
            for s in inside:
                for e in inside:
                    if s <= e < s + LONGEST:
                        where = self._characters(batch, window, s, e, align)
                        if where[0] < where[1]:
                            found[where] = max(found.get(where, 0.0), float(start[s] * end[e]))
        return found | ({(0, 0): min(nulls)} if impossible else {})

    def _characters(self, batch: Any, window: int, s: int, e: int, align: bool) -> tuple[int, int]:
        if not align:
            return batch.token_to_chars(window, s).start, batch.token_to_chars(window, e).end
        a, b = (batch.word_to_chars(window, batch.token_to_word(window, i), sequence_index=1) for i in (s, e))
        return a.start, b.end


def assert_like(actual: list[Answer], expected: dict[tuple[int, int], float], passage: str) -> None:
    best = sorted(expected.values(), reverse=True)[: len(actual)]
    np.testing.assert_allclose([answer.score for answer in actual], best, atol=1e-5, rtol=1e-4)
    for answer in actual:
        assert answer.score == pytest.approx(expected[answer.start, answer.end], rel=1e-4, abs=1e-5)
        assert answer.text == passage[answer.start : answer.end]
    assert len({(answer.start, answer.end) for answer in actual}) == len(actual)


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, {}) for family in FAMILIES]
    + [(family, options) for family in FAMILIES[:2] for options in ({"align": False}, {"impossible": True})],
    ids=str,
)
def test_answers_are_a_loops(folders: dict[str, str], family: str, options: dict[str, bool]) -> None:
    answerer = fastbert.Answerer.from_pretrained(
        folders[family],
        doc_stride=STRIDE,
        max_answer_length=LONGEST,
        align_to_words=options.get("align", True),
        handle_impossible_answer=options.get("impossible", False),
        batch_tokens=100,
    )
    reference = Reference(folders[family])
    pairs = [*((q, p) for q, p in PAIRS if p), ("birds", LONG), ("the zebra?", "cats, zebra's dogs; birds")]
    for actual, pair in zip(answerer.answer_many(pairs, top_k=3), pairs, strict=True):
        assert_like(actual, reference(*pair, **options), pair[1])
        alone = answerer.answer(*pair)  # products of PyTorch's, as ALBERT's embedding has, round by what is in a batch
        assert alone == replace(actual[0], score=pytest.approx(actual[0].score, rel=1e-5))
        if answerer.handle_impossible_answer:
            (null,) = (a for a in answerer.answer_many([pair], top_k=999)[0] if not a.text)
            assert null.score == pytest.approx(reference(*pair, **options)[0, 0], rel=1e-4)
    assert answerer.results(answerer.tokenize(pairs)) == [best for best, *_ in answerer.answer_many(pairs)]
    assert fastbert.report(answerer.model).fallbacks.total() == 0


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_windows_are_transformers(folders: dict[str, str], family: str) -> None:
    answerer = fastbert.Answerer.from_pretrained(folders[family], doc_stride=STRIDE, align_to_words=False)
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    tokens = answerer.tokenize([(QUERY, LONG), ("", "a dog"), (QUERY, "")])
    expected = tokenizer(
        [QUERY, "", QUERY],
        [LONG, "a dog", ""],
        truncation="only_second",
        max_length=48,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert tokens.ids.tolist() == [*chain.from_iterable(expected["input_ids"])]
    assert tokens.lengths.tolist() == [len(row) for row in expected["input_ids"]]
    assert tokens.text_of.tolist() == expected["overflow_to_sample_mapping"]
    types = None if family != "Bert" else [*chain.from_iterable(expected["token_type_ids"])]
    assert (None if tokens.types is None else tokens.types.tolist()) == types
    offsets = [
        offset
        for i, row in enumerate(expected["offset_mapping"])
        for offset, sequence in zip(row, expected.sequence_ids(i), strict=True)
        if sequence == 1
    ]
    assert [*map(tuple, tokens.offsets[tokens.read].tolist())] == offsets
    assert tokens.cut == 0


def test_an_empty_passage_has_no_answer(folders: dict[str, str]) -> None:
    answerer = fastbert.Answerer.from_pretrained(folders["Bert"])
    assert answerer.answer_many([(QUERY, ""), PAIRS[0], (QUERY, " ")], top_k=2)[::2] == [[Answer("", 0, 0, 0.0)]] * 2
    assert answerer.answer_many([]) == []
    unsure = fastbert.Answerer.from_pretrained(folders["Bert"], handle_impossible_answer=True)
    assert unsure.answer(QUERY, "") == Answer("", 0, 0, 1.0)


@pytest.mark.parametrize("max_length", [5, 6, 20, 48])
def test_a_question_leaves_half_of_a_window(folders: dict[str, str], max_length: int) -> None:
    """Where transformers' tokenizer raises, or panics."""
    answerer = fastbert.Answerer.from_pretrained(folders["Bert"], max_length=max_length)
    tokens = answerer.tokenize([(LONG, LONG), ("a", DOCUMENTS[0])])
    assert tokens.cut == 1
    assert tokens.lengths.max() == max_length
    read = np.add.reduceat(tokens.read, tokens.starts)
    room = max_length - 3 - (max_length - 3) // 2
    assert read[tokens.text_of == 0].max() == room
    answer = answerer.answer(LONG, LONG)
    assert answer.text == LONG[answer.start : answer.end] != ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_answer_length": 0}, "max_answer_length must be at least 1"),
        ({"doc_stride": -1}, "doc_stride must be at least 0"),
        ({"max_length": 4}, "max_length must be in"),
    ],
)
def test_options_out_of_range_are_named(folders: dict[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fastbert.Answerer.from_pretrained(folders["Bert"], **options)


def test_what_is_no_pair_is_named(folders: dict[str, str]) -> None:
    answerer = fastbert.Answerer.from_pretrained(folders["Bert"])
    with pytest.raises(InputError, match=r"item 1 must be a pair \(question, passage\), but is 'a dog'"):
        answerer.answer_many([PAIRS[0], "a dog"])
    with pytest.raises(InputError, match="item 0 must be"):
        answerer.answer(QUERY, None)
    with pytest.raises(InputError, match="item 0 is no valid Unicode"):
        answerer.answer(QUERY, "\ud800")
    with pytest.raises(InputError, match="top_k"):
        answerer.answer_many(PAIRS, top_k=0)
