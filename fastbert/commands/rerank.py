"""fastbert rerank: scores of documents for queries."""

from pathlib import Path
from typing import Annotated

import typer

from fastbert.commands.judged import PairsArgument, Shared, with_shared_options
from fastbert.commands.options import Model


@with_shared_options
def rerank(
    model: Model,
    pairs: PairsArgument = Path("-"),
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file: .jsonl or .parquet, id and score; .npy or .safetensors.")
    ],
    query_key: Annotated[str, typer.Option(help="The column with the queries.")] = "query",
    document_key: Annotated[str, typer.Option(help="The column with the documents.")] = "document",
    shared: Shared,
) -> None:
    """A score for each query and document, a row of two columns, in their order."""
    from fastbert.inference.formats import VECTORS

    shared.run(
        "Reranker",
        model,
        pairs,
        {"--query-key": query_key, "--document-key": document_key},
        output,
        lambda score: {"score": score.tolist()},
        suffixes=(".jsonl", *VECTORS),
        column="score",
    )
