"""The tokenizer of a corpus: one that is there, or a WordPiece vocabulary trained on its text."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, trainers

from fastbert import hub
from fastbert.errors import InputError

# What roberta-like tokenizers call them comes second.
_SPECIAL = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
_BERT_SPECIAL = [names[0] for names in _SPECIAL.values()]
_COVERAGE = 0.9995
_SPARE = 30
_FEW = 100
_TEXTS_A_COUNT = 4096


def checksum(source: str) -> str | None:
    """What tells a tokenizer's files from others of the same name; None if they are not on this machine."""
    path = Path(source)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt")
    files = [path / name for name in names] if path.is_dir() else [path]
    contents = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join(contents)).hexdigest() if contents else None


def load_tokenizer(source: str, cased: bool | None = None) -> Any:
    """The transformers tokenizer of a vocab.txt, a tokenizer.json, a folder or the hub.

    Args:
        cased: None to leave it to the source; of a vocab.txt: whether it has capitals.

    Raises:
        InputError: if there is none, it lacks a token that BERT needs, or it contradicts `cased`.
    """
    path = Path(source)
    try:
        if path.is_dir() and (path / "vocab.txt").is_file() and not (path / "tokenizer.json").is_file():
            bare = not (path / "tokenizer_config.json").is_file()
            tokenizer = _of_words(path / "vocab.txt", cased) if bare else _pretrained(source)
        elif path.is_file():
            tokenizer = _of_json(path) if path.suffix == ".json" else _of_words(path, cased)
        elif path.suffix in (".txt", ".json"):
            raise InputError(f"{path}: there is no such file")
        else:
            tokenizer = _pretrained(source)
    except InputError:
        raise
    except Exception as error:  # of every kind, from the hub, from files and from Rust
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: no tokenizer can be read there ({reason})") from error
    lacking = [f"a {name} token" for name in _SPECIAL if getattr(tokenizer, f"{name}_token_id") is None]
    if lacking or not tokenizer.is_fast:
        raise InputError(f"{source} lacks {' and '.join(lacking) or 'a tokenizer.json'}: BERT needs that")
    normalizer = tokenizer.backend_tokenizer.normalizer
    found = normalizer is None or "A" in normalizer.normalize_str("A")
    if cased not in (None, found):
        raise InputError(f"{source} is {'cased' if found else 'uncased'}, whatever the option says")
    return tokenizer


def train(texts: Callable[[], Iterable[str]], size: int, *, cased: bool) -> Any:
    """A BERT tokenizer with a WordPiece vocabulary of these texts, the same for the same texts.

    The alphabet is what makes up 99.95 % of the text, or a hundred letters, or as many as a thirtieth of the tokens,
    whichever is most, but no more than half of the tokens.

    Args:
        texts: called twice.

    Raises:
        InputError: if the texts do not give so many tokens.
    """
    from transformers import BertTokenizer

    backend: Tokenizer = BertTokenizer(do_lower_case=not cased).backend_tokenizer
    backend.model = models.WordPiece(unk_token="[UNK]")
    alphabet = _alphabet(texts(), backend, size)
    # The trainer numbers the letters inside words as its hash tables happen to lie, and breaks ties by number: given
    # as special tokens, they have their numbers before it starts.
    inside = [f"##{letter}" for letter in alphabet if _is_inside_words(letter, backend)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*_BERT_SPECIAL, *inside],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    trained = backend.get_vocab()
    words = list(dict.fromkeys([*_BERT_SPECIAL, *alphabet, *inside, *sorted(trained, key=trained.__getitem__)]))
    if len(words) < size:
        raise InputError(f"the text gives a vocabulary of {len(words):,} tokens, not of {size:,}")
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)}, do_lower_case=not cased)


def _pretrained(source: str) -> Any:
    from transformers import AutoTokenizer

    only_local = hub.only_local(source, "tokenizer.json", "vocab.txt")
    return AutoTokenizer.from_pretrained(source, local_files_only=only_local)


def _of_json(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(path))
    special = {}
    for name, candidates in _SPECIAL.items():
        token = next((token for token in candidates if backend.token_to_id(token) is not None), None)
        if token is None:
            raise InputError(f"{path} lacks {' or '.join(candidates)}: BERT needs that")
        special[f"{name}_token"] = token
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _of_words(path: Path, cased: bool | None) -> Any:
    from transformers import BertTokenizer

    content = path.read_bytes().decode("utf-8-sig")
    # Not splitlines: U+2028 is a token of bert-base-chinese.
    words = [line.removesuffix("\r") for line in content.removesuffix("\n").split("\n")]
    lacking = [token for token in _BERT_SPECIAL if token not in words]
    if lacking:
        raise InputError(f"{path} lacks {' and '.join(lacking)}: it is no vocabulary of BERT")
    vocabulary = {word: i for i, word in enumerate(words)}
    if len(vocabulary) < len(words):
        twice = next(word for i, word in enumerate(words) if vocabulary[word] != i)
        raise InputError(f"{path} has {twice!r} twice")
    if cased is None:
        cased = any(word != word.lower() and word.removeprefix("##").isalpha() for word in words)
    return BertTokenizer(vocab=vocabulary, do_lower_case=not cased)


def _alphabet(texts: Iterable[str], backend: Tokenizer, size: int) -> list[str]:
    counts: Counter[str] = Counter()
    for code, count in _count_characters(texts):
        # One at a time gives what the whole text would: the normaliser maps characters.
        for letter in backend.normalizer.normalize_str(chr(code)):
            if not letter.isspace():
                counts[letter] += count
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))
    covered = accumulate(counts[letter] for letter in letters)
    needed = sum(count < _COVERAGE * counts.total() for count in covered) + 1
    limit = (size - len(_BERT_SPECIAL)) // 2
    return sorted(letters[: min(max(needed, _FEW, size // _SPARE), limit)])


def _count_characters(texts: Iterable[str]) -> Iterator[tuple[int, int]]:
    counts = np.zeros(0x110000, np.int64)
    batch: list[str] = []

    def add() -> None:
        codes = np.frombuffer("".join(batch).encode("utf-32-le"), np.uint32)
        counted = np.bincount(codes)
        counts[: len(counted)] += counted

    for text in texts:
        batch.append(text)
        if len(batch) == _TEXTS_A_COUNT:
            add()
            batch = []
    add()
    for code in counts.nonzero()[0].tolist():
        yield code, int(counts[code])


def _is_inside_words(letter: str, backend: Tokenizer) -> bool:
    """Punctuation and Chinese characters always stand alone."""
    word = backend.normalizer.normalize_str(f"a{letter}a")
    return len(backend.pre_tokenizer.pre_tokenize_str(word)) == 1
