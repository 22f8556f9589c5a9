"""From text to a token store: documents, sentences, tokens."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastbert.data import sources, store, vocabulary
from fastbert.data.building import Build, Prepared, Progress
from fastbert.data.documents import Problems
from fastbert.data.drafts import Drafts
from fastbert.data.parts import flatten, is_held_out
from fastbert.data.readers import Reader
from fastbert.data.sentences import check_language
from fastbert.data.sources import File, Source, Stdin
from fastbert.errors import InputError

PART_CHARACTERS = 8 << 20
_SPECIAL = ("pad", "unk", "cls", "sep", "mask")


def prepare(
    given: Sequence[Path | str | Source],
    output: Path,
    tokenizer: Callable[[], Any],
    *,
    asked: dict[str, Any],
    reader: Reader,
    language: str = "en",
    shard: tuple[int, int] = (1, 1),
    workers: int = 1,
    part_characters: int = PART_CHARACTERS,
    held_out: float | None = None,
    only_tokenizer: bool = False,
    progress: Progress | None = None,
) -> Prepared | None:
    """Write a token store, or a shard of it, or what is missing of that.

    Args:
        given: where the text is: see sources.find.
        tokenizer: makes a transformers tokenizer; called only where the store has none yet.
        asked: what the tokenizer is made from, for the plan: with anything else, the store cannot be gone on with.
        language: of the text, for its sentences: a code like en or zh.
        shard: the i-th of n, from 1: every n-th part.
        workers: processes that tokenise. As many parts, and three more, lie in memory.
        part_characters: a part ends with the document that fills it.
        held_out: which share of the documents goes to a store of its own, in the folder store.HELD_OUT.
        only_tokenizer: write that, and return None.
        progress: called with the number of bytes of the text that have just become tokens, or were so before.

    Raises:
        InputError: if a source cannot be read, the folder cannot be written or holds something else, or nothing is left
            of the text.
    """
    if not 1 <= shard[0] <= shard[1]:
        raise InputError(f"there is no shard {shard[0]}/{shard[1]}")
    if held_out is not None and not 0 < held_out < 1:
        raise InputError(f"the share that is held out must lie between 0% and 100%, but is {100 * held_out:g}%")
    check_language(language)
    if not given:
        raise InputError("there are no files to read")
    found = sources.find(given)
    for source in found:
        reader.check(source)
    names = sources.names(found)
    plan = {
        "format": store.FORMAT,
        "files": [
            [name, *source.identity]
            for name, source in zip(names, found, strict=True)
            if not isinstance(source, File) or source.format
        ],
        "tokenizer": asked,
        # With these a run goes on where it stopped without, and the other way about.
        "reader": {key: value for key, value in asdict(reader).items() if key not in ("use_damaged", "strict")},
        "language": language,
        "part_characters": part_characters,
        "held_out": held_out,
    }
    drafts = Drafts(output, f"{shard[0]}-of-{shard[1]}")
    try:
        _check_plan(output, plan)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{twice[0]} is given twice: its documents would be there twice")
        output.mkdir(parents=True, exist_ok=True)
        drafts.clear()
        if not (output / store.TOKENIZER).exists():
            made = tokenizer()
            drafts.json(store.PLAN, plan)
            _save(made, drafts)
        description = _describe(output)
        sides = [drafts] if held_out is None else [drafts, _beside(drafts, plan, description)]
        if only_tokenizer:
            return None
        build = Build(found, names, description, reader, language, shard, part_characters, held_out, sides)
        return build.work(workers, progress)
    except OSError as error:
        raise InputError(f"cannot write {error.filename or output}: {error.strerror or error}") from error


def train_vocabulary(
    given: Sequence[Path | str | Source],
    reader: Reader,
    size: int,
    *,
    cased: bool,
    held_out: float | None = None,
    progress: Progress | None = None,
) -> Any:
    """A BERT tokenizer with a WordPiece vocabulary of these texts, the same for the same texts.

    Args:
        given: as of `prepare`.  held_out: of which this share of the documents is not used.
        progress: called with the number of bytes that have just been read; they are read twice.

    Raises:
        InputError: if the text does not give so many tokens.
    """
    found = sources.find(given)
    names = sources.names(found)
    for source in found:
        if isinstance(source, Stdin):
            source.keep()

    def texts() -> Iterator[str]:
        problems = Problems(strict=reader.strict)  # preparing reports them
        for source, name in zip(found, names, strict=True):
            for document in reader.read(source, name, problems, progress):
                for _, texts in flatten(document, problems):
                    if held_out is None or not is_held_out(texts, held_out):
                        yield from texts

    return vocabulary.train(texts, size, cased=cased)


def _check_plan(output: Path, plan: dict[str, Any]) -> None:
    path = output / store.PLAN
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder")
    if not path.exists():
        if output.exists() and any(not file.name.startswith(".") for file in output.iterdir()):
            raise InputError(f"{output} is not empty, and holds no token store")
        return
    before = store.read_json(path)
    if before is None:
        raise InputError(f"{path} is damaged: remove {output}, and begin anew")
    plan = json.loads(json.dumps(plan))
    if different := [key for key in plan if before.get(key) != plan[key]]:
        raise InputError(
            f"{output} was begun with other settings ({', '.join(different)}): go on with those, or take another folder"
        )


def _save(tokenizer: Any, drafts: Drafts) -> None:
    with drafts.scratch("tokenizer") as folder:
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # what Rust raises has no kind
            raise InputError(f"cannot write {drafts.folder}: {error}") from error
        content = json.loads((folder / store.TOKENIZER).read_text(encoding="utf-8"))
        ids = tokenizer.get_vocab()
        words = sorted(ids, key=ids.__getitem__)
        if content["model"].get("type") == "WordPiece" and len(words) == max(ids.values()) + 1:
            (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8", newline="\n")
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == store.TOKENIZER, file.name)):
            drafts.publish(file, file.name)


def _beside(drafts: Drafts, plan: dict[str, Any], description: dict[str, Any]) -> Drafts:
    """The store of what is held out, with plan and tokenizer of this one."""
    beside = Drafts(drafts.folder / store.HELD_OUT, drafts.key)
    beside.folder.mkdir(exist_ok=True)
    beside.clear()
    if not (beside.folder / store.PLAN).exists():
        beside.json(store.PLAN, plan)
    for name, checksum in description["sha256"].items():
        file = beside.folder / name
        if not file.is_file() or store.sha256(file) != checksum:
            with beside.scratch("tokenizer") as folder:
                beside.publish(Path(shutil.copy(drafts.folder / name, folder)), name)
    return beside


def _describe(output: Path) -> dict[str, Any]:
    """What the manifest says of the tokenizer that is there."""
    path = output / store.TOKENIZER
    try:
        backend = Tokenizer.from_file(str(path))
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = json.loads((output / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # what Rust raises has no kind
        raise InputError(f"{path} or tokenizer_config.json is damaged: remove {output}, and begin anew") from error
    special = {}
    for name in _SPECIAL:
        token = settings.get(f"{name}_token")
        text = token["content"] if isinstance(token, dict) else token
        special[name] = backend.token_to_id(text or "")
        if special[name] is None:
            raise InputError(f"{path} has no {name} token")
    every = {token["id"] for token in content.get("added_tokens", []) if token.get("special")} | set(special.values())
    files = [output / name for name in store.TOKENIZER_FILES]
    return {
        "sha256": {file.name: store.sha256(file) for file in files if file.is_file()},
        "vocab_size": max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        "special": {**special, "all": sorted(every)},
    }
