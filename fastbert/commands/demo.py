"""fastbert demo: a search by meaning, and the same work on transformers."""

import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.options import DeviceOption, Precision, PrecisionOption, torch_device
from fastbert.machine import where
from fastbert.terminal import progress

if TYPE_CHECKING:
    from fastbert.demo import Answer, Comparison


def demo(
    model: Annotated[
        str | None, typer.Option(help="A sentence encoder.", show_default="all-MiniLM-L6-v2 from its package")
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(help="Search for this and compare nothing; may be given several times.")
    ] = None,
    dtype: PrecisionOption = Precision.fp32,
    device: DeviceOption = None,
) -> None:
    """Search a hundred fables by meaning, and compare vectors and times with transformers."""
    from transformers import AutoModel

    from fastbert import demo
    from fastbert.inference.embedder import Embedder
    from fastbert.inference.loading import load_model

    target = torch_device(device)
    name = str(demo.find_model()) if model is None else model
    fast = Embedder(name, normalize=True, batch_tokens=2048, dtype=dtype.value, device=target)
    fables = demo.load_fables()
    start = time.perf_counter()
    tokens = fast.tokenize([fable.text for fable in fables], prompt="document")
    with progress("reading", len(tokens.ids), "tokens") as advance:
        vectors = fast.encode_tokens(tokens, advance)
    seconds = time.perf_counter() - start
    console = Console(highlight=False)
    console.print(Text(f"{model or 'all-MiniLM-L6-v2'} on {where(target)}, {dtype.value}", style="bold"))
    console.print(f"{len(fables)} of Aesop's fables, {tokens.lengths.sum():,} tokens, read in {seconds:.1f} s.")
    if not query:
        console.print('Found by meaning: but for words like "a", no query shares one with its fable.')
    for answer in demo.search(fast, fables, vectors, query or demo.QUERIES):
        _print_answer(console, answer)
    if query:
        return
    console.print()
    stock = load_model(AutoModel, fast.folder.transformer).to(target, fast.model.dtype)  # type: ignore[arg-type]
    batches = demo.sample(tokens, every=4 if target.type == "cpu" else 1)  # ten seconds on two cores
    texts = 2 * (1 + demo.TURNS) * sum(map(len, batches))
    with progress("comparing with transformers", texts, "fables") as advance:
        compared = demo.compare(fast, stock, tokens, batches, progress=advance)
    _print_comparison(console, compared, demo.BUSY)
    console.print('\nYour own: fastbert demo --query "unpaid medical bills"')


def _print_answer(console: Console, answer: "Answer") -> None:
    """The best fable with its ending, and the titles of the others."""
    console.print()
    console.print(Text(f"> {answer.query}", style="bold"))
    (best, score), *others = answer.hits
    console.print(Text.assemble((f"  {score:.2f}  ", "green"), (best.title, "bold green")))
    for line in Text(best.ending, style="italic").wrap(console, console.width - 8):
        line.rstrip()
        console.print(Text("        ") + line)
    for fable, score in others:
        console.print(Text(f"  {score:.2f}  {fable.title}", style="dim"))


def _print_comparison(console: Console, compared: "Comparison", busy: float) -> None:
    low, times, high = compared.speedup()
    apart = (high - low) / times
    removed = 1 - compared.tokens / compared.slots
    if apart > busy:
        console.print(
            f"No verdict: this machine is busy. Turns differ by {apart:.0%} ({low:.2f} to {high:.2f} times as fast as"
            " transformers); run it again when it is quiet.",
            style="yellow",
        )
    else:
        _print_times(console, compared)
        console.print(
            Text.assemble(
                (f"{times:.2f} times as fast as transformers' SDPA", "bold green"),
                f": the median of {len(compared.fast_seconds)} turns, most of them between {low:.2f} and {high:.2f}.",
            )
        )
    console.print(
        f"{removed:.0%} of what transformers computes is padding, in batches sorted by length.",
        f"Vectors: largest difference {compared.difference:.1e}, smallest cosine {compared.cosine:.7f}.",
        sep="\n",
    )


def _print_times(console: Console, compared: "Comparison") -> None:
    import numpy as np

    table = Table("", f"{compared.sequences} fables", "tokens/s", "computed per fable", box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, turns, slots in (
        ("transformers, padded", compared.stock_seconds, compared.slots),
        ("fastbert, packed", compared.fast_seconds, compared.tokens),
    ):
        seconds = float(np.median(turns))
        table.add_row(
            name,
            f"{1000 * seconds:,.0f} ms",
            f"{compared.tokens / seconds:,.0f}",
            f"{slots / compared.sequences:.0f} tokens",
        )
    console.print(table)
