"""Schemes of tags, against the same entities written by hand, and what conlleval makes of sequences that are none."""

import pytest

from fastbert.tasks.tagging.schemes import (
    BILOU,
    BIOES,
    IOB1,
    IOB2,
    SCHEMES,
    Span,
    has_scheme,
    is_valid,
    scheme_of,
    spans,
    written,
)
from tests.optional import given, st

pytest.importorskip("seqeval")

# PER of one word, PER of two behind it at once, O, LOC of three, PER at once behind another type.
ENTITIES = [Span("PER", 0, 1), Span("PER", 1, 3), Span("LOC", 4, 7), Span("PER", 7, 8)]
WRITTEN = {
    IOB1: "I-PER B-PER I-PER O I-LOC I-LOC I-LOC I-PER",
    IOB2: "B-PER B-PER I-PER O B-LOC I-LOC I-LOC B-PER",
    BIOES: "S-PER B-PER E-PER O B-LOC I-LOC E-LOC S-PER",
    BILOU: "U-PER B-PER L-PER O B-LOC I-LOC L-LOC U-PER",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_entities_in_every_scheme(scheme: str) -> None:
    tags = WRITTEN[scheme].split()
    assert spans(tags) == ENTITIES
    assert written(ENTITIES, 8, scheme) == tags
    assert is_valid(tags, ENTITIES, scheme)
    assert not any(is_valid(WRITTEN[other].split(), ENTITIES, scheme) for other in SCHEMES if other != scheme)
    assert scheme_of([["O", "O"], tags]) == scheme


@pytest.mark.parametrize(
    ("scheme", "tags", "entities"),
    [
        (IOB1, "O B-PER", [("PER", 1, 2)]),
        (IOB1, "I-LOC B-PER", [("LOC", 0, 1), ("PER", 1, 2)]),
        (IOB2, "O I-PER I-PER", [("PER", 1, 3)]),
        (IOB2, "B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        (BIOES, "B-PER O", [("PER", 0, 1)]),
        (BIOES, "I-PER E-PER", [("PER", 0, 2)]),
        (BIOES, "S-PER E-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        (BILOU, "B-PER U-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        (BILOU, "B-PER I-PER", [("PER", 0, 2)]),
    ],
)
def test_what_is_wrong_is_seen_and_read_as_conlleval_does(
    scheme: str, tags: str, entities: list[tuple[str, int, int]]
) -> None:
    found = spans(tags.split())
    assert found == entities
    assert not is_valid(tags.split(), found, scheme)


def test_a_scheme_is_known_by_its_sentences() -> None:
    assert scheme_of([["I-PER", "O"], ["O", "I-LOC", "I-LOC"]]) == IOB1
    assert scheme_of([["B-PER", "O"], ["O", "B-LOC", "B-LOC"]]) == IOB2
    assert scheme_of([["B-PER", "I-PER"]] * 3 + [["O", "I-PER"]]) == IOB2  # with a mistake
    assert scheme_of([["I-PER", "I-PER"]] * 3 + [["O", "B-PER"]]) == IOB1
    assert scheme_of([["O", "S-PER"]]) == BIOES
    assert scheme_of([["O", "U-PER"]]) == BILOU
    assert scheme_of([["B", "I", "O"]]) == IOB2
    assert written(spans(["I", "I", "O"]), 3, BIOES) == ["B", "E", "O"]
    assert scheme_of([["O", "O"]]) is None
    assert scheme_of([["NN", "IN", "B-X"]]) is None
    assert spans(["B-a-b", "I-a-b"]) == [("a-b", 0, 2)]


def test_tags_of_no_scheme() -> None:
    assert not has_scheme(["DT", "NN", "SYM", "-LRB-", "O"])
    assert not has_scheme(["O"])
    assert has_scheme(["O", "B-PER", "PER"])  # so that PER is a mistake


@given(
    entities=st.lists(st.tuples(st.sampled_from(["PER", "LOC"]), st.integers(1, 3), st.integers(0, 2)), max_size=5),
    scheme=st.sampled_from(SCHEMES),
)
def test_whatever_is_written_is_read_again(entities: list[tuple[str, int, int]], scheme: str) -> None:
    made, place = [], 0
    for kind, length, blank in entities:
        made.append(Span(kind, place, place + length))
        place += length + blank
    assert spans(written(made, place, scheme)) == made
