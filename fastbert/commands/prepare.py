"""fastbert prepare: from text to a token store."""

import os
import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.errors import InputError
from fastbert.terminal import note, progress

_MANY_UNKNOWN = 0.05


def prepare(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILES...",
            help="Text with a blank line between documents (.txt), JSON lines (.jsonl), Markdown (.md), each also .gz.",
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
        bool | None, typer.Option("--cased/--uncased", help="[default: as the vocabulary is; trained: uncased]")
    ] = None,
    text_key: Annotated[
        str | None, typer.Option(help="Where a JSON line has its text. [default: text, or paragraphs]")
    ] = None,
    sentence_per_line: Annotated[
        bool, typer.Option("--sentence-per-line", help="Lines of .txt files are sentences.")
    ] = False,
    language: Annotated[str, typer.Option(help="Of the text, for its sentences: an ISO 639-1 code.")] = "en",
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Write every N-th part: N such commands, anywhere, make the store.")
    ] = "1/1",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [default: one a core]")] = None,
) -> None:
    """A token store for `fastbert pretrain`, from text.

    Killed at any moment, the same command completes it. The result is the same for any number of processes and shards.
    """
    from fastbert.data import prepare as data
    from fastbert.data.readers import Reader

    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", shard)
    if match is None:
        raise InputError(f"--shard must be like 3/64, but is {shard}")
    if (vocab is None) == (train_vocab is None):
        raise InputError("exactly one of --vocab and --train-vocab must be given")
    if only_vocab and train_vocab is None:
        raise InputError("--only-vocab goes with --train-vocab")
    reader = Reader(text_key, sentence_per_line)
    asked: dict[str, Any] = {"vocab": None if vocab is None else Path(vocab).name, "train": train_vocab, "cased": cased}
    shards = int(match[2])

    def tokenizer() -> Any:
        if train_vocab is None:
            assert vocab is not None
            return data.load_tokenizer(vocab, cased)
        if shards > 1:
            raise InputError("train the vocabulary first, once: the same command with --only-vocab instead of --shard")
        note(f"training a vocabulary of {train_vocab:,} tokens")
        return data.train_vocabulary(files, reader, train_vocab, cased=bool(cased), language=language)

    size = sum(file.stat().st_size for file in files if file.is_file())
    start = time.perf_counter()
    with progress("reading", size, "bytes") as advance:
        done = data.prepare(
            files,
            output,
            tokenizer,
            asked=asked,
            reader=reader,
            language=language,
            shard=(int(match[1]), shards),
            workers=workers or len(os.sched_getaffinity(0)),
            only_tokenizer=only_vocab,
            progress=advance,
        )
    if done is None:
        note(f"the vocabulary is in {output}")
        return
    seconds = time.perf_counter() - start
    for where in done.problems.first[:5]:
        note(f"left out: {where}")
    if done.problems.counts:
        note(f"left out in all: {done.problems}")
    if done.unknown > _MANY_UNKNOWN * done.tokens:
        note(f"warning: {done.unknown:,} of {done.tokens:,} tokens are unknown to the vocabulary")
    note(
        f"{done.documents:,} documents, {done.sentences:,} sentences, {done.tokens:,} tokens in"
        f" {done.written + done.found:,} parts ({done.found:,} of them were there) in {seconds:.1f} s,"
        f" {done.tokens / seconds:,.0f} tokens/s: {output}"
    )
    if done.missing:
        note(f"{done.missing:,} of {done.parts:,} parts are missing still: the other shards write them")
