"""Texts and pairs to ids, against transformers' own call."""

import random
import threading
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.classifier import Classifier
from fastbert.inference.encoding import Encoder, backend_of
from tests.heads import DOCUMENTS, LONG, QUERY, byte_level, checkpoint, shouting, word_piece


def _with_added_tokens() -> PreTrainedTokenizerBase:
    tokenizer = word_piece()
    tokenizer.add_tokens(["zebra", "big red"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["[E1]"]})
    return tokenizer


def _left() -> PreTrainedTokenizerBase:
    tokenizer = byte_level()
    tokenizer.truncation_side = "left"
    return tokenizer


def _split_special_tokens() -> PreTrainedTokenizerBase:
    tokenizer = word_piece()
    tokenizer.split_special_tokens = True
    return tokenizer


TOKENIZERS = {
    "special tokens are text": _split_special_tokens,
    "word piece": word_piece,
    "byte level": byte_level,
    "added tokens": _with_added_tokens,
    "cut on the left": _left,
    "of its own": shouting,
}


def _texts(count: int) -> list[str]:
    draw = random.Random(0)
    words = ["the", "cats", "zebra", "big", "red", "[E1]", "bird,", "tree", " ", "[SEP]", "sang", "é", "\u200b"]
    return [" ".join(draw.choices(words, k=draw.randrange(30))) for _ in range(count)]


@pytest.mark.parametrize("max_length", [7, 20])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_types_and_cuts_are_transformers(name: str, max_length: int) -> None:
    tokenizer = TOKENIZERS[name]()
    texts = _texts(80)
    items = [*texts[:40], *zip(texts[:40], texts[40:], strict=True), ("", ""), ("a dog", ""), ("", LONG)]
    assert (backend_of(tokenizer) is None) == (name == "of its own")
    encode = Encoder(tokenizer, max_length, types=True)
    actual = encode(items)
    ids, types, lengths, cut = [], [], [], 0
    for item in items:
        parts = [[text] for text in ([item] if isinstance(item, str) else item)]
        row = tokenizer(*parts, truncation=True, max_length=max_length, return_token_type_ids=True)
        ids += row["input_ids"][0]
        types += row["token_type_ids"][0]
        lengths.append(len(row["input_ids"][0]))
        cut += len(tokenizer(*parts)["input_ids"][0]) > lengths[-1]
    assert actual.ids.tolist() == ids
    assert actual.types is not None
    assert actual.types.tolist() == types
    assert actual.lengths.tolist() == lengths
    assert actual.cut == cut > 0
    alone = [encode([item]) for item in items]
    assert [i for each in alone for i in each.ids.tolist()] == ids
    assert [i for each in alone for i in ([0] * len(each.ids) if each.types is None else each.types.tolist())] == types
    assert [length for each in alone for length in each.lengths.tolist()] == lengths
    assert sum(each.cut for each in alone) == cut


def test_single_texts_have_no_types() -> None:
    encode = Encoder(word_piece(), 20, types=True)
    assert encode([QUERY]).types is None
    assert Encoder(word_piece(), 20, types=False)([(QUERY, QUERY)]).types is None


def test_a_template_may_give_single_texts_types() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_piece()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:1 $A:1", pair="[CLS]:1 $A:1 $B:0", special_tokens=[("[CLS]", 2)]
    )
    types = Encoder(tokenizer, 20, types=True)([QUERY]).types
    assert types is not None
    assert types.tolist() == [1] * 5


def test_nobody_elses_settings_are_seen_or_changed() -> None:
    tokenizer = word_piece()
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=64)
    backend.enable_truncation(5)
    before = backend.to_str()
    encode = Encoder(tokenizer, 20, types=True)
    assert encode([LONG, QUERY]).lengths.tolist() == [20, 6]
    assert backend.to_str() == before
    tokenizer([QUERY], truncation=True, max_length=3)
    assert encode([LONG]).lengths.tolist() == [20]


def test_threads_share_a_tokenizer() -> None:
    tokenizer, wrong = word_piece(), []

    def run(max_length: int) -> None:
        encode = Encoder(tokenizer, max_length, types=False)
        for _ in range(100):
            if encode([LONG]).lengths.tolist() != [max_length]:
                wrong.append(max_length)
            tokenizer([LONG], truncation=True, max_length=max_length + 1)

    threads = [threading.Thread(target=run, args=(max_length,)) for max_length in (7, 11, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    return Classifier.from_pretrained(checkpoint(tmp_path_factory.mktemp("m"), "BertForSequenceClassification"))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("the cat", "one string is given where a list is needed"),
        ([QUERY, None], "item 1 must be a text or a pair of texts, but is None"),
        ([QUERY, 0.5], r"item 1 .* 0\.5"),
        ([("a", "b", "c")], "item 0 must be"),
        ([("a", None)], r"item 0 .*\('a', None\)"),
        ([b"bytes"], "item 0 must be"),
        ([*[QUERY] * 1500, "half \ud83d"], "item 1500 is no valid Unicode"),
        ([(QUERY, "\udc00")], "item 0 is no valid Unicode"),
    ],
)
def test_what_is_no_text_is_named(engine: Classifier, items: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        engine.tokenize(items)
    assert "\n" not in str(caught.value)


def test_texts_and_pairs_may_be_mixed_over_many_chunks(engine: Classifier) -> None:
    items = [*DOCUMENTS * 300, *[(QUERY, QUERY)] * 3]
    reported: list[int] = []
    tokens = engine.tokenize(iter(items), reported.append)
    assert len(tokens.lengths) == len(items) == sum(reported)
    assert len(reported) > 1
    assert tokens.types is not None
    assert tokens.types.sum() == 3 * 5
    assert tokens.cut == 300


def test_the_length_may_be_changed(engine: Classifier) -> None:
    before = engine.max_length
    assert engine.tokenize([LONG]).lengths.tolist() == [before]
    engine.max_length = 9
    assert engine.tokenize([LONG]).lengths.tolist() == [9]
    engine.max_length = before
