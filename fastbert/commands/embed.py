"""fastbert embed: vectors of texts."""

import contextlib
import enum
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated

import typer

from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, Model, torch_device, torch_dtype
from fastbert.commands.texts import read_texts, warn_of_tokenizer
from fastbert.errors import InputError
from fastbert.terminal import counted, note, progress


class Pool(str, enum.Enum):
    mean = "mean"
    cls = "cls"


def embed(
    model: Model,
    texts: Annotated[
        Path, typer.Argument(metavar="[TEXTS]", help="A text a line, also .gz, .zst, .xz, .bz2; - for stdin.")
    ] = Path("-"),
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npy file, float32 (texts, hidden size).")],
    pool: Annotated[Pool, typer.Option(help="The mean of a text's tokens, or its first one.")] = Pool.mean,
    normalize: Annotated[bool, typer.Option(help="Scale each vector to length 1.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch; there is no padding.")] = 16384,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a text is cut to.", show_default="what the model takes")
    ] = None,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
) -> None:
    """Vectors of texts, a row for each line, empty lines too."""
    from fastbert.inference.embedder import Embedder

    with _written_at_once(output) as save:
        lines = read_texts(texts)
        embedder = Embedder.from_pretrained(
            model,
            dtype=torch_dtype(dtype),
            device=torch_device(device),
            pool=pool.value,
            normalize=normalize,
            batch_tokens=batch_tokens,
            max_length=max_length,
        )
        start = time.perf_counter()
        with progress("reading", len(lines), "texts") as advance:
            tokens = embedder.tokenize(lines, advance)
        warn_of_tokenizer(tokens, model)
        with progress("embedding", len(tokens.ids), "tokens") as advance:
            vectors = embedder.encode_tokens(tokens, advance)
        seconds = time.perf_counter() - start
        save(vectors)
    cut = int((tokens.lengths == embedder.max_length).sum())
    at_the_limit = f" ({counted(cut, 'text')} at the limit of {embedder.max_length} tokens)" if cut else ""
    note(
        f"{counted(len(lines), 'text')}, {counted(len(tokens.ids), 'token')}{at_the_limit} in {seconds:.1f} s,"
        f" {len(tokens.ids) / seconds:,.0f} tokens/s: {output} {vectors.shape}"
    )


@contextlib.contextmanager
def _written_at_once(path: Path) -> Iterator[Callable[[object], None]]:
    """A function that saves an array; the file appears at the end, whole, or not at all."""
    import numpy as np

    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no regular file")
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    file: IO[bytes]
    try:
        file = temporary.open("wb")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error

    def save(array: object) -> None:
        try:
            np.save(file, np.asarray(array))
            file.close()
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    try:
        yield save
    finally:
        file.close()
        temporary.unlink(missing_ok=True)
