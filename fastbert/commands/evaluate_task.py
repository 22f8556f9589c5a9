"""fastbert evaluate, of a model that was tuned for a task."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.options import torch_device
from fastbert.commands.pretrain import Precision
from fastbert.errors import InputError, require
from fastbert.machine import where
from fastbert.tasks import FILE
from fastbert.terminal import note, progress

TaskOption = Annotated[str | None, typer.Option(help="Of `fastbert finetune`.", show_default="what it was tuned for")]
TextOption = Annotated[str | None, typer.Option(help="The column with the texts.", show_default="as it was tuned")]
PairOption = Annotated[
    str | None, typer.Option(help="The column with the second text of each row.", show_default="as it was tuned")
]
ChoicesOption = Annotated[
    str | None,
    typer.Option(
        help="The column with a list of choices, or the columns, with commas between.", show_default="as it was tuned"
    ),
]
LabelOption = Annotated[str | None, typer.Option(help="The column with the labels.", show_default="as it was tuned")]
PredictionsOption = Annotated[Path | None, typer.Option(help="A .jsonl file to write every prediction to.")]


def is_tuned(model: str) -> bool:
    """Whether `fastbert finetune` made the model in that folder."""
    return (Path(model) / FILE).is_file()


def evaluate_task(
    name: str,
    data: str,
    task: str | None,
    columns: Mapping[str, str | None],
    max_length: int | None,
    dtype: Precision | None,
    device: str | None,
    predictions: Path | None,
    as_json: bool,
) -> None:
    """On the task's dev data."""
    require("sklearn", "scipy", to="evaluate")
    if predictions is not None and predictions.exists():
        raise InputError(f"{predictions} is there")
    import fastbert
    from fastbert.inference.encoding import takes_types
    from fastbert.inference.engine import Engine
    from fastbert.inference.loading import load_model, load_tokenizer
    from fastbert.tasks import registry
    from fastbert.tasks.features import Tokenizing
    from fastbert.tasks.tagging import frozen
    from fastbert.tasks.task import DEV, Given, columns_of
    from fastbert.training.finetuning import length_of
    from fastbert.training.judging import judged, mixed
    from fastbert.training.results import described, write_predictions

    target = torch_device(device)
    said: dict[str, Any] = {**columns, "choices": columns_of(columns["choices"])}
    given = Given(dev=data, **said)
    found = registry.load(name, given)
    if task is not None and (found is None or found[0].name != task):
        found = registry.make(task, given), {}
    assert found is not None
    made, about = found
    splits = made.read(DEV)
    if not splits:
        raise InputError(f"{data} has no dev data of {made.name}")
    if not all(examples.labelled for examples in splits.values()):
        raise InputError(f"{data} has no labels: `fastbert predict` writes what the model says")
    bilstm = frozen.WordLSTM.load(Path(name)).to(target) if frozen.is_frozen(name) else None
    if bilstm is None:
        loaded: Any = fastbert.patch(load_model(made.auto, name, may_miss=()))
        loaded, config = loaded.to(target), loaded.config
    else:
        loaded, config = frozen.encoder_of(bilstm.about.encoder, target), frozen.config_of(bilstm.about)
    tokenizer = made.tokenizer(load_tokenizer(name if bilstm is None else bilstm.about.encoder))
    length = length_of(max_length or about.get("max_length"), made, loaded, tokenizer)
    stride = about.get("doc_stride", Tokenizing.doc_stride)
    tokenizing = Tokenizing(tokenizer, length, takes_types(loaded, tokenizer), stride)
    number = (dtype or (Precision.fp32 if target.type == "cpu" else Precision.bf16)).value
    scores = {}
    for split, examples in splits.items():
        judge = made.judge(examples, tokenizing, config)
        engine = Engine(loaded, tokenizer, max_length=length)
        with mixed(target, number), progress("evaluating", len(judge.tokens.ids), "tokens") as advance:
            if bilstm is None:
                scores[split] = judged(engine, judge, progress=advance)
            else:
                scores[split] = frozen.evaluated(bilstm, engine, judge, advance)
        for words in examples.notes:
            note(words)
        for reason, count in examples.problems.counts.items():
            note(f"{count:,} x {reason}, as {examples.problems.first[reason][0]}")
    found_here = described(scores, {"model": name, "data": data, "task": made.name, "dtype": number})
    if predictions is not None:
        write_predictions(predictions, made, splits, scores)
    if as_json:
        typer.echo(json.dumps(found_here))
        return
    console = Console()
    console.print(
        Text(f"{name}: {type(loaded).__name__}, {made.name}", style="bold"),
        Text(f"{where(target)}, {number}"),
        sep="\n",
        soft_wrap=True,
    )
    for split, examples in splits.items():
        console.print(Text(f"{examples.name}: {scores[split].of}"), soft_wrap=True)
        _print(console, found_here["splits"][split])


def _print(console: Console, found: Mapping[str, Any]) -> None:
    table = Table("", "", "95 % confidence", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in found["metrics"].items():
        low, high = map(_hundredths, found["intervals"][name])
        table.add_row(name.replace("_", " "), _hundredths(value), f"{low} to {high}")
    console.print(table, highlight=False)
    if found["confusion"]:
        most = max(range(len(found["classes"])), key=lambda i: sum(found["confusion"][i]))
        share = _hundredths(sum(found["confusion"][most]) / found["examples"])
        console.print(Text(f"always {found['classes'][most]}, the most frequent class, has accuracy {share}"))
    if not found["per_class"]:
        return
    keys = [key for key in found["per_class"][0] if key != "class"]
    table = Table("class", *keys, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in found["per_class"]:
        cells = (f"{row[key]:,}" if key == "count" else _hundredths(row[key]) for key in keys)
        table.add_row(Text(str(row["class"])), *cells)
    console.print(table, highlight=False)


def _hundredths(share: float) -> str:
    return "none" if math.isnan(share) else f"{100 * share:.2f}"
