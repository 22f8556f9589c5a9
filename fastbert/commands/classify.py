"""fastbert classify: labels of texts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastbert.commands.judged import JsonLinesOption, Shared, with_shared_options
from fastbert.commands.options import Model
from fastbert.commands.streamed import TextKeyOption, TextsArgument


@with_shared_options
def classify(
    model: Model,
    texts: TextsArgument = Path("-"),
    *,
    output: JsonLinesOption,
    text_key: TextKeyOption = "text",
    pair_key: Annotated[str | None, typer.Option(help="The column with a second text of each row.")] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Labels whose scores are written, best first.", show_default="all")
    ] = None,
    shared: Shared,
) -> None:
    """The best label of each text, and the scores of all, in their order."""
    keys = {"--text-key": text_key} | ({} if pair_key is None else {"--pair-key": pair_key})
    shared.run("Classifier", model, texts, keys, output, asdict, top_k=top_k)
