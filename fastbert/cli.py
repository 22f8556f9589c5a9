"""The command `fastbert`, put together from fastbert/commands.

A user's mistake ends with one line on stderr and exit status 1, a wrong option with status 2. torch and transformers
are imported inside the commands.
"""

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fastbert
from fastbert.commands.embed import embed
from fastbert.commands.fill_mask import fill_mask_command
from fastbert.commands.info import info
from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, torch_device, torch_dtype
from fastbert.commands.plot import plot
from fastbert.commands.prepare import prepare
from fastbert.commands.pretrain import pretrain
from fastbert.commands.report import report_command
from fastbert.commands.verify import verify_command
from fastbert.commands.warm_up import warm_up
from fastbert.errors import CommonError, InputError
from fastbert.machine import where as _where
from fastbert.terminal import note, progress

if TYPE_CHECKING:
    from fastbert.demo import Comparison

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
app.command("fill-mask")(fill_mask_command)
app.command("verify")(verify_command)
app.command("warm-up")(warm_up)
app.command()(prepare)
app.command()(pretrain)
app.command()(plot)


@app.command("demo")
def demo_command(
    model: Annotated[
        str | None, typer.Option(help="A sentence encoder. [default: all-MiniLM-L6-v2 from its package]")
    ] = None,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
) -> None:
    """Search a hundred fables by meaning, and compare vectors and times with transformers."""
    import copy

    from transformers import AutoModel

    from fastbert import demo
    from fastbert.inference import Embedder, load_model, load_tokenizer
    from fastbert.patching import patch

    target = torch_device(device)
    name = str(demo.find_model()) if model is None else model
    stock = load_model(AutoModel, name).to(target, torch_dtype(dtype))  # type: ignore[arg-type]
    fast = Embedder(patch(copy.deepcopy(stock)), load_tokenizer(name), normalize=True)
    console = Console()
    console.print(
        Text(f"{'all-MiniLM-L6-v2' if model is None else model} on {_where(target)}, {dtype.value}", style="bold")
    )
    fables = demo.load_fables()
    tokens = fast.tokenize([fable.text for fable in fables])
    with progress("embedding", len(fables), "fables") as advance:
        vectors = fast.encode(tokens, advance)
    for answer in demo.search(fast, fables, vectors):
        console.print(Text(f'\n"{answer.query}"', style="italic"))
        for title, score in answer.hits:
            console.print(Text(f"  {score:.2f}  {title}"), highlight=False)
    with progress("comparing", None, "fables") as advance:
        compared = demo.compare(fast, stock, tokens, progress=advance)
    _print_comparison(console, compared)


def _print_comparison(console: Console, compared: "Comparison") -> None:
    table = Table("", "time", "tokens/s", "computed per text", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, seconds, slots in (
        ("transformers, padded", compared.stock_seconds, compared.slots),
        ("fastbert, packed", compared.fast_seconds, compared.tokens),
    ):
        table.add_row(
            name,
            f"{1000 * seconds:,.0f} ms",
            f"{compared.tokens / seconds:,.0f}",
            f"{slots / compared.sequences:.0f} tokens",
        )
    console.print(table)
    removed = 1 - compared.tokens / compared.slots
    console.print(
        f"{compared.stock_seconds / compared.fast_seconds:.2f} times as fast as transformers (SDPA): the same batches"
        f" of 32 fables, sorted by length; medians of {compared.rounds} turns. {removed:.0%} of what transformers"
        " computes is padding, which fastbert leaves out.",
        f"Vectors: largest difference {compared.difference:.1e}, smallest cosine {compared.cosine:.7f}.",
        sep="\n",
        highlight=False,
    )


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
