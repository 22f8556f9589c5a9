"""From text files to a token store: documents, sentences, tokens, in parts that several processes write.

A part is a run of consecutive documents. Where one ends depends on the documents alone, so its bytes are the same for
any number of processes and shards, and a rerun after a kill needs only those that are not there.
"""

import json
import math
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.data import store
from fastbert.data.readers import Document, Problems, Reader, markdown_paragraphs
from fastbert.errors import InputError

PART_CHARACTERS = 8 << 20
PLAN = "plan.json"
_SENTENCES_A_CALL = 2048


@dataclass(frozen=True)
class Prepared:
    """What a run has done.

    Attributes:
        parts: of the store.  written, found: by this run, and before it.  missing: that other shards have yet to write.
        documents, sentences, tokens, unknown: in the parts that this shard is responsible for.
        problems: what was left out.
    """

    parts: int
    written: int
    found: int
    missing: int
    documents: int
    sentences: int
    tokens: int
    unknown: int
    problems: Problems


def prepare(
    files: Sequence[Path],
    output: Path,
    tokenizer: Callable[[], Any],
    *,
    asked: dict[str, Any],
    reader: Reader,
    language: str = "en",
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    part_characters: int = PART_CHARACTERS,
    only_tokenizer: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Prepared | None:
    """Write a token store, or what is missing of it.

    Args:
        tokenizer: makes a transformers tokenizer; called only where the store has none yet.
        asked: what the tokenizer is made from, for the plan.
        language: of the text, for its sentences: an ISO 639-1 code.
        shard: the i-th of n, from 1: writes every n-th part.
        workers: processes.
        only_tokenizer: write that, and return None.
        progress: called with the number of bytes that have just been read.

    Raises:
        InputError: if a file cannot be used, the folder holds something else, or nothing is left of the text.
    """
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"there is no shard {shard[0]}/{shard[1]}")
    if not files:
        raise InputError("there are no files to read")
    for file in files:
        reader.check(file)
    plan = {
        "format": store.FORMAT,
        "files": [[file.name, file.stat().st_size] for file in files],
        "tokenizer": asked,
        "reader": asdict(reader),
        "language": language,
        "part_characters": part_characters,
    }
    try:
        _adopt_plan(output, plan)
        vocabulary = _adopt_tokenizer(output, tokenizer)
        if only_tokenizer:
            return None
        return _Run(files, output, vocabulary, reader, language, shard, part_characters).work(workers, progress)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or output}: {error.strerror or error}") from error


def _adopt_plan(output: Path, plan: dict[str, Any]) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder")
    output.mkdir(parents=True, exist_ok=True)
    before = store.read_json(output / PLAN)
    if before is None:
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise InputError(f"{output} is not empty, and holds no token store")
        store.write_json(output / PLAN, plan)
    elif before != json.loads(json.dumps(plan)):
        different = ", ".join(key for key in plan if before.get(key) != json.loads(json.dumps(plan[key])))
        raise InputError(
            f"{output} was begun with other settings ({different}): go on with those, or choose another folder"
        )


def _adopt_tokenizer(output: Path, make: Callable[[], Any]) -> dict[str, Any]:
    """Save the tokenizer, the file that counts last. Returns what the manifest says of it."""
    path = output / store.TOKENIZER
    if not path.exists():
        made = make()
        draft = output / f".tokenizer.{os.getpid()}.tmp"
        made.save_pretrained(draft)
        for file in sorted(draft.iterdir(), key=lambda file: file.name == store.TOKENIZER):
            os.replace(file, output / file.name)
        draft.rmdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    settings = store.read_json(output / "tokenizer_config.json") or {}
    backend = Tokenizer.from_file(str(path))
    special = {}
    for name in ("pad", "unk", "cls", "sep", "mask"):
        text = settings.get(f"{name}_token")
        token = backend.token_to_id(text["content"] if isinstance(text, dict) else text) if text else None
        if token is None:
            raise InputError(f"the tokenizer has no {name} token, which pretraining needs")
        special[name] = token
    every = {token["id"] for token in content.get("added_tokens", []) if token.get("special")} | set(special.values())
    size = backend.get_vocab_size(with_added_tokens=True)
    return {
        "sha256": store.sha256(path),
        "vocab_size": size,
        "special": {**special, "all": sorted(every)},
        "continuations": _continuations(backend, content["model"]["type"], every),
    }


def _continuations(backend: Tokenizer, model: str, special: set[int]) -> list[int]:
    """The tokens that go on with a word."""
    begins = {"BPE": ("Ġ", "▁"), "Unigram": ("▁",)}.get(model)
    return sorted(
        i
        for token, i in backend.get_vocab(with_added_tokens=True).items()
        if i not in special and (token.startswith("##") if begins is None else not token.startswith(begins))
    )


@dataclass(frozen=True)
class _Run:
    files: Sequence[Path]
    output: Path
    tokenizer: dict[str, Any]
    reader: Reader
    language: str
    shard: tuple[int, int]
    part_characters: int

    def work(self, workers: int, progress: Callable[[int], None] | None) -> Prepared:
        problems = Problems()
        done: list[dict[str, Any]] = []
        written = found = number = 0
        pool = ProcessPoolExecutor(workers, get_context("spawn"), _begin, (str(self.output), self.language))
        pending: deque[Future[dict[str, Any]]] = deque()
        try:
            for number, documents in enumerate(self._parts(problems, progress), 1):
                if (number - 1) % self.shard[1] != self.shard[0] - 1:
                    continue
                there = store.whole_part(self.output / _name(number - 1))
                if there is not None:
                    done.append(there)
                    found += 1
                    continue
                while len(pending) > workers:  # so many parts lie in memory at most
                    done.append(pending.popleft().result())
                pending.append(pool.submit(_write, _name(number - 1), documents))
                written += 1
            done += [future.result() for future in pending]
        except BrokenProcessPool as error:
            raise InputError("a process that writes the store was killed: run the same command again") from error
        finally:
            pool.shutdown(cancel_futures=True)
        if number == 0:
            raise InputError("nothing is left of the text: " + (str(problems) or "the files hold no document"))
        missing = self._finish(number, problems)
        for part in done:
            problems.counts.update(part["left_out"])
        unknown = self.tokenizer["special"]["unk"]
        return Prepared(
            number,
            written,
            found,
            missing,
            sum(part["lengths"]["documents"] - 1 for part in done),
            sum(part["lengths"]["sentences"] - 1 for part in done),
            sum(part["lengths"]["tokens"] for part in done),
            sum(dict(zip(*part["token_counts"], strict=True)).get(unknown, 0) for part in done),
            problems,
        )

    def _parts(self, problems: Problems, progress: Callable[[int], None] | None) -> Iterator[list[Document]]:
        documents: list[Document] = []
        size = 0
        for file in self.files:
            for document in self.reader.read(file, problems, progress):
                documents.append(document)
                size += document.size
                if size >= self.part_characters:
                    yield documents
                    documents, size = [], 0
        if documents:
            yield documents

    def _finish(self, parts: int, problems: Problems) -> int:
        """Write the manifest, if all parts are there. Returns how many are not."""
        entries = [store.read_json(self.output / _name(i) / "part.json") for i in range(parts)]
        there = [entry for entry in entries if entry is not None]
        if len(there) < parts:
            return parts - len(there)
        counts: Counter[int] = Counter()
        left_out = Counter(problems.counts)
        for entry in there:
            counts.update(dict(zip(*entry.pop("token_counts"), strict=True)))
            left_out.update(entry["left_out"])
        tokens = counts.total()
        if tokens == 0:
            raise InputError("nothing is left of the text: no document has a token")
        # Parts without any document would be of no use to anybody.
        there = [entry for entry in there if entry["lengths"]["tokens"]]
        store.write_json(
            self.output / store.MANIFEST,
            {
                "format": store.FORMAT,
                "totals": {
                    "documents": sum(entry["lengths"]["documents"] - 1 for entry in there),
                    "sentences": sum(entry["lengths"]["sentences"] - 1 for entry in there),
                    "tokens": tokens,
                },
                "entropy": -math.fsum(n / tokens * math.log(n / tokens) for n in sorted(counts.values())),
                "left_out": dict(sorted(left_out.items())),
                "problems": problems.first,
                "tokenizer": self.tokenizer,
                "parts": there,
            },
        )
        return 0


def _name(part: int) -> str:
    return f"part-{part:06d}"


_output = Path()
_language = "en"
_tokenizer: Tokenizer


def _begin(output: str, language: str) -> None:
    """What a worker does first."""
    global _output, _language, _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _output, _language = Path(output), language
    _tokenizer = Tokenizer.from_file(str(_output / store.TOKENIZER))
    _tokenizer.no_truncation()
    _tokenizer.no_padding()
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    """A worker whose parent was killed ends, too."""
    wait([sentinel])
    os._exit(1)


def _write(name: str, documents: Sequence[Document]) -> dict[str, Any]:
    """Tokenise a part, and write it."""
    sentences: list[str] = []
    ends = []
    for document in documents:
        sentences += split_sentences(document, _language)
        ends.append(len(sentences))
    ids: list[list[int]] = []
    for start in range(0, len(sentences), _SENTENCES_A_CALL):
        encoded = _tokenizer.encode_batch_fast(sentences[start : start + _SENTENCES_A_CALL], add_special_tokens=False)
        ids += [encoding.ids for encoding in encoded]
    size = _tokenizer.get_vocab_size(with_added_tokens=True)
    tokens = np.fromiter((token for sentence in ids for token in sentence), np.uint16 if size <= 1 << 16 else np.uint32)
    sentence_ends, document_ends, first = [0], [0], 0
    left_out: Counter[str] = Counter()
    for end in ends:
        for sentence in ids[first:end]:
            if sentence:
                sentence_ends.append(sentence_ends[-1] + len(sentence))
        first = end
        if len(sentence_ends) - 1 > document_ends[-1]:
            document_ends.append(len(sentence_ends) - 1)
        else:
            left_out["a document without a token"] += 1
    for draft in _output.glob(f".{name}.*.tmp"):  # of a run that was killed
        store.remove(draft)
    store.remove(_output / name)  # damaged, or it would not be written again
    store.write_part(_output, name, tokens, sentence_ends, document_ends, left_out)
    written = store.whole_part(_output / name)
    if written is None:
        raise InputError(f"{_output / name} cannot be read back")
    return written


def split_sentences(document: Document, language: str = "en") -> list[str]:
    """The sentences of a document, none of them blank."""
    import sentencex

    if document.kind == "sentences":
        return document.texts
    paragraphs = document.texts
    if document.kind == "markdown":
        paragraphs = [paragraph for text in document.texts for paragraph in markdown_paragraphs(text)]
    found = (sentence.strip() for paragraph in paragraphs for sentence in sentencex.segment(language, paragraph))
    return [sentence for sentence in found if sentence]


def train_vocabulary(files: Sequence[Path], reader: Reader, size: int, *, cased: bool, language: str = "en") -> Any:
    """A BERT tokenizer with a WordPiece vocabulary of these files.

    Raises:
        InputError: if the text does not give so many pieces.
    """
    from transformers import BertTokenizer

    def texts() -> Iterator[str]:
        problems = Problems()
        for file in files:
            for document in reader.read(file, problems):
                yield from split_sentences(document, language)

    untrained = BertTokenizer(do_lower_case=not cased)
    trained = untrained.train_new_from_iterator(texts(), size, show_progress=False)
    if len(trained) < size:
        raise InputError(f"the text gives a vocabulary of {len(trained)} tokens only, not of {size}")
    return trained


def load_tokenizer(name: str, cased: bool | None) -> Any:
    """The tokenizer of a vocab.txt, a tokenizer.json, a folder or the hub.

    Args:
        cased: of a vocab.txt; None to see whether its words have capitals.

    Raises:
        InputError: if there is none, or it contradicts `cased`.
    """
    from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    try:
        if path.suffix == ".txt":
            words = path.read_text(encoding="utf-8").splitlines()
            capitals = any(word != word.lower() and not word.startswith("[") for word in words)
            lacking = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - set(words)
            if lacking:
                raise InputError(f"{path} lacks {', '.join(sorted(lacking))}: it is no vocabulary of BERT")
            if len(set(words)) < len(words):
                raise InputError(f"{path} has the same token twice")
            vocabulary = {word: i for i, word in enumerate(words)}
            return BertTokenizer(vocab=vocabulary, do_lower_case=not (capitals if cased is None else cased))
        tokenizer: Any
        if path.suffix == ".json":
            names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **names)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{name}: no tokenizer can be read there ({reason})") from error
    if cased is not None and cased == bool(getattr(tokenizer, "do_lower_case", not cased)):
        raise InputError(f"{name} is {'un' if cased else ''}cased")
    return tokenizer
