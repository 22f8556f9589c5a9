"""Vocabularies: which of them tokenizers are made of, and those that are trained."""

import random
from pathlib import Path

import numpy as np
import pytest

from fastbert.data import vocabulary
from fastbert.data.prepare import train_vocabulary
from fastbert.data.readers import Reader
from fastbert.data.store import Store
from fastbert.data.vocabulary import load_tokenizer
from fastbert.errors import InputError
from tests.stores import FABLES, SPECIAL, decoded, fables, faulty_texts, make_store, write, write_vocabulary

VOCABULARIES = Path(__file__).parents[2] / "shared/data/vocab"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return faulty_texts(tmp_path_factory.mktemp("texts"))


class TestVocabulary:
    @pytest.mark.parametrize(
        ("words", "cased", "said"),
        [
            (["fox", "##x", "caf", "e", "##e", "[unused1]", "<S>"], None, "uncased"),
            (["fox", "##x", "Fox"], None, "cased"),
            (["fox", "##X"], None, "cased"),
            (["fox", "Fox"], False, "uncased"),
            (["fox", "##x"], True, "cased"),
        ],
    )
    def test_cased_as_its_words_or_as_asked(
        self, tmp_path: Path, words: list[str], cased: bool | None, said: str
    ) -> None:
        tokenizer = load_tokenizer(str(write_vocabulary(tmp_path / "vocab.txt", words)), cased)
        assert tokenizer.tokenize("fox") == ["fox"]
        assert tokenizer.tokenize("Fox") == (["fox"] if said == "uncased" else ["Fox"] if "Fox" in words else ["[UNK]"])
        # What is saved says which it is, and cannot be had otherwise.
        tokenizer.save_pretrained(tmp_path / "saved")
        for source in (tmp_path / "saved", tmp_path / "saved/tokenizer.json"):
            assert load_tokenizer(str(source), said == "cased").tokenize("Fox") == tokenizer.tokenize("Fox")
            with pytest.raises(InputError, match=f"is {said}, whatever the option says"):
                load_tokenizer(str(source), said != "cased")

    def test_accents_go_with_capitals(self, tmp_path: Path) -> None:
        file = write_vocabulary(tmp_path / "vocab.txt", ["cafe", "café", "Café"])
        assert load_tokenizer(str(file)).tokenize("Café café cafe") == ["Café", "café", "cafe"]
        assert load_tokenizer(str(file), False).tokenize("Café café cafe") == ["cafe"] * 3

    def test_chinese_by_character(self, tmp_path: Path) -> None:
        vocabulary = write_vocabulary(tmp_path / "vocab.txt", [*"我们是人a。", "##们", "\u2028", "##\u2028", "##b"])
        file = write(tmp_path / "a.txt", "我们是ab人。我们Ab我。")
        make_store([file], tmp_path / "corpus", vocabulary, language="zh")
        assert decoded(tmp_path / "corpus") == [["我 们 是 a ##b 人 。", "我 们 a ##b 我 。"]]
        store = Store.open(tmp_path / "corpus")
        assert store.vocab_size == 15
        assert store.continuations.nonzero()[0].tolist() == [11, 13, 14]

    def test_a_folder_with_nothing_but_a_vocabulary(self, tmp_path: Path) -> None:
        write_vocabulary(tmp_path / "vocab.txt", ["fox", "Fox"])
        assert load_tokenizer(str(tmp_path)).tokenize("Fox fox") == ["Fox", "fox"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("fox\n", r"vocab\.txt lacks \[PAD\] and \[UNK\] and \[CLS\] and \[SEP\] and \[MASK\]"),
            ("\n".join([*SPECIAL, "fox", "fox"]), r"vocab\.txt has 'fox' twice"),
            (b"\xff", r"vocab\.txt: no tokenizer can be read there"),
        ],
    )
    def test_vocabularies_that_are_none(self, tmp_path: Path, content: str | bytes, message: str) -> None:
        with pytest.raises(InputError, match=message):
            load_tokenizer(str(write(tmp_path / "vocab.txt", content)))

    def test_tokenizers_that_are_none(self, tmp_path: Path) -> None:
        for name, message in (("none.txt", "there is no such file"), ("none", "no such directory")):
            with pytest.raises(InputError, match=message) as error:
                load_tokenizer(str(tmp_path / name))
            assert "\n" not in str(error.value)
        write(tmp_path / "tokenizer.json", "{")
        with pytest.raises(InputError, match=r"tokenizer\.json: no tokenizer can be read there"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))
        saved = load_tokenizer(str(write_vocabulary(tmp_path / "vocab.txt")))
        saved.save_pretrained(tmp_path)
        content = (tmp_path / "tokenizer.json").read_text()
        write(tmp_path / "tokenizer.json", content.replace("[MASK]", "[MUSK]"))
        with pytest.raises(InputError, match=r"tokenizer\.json lacks \[MASK\] or <mask>"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))

    def test_special_tokens_of_a_model_that_knows_them_as_pieces(self, tmp_path: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        pieces = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", "▁a", "b", "▁"]
        backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=1))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.add_special_tokens(pieces[:5])
        backend.save(str(tmp_path / "tokenizer.json"))
        file = write(tmp_path / "a.txt", "a b <s> ab\n\n<mask>")
        prepared = make_store([file], tmp_path / "corpus", tmp_path / "tokenizer.json")
        store = Store.open(tmp_path / "corpus")
        assert not np.isin(store.parts[0].tokens, [0, 2, 3, 4]).any()
        assert store.special.cls == 2
        assert store.continuations.nonzero()[0].tolist() == [6]
        assert prepared.problems.counts["a special token's name in the text"] == 2

    @pytest.mark.skipif(not VOCABULARIES.is_dir(), reason="needs BERT's vocabularies in ../shared")
    @pytest.mark.parametrize(
        ("name", "size", "ids"),
        [
            ("bert-base-uncased", 30_522, [1996, 7668]),
            ("bert-base-cased", 28_996, [1109, 21036]),
            ("bert-base-chinese", 21_128, [8174, 8377]),
        ],
    )
    def test_berts_own(self, name: str, size: int, ids: list[int]) -> None:
        tokenizer = load_tokenizer(str(VOCABULARIES / f"{name}.txt"))
        assert len(tokenizer) == size
        assert tokenizer("The Café", add_special_tokens=False).input_ids == ids


class TestTraining:
    def test_the_same_text_gives_the_same_vocabulary(self, texts: list[Path]) -> None:
        made = {tuple(train_vocabulary(texts, Reader(), 1500, cased=False).get_vocab().items()) for _ in range(3)}
        assert len({tuple(sorted(words, key=lambda word: word[1])) for words in made}) == 1

    def test_the_vocabulary(self) -> None:
        tokenizer = train_vocabulary([FABLES], Reader(), 700, cased=False)
        words = tokenizer.convert_ids_to_tokens(range(700))
        assert len(tokenizer) == len(set(words)) == 700
        assert words[:5] == SPECIAL
        assert all(word == word.lower() for word in words[5:])
        assert {"the", "and", "fox", "##ed", "a", "##a", "z", "##z"} <= set(words)
        assert "##," not in words
        unknown = sum(tokenizer(fable["text"]).input_ids.count(1) for fable in fables())
        assert unknown == 0

    def test_cased(self) -> None:
        words = train_vocabulary([FABLES], Reader(), 700, cased=True).get_vocab()
        assert "The" in words
        assert "the" in words

    def test_an_alphabet_that_covers_the_text(self) -> None:
        """Chinese needs more letters than the usual limit of 1,000 allows; what is rare still has no place."""
        generator = random.Random(0)
        letters = [chr(0x4E00 + i) for i in range(2000)]
        latin = ["".join(generator.choices("abcdefghij", k=6)) for _ in range(1500)]
        text = "".join(letters * 5) + "\u5fff " + " ".join(latin * 2)
        words = vocabulary.train(lambda: [text], 5000, cased=False).get_vocab()
        assert len(words.keys() & set(letters)) >= 1990
        assert "\u5fff" not in words
        assert f"##{letters[0]}" not in words

    def test_too_little_text(self) -> None:
        with pytest.raises(InputError, match=r"the text gives a vocabulary of [12],\d{3} tokens, not of 30,522"):
            train_vocabulary([FABLES], Reader(), 30_522, cased=False)
