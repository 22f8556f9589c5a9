"""The command `fastbert`, put together from fastbert/commands.

A user's mistake ends with one line on stderr and exit status 1, a wrong option with status 2. torch and transformers
are imported inside the commands.
"""

import os
import sys
from typing import Annotated

import typer

import fastbert
from fastbert.commands.answer import answer
from fastbert.commands.classify import classify
from fastbert.commands.demo import demo
from fastbert.commands.embed import embed
from fastbert.commands.evaluate import evaluate
from fastbert.commands.fill_mask import fill_mask_command
from fastbert.commands.finetune import finetune
from fastbert.commands.info import info
from fastbert.commands.plot import plot
from fastbert.commands.predict import predict
from fastbert.commands.prepare import prepare
from fastbert.commands.pretrain import pretrain
from fastbert.commands.report import report_command
from fastbert.commands.rerank import rerank
from fastbert.commands.serve import serve
from fastbert.commands.similar import similar
from fastbert.commands.tag import tag
from fastbert.commands.verify import verify_command
from fastbert.commands.warm_up import warm_up
from fastbert.errors import CommonError, InputError
from fastbert.terminal import note

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """The command line. Exits with 1 for what the user can mend; anything else keeps its traceback."""
    try:
        app()
    except Exception as error:
        message = _mistake(error)
        if message is None:
            raise
        if not isinstance(error, CommonError) or os.environ.get("RANK", "0") == "0":
            note(message)
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastbert {fastbert.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """BERT encoders on one packed path, drop-in for transformers' models."""


app.command()(info)
app.command("report")(report_command)
app.command()(embed)
app.command()(similar)
app.command()(rerank)
app.command()(classify)
app.command()(tag)
app.command()(answer)
app.command()(serve)
app.command("fill-mask")(fill_mask_command)
app.command("verify")(verify_command)
app.command("warm-up")(warm_up)
app.command()(prepare)
app.command()(pretrain)
app.command()(finetune)
app.command()(evaluate)
app.command()(predict)
app.command()(plot)
app.command()(demo)


def _mistake(error: Exception) -> str | None:
    """One line about what the user can mend, or None for a fault of ours."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    torch = sys.modules.get("torch")
    if isinstance(error, InputError):
        return str(error)
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "the GPU has not enough memory: try fewer --batch-tokens, --dtype bf16 or --device cpu"
    return None
