"""fastbert verify: a checkpoint on fastbert against transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, Model, torch_device, torch_dtype
from fastbert.commands.texts import read_texts
from fastbert.machine import where
from fastbert.terminal import counted, progress

if TYPE_CHECKING:
    from fastbert.verify import Verification

_TEXTS = 16


def verify_command(
    model: Model,
    *,
    text: Annotated[Path | None, typer.Option(help="Texts, one a line.", show_default="random ids")] = None,
    dtype: DtypeOption = Dtype.fp32,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="For fastbert against transformers, absolute.", show_default="see below")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """This checkpoint on fastbert against transformers, and both against transformers in float64.

    All hidden states, outputs and gradients, under seven kinds of attention mask. fp32 must be within 1e-5 of
    transformers or as close to float64 as transformers is; bf16 and fp16 at most twice as far from float64 as
    transformers is, and one rounding. Exit status 1 where that does not hold.
    """
    from fastbert.families._base import max_tokens
    from fastbert.inference.loading import load_tokenizer
    from fastbert.verify import MASKS, load_architecture, verify

    lines = None if text is None else read_texts(text)
    target = torch_device(device)
    loaded = load_architecture(model)
    sequences, material = None, "random ids"
    if lines is not None:
        tokenizer = load_tokenizer(model)
        limit = max_tokens(loaded)
        sequences = tokenizer(lines[:_TEXTS], truncation=True, max_length=limit)["input_ids"]
        material = f"the first {len(sequences)} of {len(lines):,} texts" if len(lines) > _TEXTS else str(text)
    with progress("verifying", len(MASKS), "masks") as advance:
        found = verify(
            loaded, sequences, dtype=torch_dtype(dtype), device=target, tolerance=tolerance, progress=advance
        )
    _print_verification(found, model, material, dtype.value, tolerance)
    if not found.ok:
        raise typer.Exit(1)


def _print_verification(found: "Verification", name: str, material: str, dtype: str, tolerance: float | None) -> None:
    console = Console()
    console.print(Text(f"{found.model} from {name}", style="bold"), soft_wrap=True)
    console.print(Text(f"{where(found.device)}, {dtype}, {material}"), soft_wrap=True)
    table = Table(
        "output",
        "fastbert\n-transf.",
        "fastbert\n-float64",
        "transf.\n-float64",
        "1 - cos",
        "worst mask",
        "ok",
        padding=(0, 0),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in table.columns[1:5]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for row in found.worst():
        table.add_row(
            row.output,
            *(f"{number:.1e}" for number in (row.difference, row.fast_error, row.stock_error, 1 - row.cosine)),
            row.mask,
            Text("yes", style="green") if row.ok else Text("NO", style="bold red"),
        )
    console.print(table, highlight=False)
    cases = Table("mask", "batch", "tokens", "calls", "padding", box=box.SIMPLE_HEAD, pad_edge=False)
    for case in found.cases:
        padding = "none" if case.tokens == case.shape[0] * case.shape[1] else "zeros"
        if case.fallbacks:
            padding = "transformers'"
        cases.add_row(
            case.mask,
            f"{case.shape[0]} x {case.shape[1]}",
            f"{case.tokens:,}",
            ", ".join(f"{n} fell back: {why}" for why, n in case.fallbacks.items()) or "packed",
            padding if case.clean else Text("NOT ZERO OR NOT FINITE", style="bold red"),
        )
    console.print(cases, highlight=False)
    if tolerance is not None:
        rule = f"ok: fastbert within {tolerance:g} of transformers."
    elif dtype == "fp32":
        rule = (
            "ok: fastbert within 1e-5 of transformers; or, where transformers' own float32 is not that exact, at most"
            " twice as far from float64 as transformers, and one rounding."
        )
    else:
        rule = "ok: fastbert at most twice as far from float64 as transformers, and one rounding."
    console.print(
        "Outputs: largest difference of an element, on valid tokens. Gradients: of a random projection of all outputs,"
        " ||difference|| / ||gradient|| of each parameter, the worst of the layer; where the gradient is mathematically"
        " zero (keys' biases), relative to the largest one. " + rule,
        style="dim",
        highlight=False,
    )
    failed = [row for row in found.rows if not row.ok]
    unclean = [case.mask for case in found.cases if not case.clean]
    if found.ok:
        console.print(Text(f"verified: {counted(len(found.rows), 'comparison')}", style="green"))
        return
    if unclean:
        console.print(Text(f"FAILED: outputs are not finite, or padding is not zero: {', '.join(unclean)}", "bold red"))
    if failed:
        worst = max(failed, key=lambda row: row.used)
        place = f"{worst.output}, {worst.mask}" + (f", {worst.parameter}" if worst.parameter else "")
        console.print(
            Text(f"FAILED: {len(failed):,} of {counted(len(found.rows), 'comparison')}, worst {place}", "bold red")
        )
