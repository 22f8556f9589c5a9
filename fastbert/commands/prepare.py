"""fastbert prepare: from text to a token store."""

import enum
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.commands.interrupted import saying_what_is_kept
from fastbert.errors import InputError, require_posix
from fastbert.machine import cores
from fastbert.terminal import counted, note, progress

_MANY_UNKNOWN = 0.05
_NOTES_PER_REASON = 3


class Format(str, enum.Enum):
    txt = "txt"
    jsonl = "jsonl"
    md = "md"
    csv = "csv"
    tsv = "tsv"


def prepare(
    texts: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXTS",
            help="Files: text with a blank line between documents (.txt), JSON lines (.jsonl), Markdown (.md), tables"
            " (.csv, .tsv), each also .gz, .zst, .xz or .bz2; Parquet. Folders of them. Datasets: dataset:NAME,"
            " dataset:NAME:SPLIT or dataset:NAME:CONFIG:SPLIT, of the Hugging Face hub or a folder. - for stdin.",
        ),
    ],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the token store.")],
    vocab: Annotated[
        str | None,
        typer.Option(help="A vocab.txt, a tokenizer.json, a tokenizer's folder, or a model on the hub."),
    ] = None,
    train_vocab: Annotated[
        int | None, typer.Option(min=100, metavar="SIZE", help="Train a WordPiece vocabulary on these files instead.")
    ] = None,
    only_vocab: Annotated[bool, typer.Option("--only-vocab", help="Train the vocabulary and stop.")] = False,
    cased: Annotated[
        bool | None,
        typer.Option(
            "--cased/--uncased",
            help="Whether capitals and accents stay.",
            show_default="as the vocabulary is; trained: uncased",
        ),
    ] = None,
    format: Annotated[
        Format | None, typer.Option(help="What stdin holds, and files whose names do not say it.")
    ] = None,
    text_key: Annotated[
        str | None,
        typer.Option(
            help="The key of a JSON line, or the column, with the text.", show_default="text, or else paragraphs"
        ),
    ] = None,
    sentence_per_line: Annotated[
        bool, typer.Option("--sentence-per-line", help="Lines of .txt files are sentences.")
    ] = False,
    language: Annotated[str, typer.Option(help="Of the text, for its sentences: a code like en or zh.")] = "en",
    use_damaged: Annotated[
        bool,
        typer.Option("--use-damaged", help="Of a compressed file that is damaged or cut off, use what can be read."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first line or document that cannot be used.")
    ] = False,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Keep so many documents, like 0.5%, out of the store, in one of their own beside it."
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Write every N-th part: N such commands, anywhere, make the store.")
    ] = "1/1",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one a core")] = None,
) -> None:
    """A token store for `fastbert pretrain`, from text.

    Killed at any moment, the same command completes it. The result is the same for any number of processes and shards.
    """
    require_posix(to="prepare text")
    from fastbert.data import prepare as data
    from fastbert.data import sources
    from fastbert.data.readers import Reader
    from fastbert.data.store import HELD_OUT
    from fastbert.data.vocabulary import checksum, load_tokenizer

    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if match is None:
        raise InputError(f"--shard must be like 3/64, but is {shard}")
    number, of = int(match[1]), int(match[2])
    if (vocab is None) == (train_vocab is None):
        raise InputError("exactly one of --vocab and --train-vocab must be given")
    if only_vocab and train_vocab is None:
        raise InputError("--only-vocab goes with --train-vocab")
    share = None if held_out is None else _share(held_out)
    reader = Reader(text_key, sentence_per_line, use_damaged, strict)
    asked: dict[str, Any] = {"train": train_vocab, "cased": cased}
    if vocab is not None:
        asked |= {"vocab": Path(vocab).name if Path(vocab).exists() else vocab, "sha256": checksum(vocab)}

    found = sources.find(texts, None if format is None else format.value)
    if any(isinstance(source, sources.Stdin) for source in found):
        if sys.stdin.isatty():
            note("reading text from the terminal; Ctrl-D ends it")
        note("if this is stopped, the same command goes on, given the same text on stdin once more")
    sizes = [source.size for source in found]
    size = None if None in sizes else sum(size for size in sizes if size is not None)

    def tokenizer() -> Any:
        if vocab is not None:
            return load_tokenizer(vocab, cased)
        assert train_vocab is not None
        if of > 1:
            raise InputError("train the vocabulary first, once: the same command with --only-vocab instead of --shard")
        with progress("training the vocabulary", None if size is None else 2 * size, "bytes") as advance:
            return data.train_vocabulary(
                found, reader, train_vocab, cased=bool(cased), held_out=share, progress=advance
            )

    options: dict[str, Any] = {
        "asked": asked,
        "reader": reader,
        "language": language,
        "shard": (number, of),
        "held_out": share,
    }
    with saying_what_is_kept(lambda: f"; what is whole in {output} stays, and the same command goes on"):
        data.prepare(found, output, tokenizer, only_tokenizer=True, **options)
        if only_vocab:
            note(f"the vocabulary is in {output}")
            return
        start = time.perf_counter()
        with progress("preparing", size, "bytes") as advance:
            done = data.prepare(found, output, tokenizer, workers=workers or cores(), progress=advance, **options)
    assert done is not None
    seconds = time.perf_counter() - start
    for reason, count in sorted(done.problems.counts.items()):
        places = done.problems.first.get(reason, [])
        some = "; ".join(places[:_NOTES_PER_REASON]) + ("; ..." if count > _NOTES_PER_REASON else "")
        note(f"left out: {reason}, {count:,} x" + (f": {some}" if places else ""))
    if done.unknown > _MANY_UNKNOWN * done.tokens:
        note(f"warning: {done.unknown:,} of {done.tokens:,} tokens are unknown to the vocabulary")
    there = f", {done.found:,} there before" if done.found else ""
    rate = f", {done.written_tokens / seconds:,.0f} tokens/s" if done.written else ""
    note(
        f"{counted(done.documents, 'document')}, {counted(done.sentences, 'sentence')},"
        f" {counted(done.tokens, 'token')}, {done.problems.counts.total():,} left out;"
        f" {counted(done.written + done.found, 'part')}{there};"
        f" {seconds:.1f} s{rate}"
    )
    if share is not None:
        note(
            f"held out: {counted(done.held_out_documents, 'document')}, {counted(done.held_out_tokens, 'token')},"
            f" in {output / HELD_OUT}"
        )
    if done.missing:
        note(f"{output} is not finished: other shards have {done.missing:,} of {counted(done.parts, 'part')} to write")
    else:
        note(f"{output} is finished")


def _share(text: str) -> float:
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)%", text)
    if match is None:
        raise InputError(f"--held-out must be a share like 0.5%, but is {text}")
    return float(match[1]) / 100
