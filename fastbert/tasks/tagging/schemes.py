"""Tags of words that say where entities are, in four schemes: read, checked, and written anew.

A tag is a letter and a type, as B-PER, or O where there is no entity; where all entities are of one type, the letter
alone. IOB1 has I, and B only where an entity follows another one of its type at once. IOB2 begins every entity with B.
BIOES ends one with E, and one of a single word is S; BILOU calls these L and U.

Entities are read by seqeval's get_entities, which reads as conlleval does and makes something of every sequence: of
O I-PER an entity, too. Source: https://www.clips.uantwerpen.be/conll2000/chunking/output.html,
https://github.com/chakki-works/seqeval.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
IOB1, IOB2, BIOES, BILOU = SCHEMES = ("IOB1", "IOB2", "BIOES", "BILOU")
_TAG = re.compile(r"[BIESLU](-.+)?", re.DOTALL)
_NO_TYPE = "_"  # seqeval's
_AS_BIOES = {"L": "E", "U": "S"}
_AS_BILOU = {"E": "L", "S": "U"}


class Span(NamedTuple):
    """An entity: its type, its first word, and the one behind its last."""

    type: str
    start: int
    end: int


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities of a sentence, in whatever scheme it is."""
    from seqeval.metrics.sequence_labeling import get_entities

    read = [_AS_BIOES.get(tag[:1], tag[:1]) + tag[1:] for tag in tags]
    return [Span(kind, first, last + 1) for kind, first, last in get_entities(read)]


def written(entities: Iterable[Span], length: int, scheme: str) -> list[str]:
    """The tags of a sentence with these entities, which stand in order."""
    tags = [OUTSIDE] * length
    before = Span("", 0, 0)
    for entity in entities:
        kind, start, end = entity
        suffix = "" if kind == _NO_TYPE else f"-{kind}"
        letters = ["I"] * (end - start)
        if scheme != IOB1 or (before.type, before.end) == (kind, start):
            letters[0] = "B"
        if scheme in (BIOES, BILOU):
            letters[-1] = "S" if end - start == 1 else "E"
        if scheme == BILOU:
            letters = [_AS_BILOU.get(letter, letter) for letter in letters]
        tags[start:end] = [letter + suffix for letter in letters]
        before = entity
    return tags


def has_scheme(tags: Iterable[str]) -> bool:
    """Whether these are of a scheme: all but O have its letters; beside O, some with B or I are enough."""
    known = set(tags)
    others = known - {OUTSIDE}
    like = {tag for tag in others if _TAG.fullmatch(tag)}
    with_type = {tag for tag in like if tag[:2] in ("B-", "I-")}
    return bool(others) and (like == others or (OUTSIDE in known and bool(with_type)))


def is_tag(tag: str) -> bool:
    """Whether it can be one of a scheme's."""
    return tag == OUTSIDE or _TAG.fullmatch(tag) is not None


def scheme_of(sentences: Sequence[Sequence[str]]) -> str | None:
    """The scheme of a file's sentences; None where tags are of none, or O alone.

    Between IOB1 and IOB2, which have the same tags, the one in which fewer sentences are wrong: where there is an
    entity at all, no sentence is right in both.
    """
    known = {tag for tags in sentences for tag in tags}
    if not has_scheme(known):
        return None
    letters = {tag[0] for tag in known if is_tag(tag)}
    if letters & set("LU"):
        return BILOU
    if letters & set("ES"):
        return BIOES
    pairs = [(tags, spans(tags)) for tags in sentences]
    return min((IOB2, IOB1), key=lambda scheme: sum(not is_valid(*pair, scheme) for pair in pairs))


def is_valid(tags: Sequence[str], entities: Iterable[Span], scheme: str) -> bool:
    """Whether the scheme writes a sentence's entities just so."""
    return written(entities, len(tags), scheme) == list(tags)
