"""fastbert tag: the entities in texts."""

import enum
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fastbert.commands.judged import JsonLinesOption, Shared, with_shared_options
from fastbert.commands.options import Model
from fastbert.commands.streamed import TextKeyOption, TextsArgument


class Strategy(str, enum.Enum):
    none = "none"
    simple = "simple"
    first = "first"
    average = "average"
    max = "max"


@with_shared_options
def tag(
    model: Model,
    texts: TextsArgument = Path("-"),
    *,
    output: JsonLinesOption,
    text_key: TextKeyOption = "text",
    strategy: Annotated[
        Strategy, typer.Option(help="How tokens become entities, as in transformers' pipeline.")
    ] = Strategy.simple,
    stride: Annotated[int, typer.Option(min=0, help="Tokens that windows of a long text have in common.")] = 64,
    shared: Shared,
) -> None:
    """The entities in each text, with their places in characters, in the order of the texts."""
    shared.run(
        "Tagger",
        model,
        texts,
        {"--text-key": text_key},
        output,
        lambda entities: {"entities": [asdict(entity) for entity in entities]},
        strategy=strategy.value,
        stride=stride,
    )
