"""fastbert predict: what a tuned model says of every row, whatever its task."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from fastbert.commands.evaluate_task import of_run
from fastbert.commands.judged import JsonLinesOption, Shared, with_shared_options
from fastbert.commands.streamed import TextsArgument


@with_shared_options
def predict(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run's folder, a checkpoint's, or a model on the Hugging Face hub.")
    ],
    texts: TextsArgument = Path("-"),
    *,
    output: JsonLinesOption,
    text: Annotated[str | None, typer.Option(help="The column with the texts.", show_default="as it was tuned")] = None,
    pair: Annotated[
        str | None, typer.Option(help="The column with the second text of each row.", show_default="as it was tuned")
    ] = None,
    shared: Shared,
) -> None:
    """Labels, numbers, entities, answers or choices, with their probabilities: what the model was tuned for.

    Columns and lengths are those that it was tuned with.
    """
    from fastbert.inference.loading import load_config
    from fastbert.tasks import registry
    from fastbert.tasks.predicting import predictor
    from fastbert.tasks.task import Given

    model = of_run(model)
    found = registry.load(model, Given(text=text, pair=pair))
    engine, record, options = predictor(model, load_config(model))
    columns = {"--text": text or "text"} | ({} if pair is None else {"--pair": pair})
    if found is not None:
        task, about = found
        columns = dict(task.columns) or columns
        if shared.max_length is None:
            shared = replace(shared, max_length=about["max_length"])
    shared.run(engine, model, texts, columns, output, record, **options)
