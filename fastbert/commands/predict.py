"""fastbert predict: what a tuned model says of every row, whatever its task."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

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
    choices: Annotated[
        str | None,
        typer.Option(
            help="The column with a list of choices, or the columns, with commas between.",
            show_default="as it was tuned",
        ),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(help="The column with the questions, of a model that answers.", show_default="question"),
    ] = None,
    passage: Annotated[
        str | None, typer.Option(help="The column with the passages, of a model that answers.", show_default="context")
    ] = None,
    shared: Shared,
) -> None:
    """Labels, numbers, entities, answers or choices, with their probabilities: what the model was tuned for.

    Columns and lengths are those that it was tuned with.
    """
    from fastbert.inference.loading import load_config
    from fastbert.tasks import registry
    from fastbert.tasks.predicting import Record, of_entities, predictor
    from fastbert.tasks.tagging.frozen import is_frozen
    from fastbert.tasks.tagging.frozen_tagger import FrozenTagger
    from fastbert.tasks.task import Given, columns_of
    from fastbert.training.models import of_run

    model, _ = of_run(model)
    given = Given(text=text, pair=pair, choices=columns_of(choices), question=question, passage=passage)
    found = registry.load(model, given)
    engine: Any
    record: Record
    if is_frozen(model):
        engine, record, config = FrozenTagger, of_entities, FrozenTagger.config(model)
    else:
        config = load_config(model)
        engine, record = predictor(model, config)
    columns, of_row = {"--text": text or "text"} | ({} if pair is None else {"--pair": pair}), None
    if engine == "Answerer":
        columns = {"--question": question or "question", "--passage": passage or "context"}
    if found is None and engine == "Chooser":
        found = registry.make("choice", given), {"max_length": None}
    options = {}
    if found is not None:
        task, about = found
        if task.columns:
            columns, of_row = dict(task.columns), task.texts
        if shared.max_length is None:
            shared = replace(shared, max_length=about["max_length"])
        options = task.engine_options(about, config)
    shared.run(engine, model, texts, columns, output, record, texts=of_row, **options)
