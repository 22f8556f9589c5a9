"""fastbert evaluate: how well a model does at its task, or predicts a corpus."""

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.evaluate_task import (
    ChoicesOption,
    LabelOption,
    PairOption,
    PredictionsOption,
    TaskOption,
    TextOption,
    evaluate_task,
    is_tuned,
)
from fastbert.commands.options import DeviceOption, torch_device
from fastbert.commands.pretrain import Precision
from fastbert.errors import InputError
from fastbert.machine import where
from fastbert.terminal import counted, note, progress

if TYPE_CHECKING:
    from fastbert.training.evaluation import Evaluation


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL",
            help="A run of `fastbert pretrain` (its model, or its last checkpoint), a checkpoint, or a model on the"
            " Hugging Face hub.",
        ),
    ],
    *,
    data: Annotated[
        str,
        typer.Option(
            help="Of a model that was tuned: a task's folder or file. Else a token store of `fastbert prepare`; its"
            " held-out part, if it has one."
        ),
    ],
    task: TaskOption = None,
    text: TextOption = None,
    pair: PairOption = None,
    choices: ChoicesOption = None,
    label: LabelOption = None,
    predictions: PredictionsOption = None,
    sequences: Annotated[int, typer.Option(min=1, help="To evaluate on, at most.")] = 1024,
    max_length: Annotated[
        int | None,
        typer.Option(min=5, help="Tokens of a sequence.", show_default="128, or the run's or model's if that is less"),
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What is computed in.", show_default="bf16 on a GPU, fp32 on a CPU")
    ] = None,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """How well a model does: at the task that it was tuned for, or at masked words and next sentences.

    Of a task: its figures with where they are with 95 % confidence, and those of each class. Else sequences and masks
    are always the same ones, those of the evaluations of `fastbert pretrain`.
    """
    from fastbert.training.models import of_run

    columns = {"text": text, "pair": pair, "choices": choices, "label": label}
    name, lengths = of_run(model)
    if task is not None or is_tuned(name):
        evaluate_task(name, data, task, columns, max_length, dtype, device, predictions, as_json)
        return
    for option, value in {**columns, "predictions": predictions}.items():
        if value is not None:
            raise InputError(f"--{option} is for a model that `fastbert finetune` made, or with --task")
    evaluate_pretrained(name, lengths, Path(data), sequences, max_length, dtype, device, as_json)


def evaluate_pretrained(
    name: str,
    lengths: list[int],
    data: Path,
    sequences: int,
    max_length: int | None,
    dtype: Precision | None,
    device: str | None,
    as_json: bool,
) -> None:
    """On a token store. Args: lengths: of the sequences that the model's run had, its phases' max_length."""
    import torch

    from fastbert.data.store import HELD_OUT, Store
    from fastbert.families._base import max_tokens
    from fastbert.training.evaluation import Evaluation, evaluated_length, has_held_out
    from fastbert.training.models import to_evaluate

    target = torch_device(device)
    held_out = has_held_out(data)
    store = Store.open(data / HELD_OUT if held_out else data)
    if not held_out:
        note(f"{data} has no held-out part: evaluating on all of it, which the model may have been trained on")
    loaded, objective = to_evaluate(name, store)
    most = max_tokens(loaded)
    length = evaluated_length([*lengths, most]) if max_length is None else max_length
    if length > most:
        raise InputError(f"--max-length {length}: {name} takes at most {most} tokens")
    evaluation = Evaluation(store, objective, length, sequences)
    number = dtype or (Precision.fp32 if target.type == "cpu" else Precision.bf16)
    loaded = loaded.to(target)
    mixed = torch.autocast(target.type, torch.bfloat16) if number is Precision.bf16 else contextlib.nullcontext()
    with mixed, progress("evaluating", len(evaluation), "batches") as advance:
        found = evaluation(loaded, advance)
    about = {"model": name, "data": str(store.path), "held_out": held_out, "sequences": evaluation.sequences}
    about |= {"max_length": length, "objective": objective, "dtype": number.value}
    if as_json:
        typer.echo(json.dumps({**about, **found}))
        return
    console = Console()
    console.print(
        Text(f"{name}: {type(loaded).__name__}, {counted(loaded.num_parameters(), 'parameter')}", style="bold"),
        Text(f"{where(target)}, {number.value}"),
        Text(_material(store.path, evaluation, objective)),
        sep="\n",
        soft_wrap=True,
    )
    console.print(_table(found, objective), highlight=False)


def _material(path: Path, evaluation: "Evaluation", objective: str) -> str:
    kind = "sentence pairs" if objective == "mlm+nsp" else "sequences"
    what = "predicted" if objective == "left-to-right" else "masked"
    return (
        f"{path}: {evaluation.sequences:,} {kind} of up to {evaluation.max_length} tokens,"
        f" {evaluation.labels:,} tokens {what}"
    )


def _table(found: dict[str, Any], objective: str) -> Table:
    table = Table("", "loss, nats", "perplexity", "accuracy", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    words = "next word" if objective == "left-to-right" else "masked LM"
    table.add_row(
        words, f"{found['eval_mlm_loss']:.4f}", f"{found['eval_perplexity']:,.2f}", f"{found['eval_mlm_accuracy']:.1%}"
    )
    if "eval_nsp_loss" in found:
        table.add_row("next sentence", f"{found['eval_nsp_loss']:.4f}", "", f"{found['eval_nsp_accuracy']:.1%}")
    return table
