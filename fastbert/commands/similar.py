"""fastbert similar: a search."""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.options import DeviceOption, Model, Precision, PrecisionOption, torch_device
from fastbert.commands.streamed import FormatOption, IdKeyOption, TextKeyOption, progress_of
from fastbert.commands.texts import warn_of_rows
from fastbert.errors import InputError
from fastbert.terminal import counted, note

if TYPE_CHECKING:
    from fastbert.inference.embedder import Embedder
    from fastbert.inference.inputs import Row, Rows
    from fastbert.inference.search import Hit, Nearest, Vectors


def similar(
    model: Model,
    corpus: Annotated[
        Path, typer.Argument(help="What `fastbert embed` wrote (.parquet, .npy), or texts, as it reads them.")
    ],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="What to look for.")],
    *,
    k: Annotated[int, typer.Option("-k", min=1, help="Rows to show for each query.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object a line for each query.")] = False,
    text_key: TextKeyOption = "text",
    id_key: IdKeyOption = None,
    format: FormatOption = None,
    dtype: PrecisionOption = Precision.fp32,
    device: DeviceOption = None,
) -> None:
    """The texts of a corpus that are nearest to a query, each compared with it.

    Queries get the model's prompt "query", and texts "document", where it has them.
    """
    from fastbert.inference.embedder import Embedder
    from fastbert.inference.inputs import Rows
    from fastbert.inference.search import Nearest, read_vectors

    vectors = read_vectors(corpus)
    rows = Rows(corpus, {"--text-key": text_key}, id_key, format) if vectors is None else None
    embedder = Embedder.from_pretrained(model, dtype=dtype.value, device=torch_device(device))
    if vectors is not None:
        _check(vectors, corpus, embedder, model)
    start = time.perf_counter()
    nearest = Nearest(embedder.encode(queries, prompt="query"), k, embedder.similarity)
    if rows is not None:
        number = _embed(embedder, rows, nearest)
        warn_of_rows(rows)
    elif vectors is not None:
        number = 0
        for block, row in vectors.blocks:
            nearest.add(block, row)
            number += len(block)
    if as_json:
        for query, hits in zip(queries, nearest.hits, strict=True):
            found = {"query": query, "hits": [dataclasses.asdict(hit) for hit in hits]}
            print(json.dumps(found, ensure_ascii=False))
        return
    for query, hits in zip(queries, nearest.hits, strict=True):
        _print(query, hits, embedder.similarity_fn_name)
    note(f"{counted(number, 'row')} compared in {time.perf_counter() - start:.1f} s")


def _check(vectors: "Vectors", corpus: Path, embedder: "Embedder", model: str) -> None:
    from fastbert.inference.outputs import fingerprint

    if vectors.size != embedder.dimension:
        raise InputError(
            f"{corpus} has vectors of {vectors.size} elements, but those of {model} have {embedder.dimension}"
        )
    if vectors.model not in (None, fingerprint(embedder.model)):
        note(f"warning: the vectors in {corpus} were made by another model than {model}, or in another dtype")


def _embed(embedder: "Embedder", rows: "Rows", nearest: "Nearest") -> int:
    from fastbert.inference.stream import Stream

    embedder.prompt = "document"
    number = 0
    with progress_of("embedding", rows) as progress:
        for window in Stream(embedder, rows, lambda row: row.item, progress=progress):
            nearest.add(window.results, functools.partial(_row, window.rows))
            number += len(window.rows)
    return number


def _row(rows: "list[Row]", place: int) -> tuple[Any, str | None]:
    return rows[place].id, rows[place].texts[0]


def _print(query: str, hits: "list[Hit]", score: str) -> None:
    table = Table(score, "id", box=box.SIMPLE_HEAD, title=Text(query), title_justify="left")
    table.columns[0].justify = table.columns[1].justify = "right"
    if any(hit.text is not None for hit in hits):
        table.expand = True  # a column with a ratio takes what the others leave
        table.add_column("text", overflow="ellipsis", no_wrap=True, ratio=1)
    for hit in hits:
        texts = [] if hit.text is None else [Text(" ".join(hit.text.split()))]
        table.add_row(f"{hit.score:.3f}", Text(str(hit.id)), *texts)
    Console().print(table)
