"""fastbert fill-mask: the likeliest tokens."""

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, Model, torch_device, torch_dtype
from fastbert.commands.texts import warn_of_tokenizer


def fill_mask_command(
    model: Model,
    text: Annotated[str, typer.Argument(help="With one [MASK] or several.")],
    *,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to show for each mask.")] = 5,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
) -> None:
    """The likeliest tokens for each [MASK] in a text."""
    from transformers import AutoModelForMaskedLM

    from fastbert.inference.embedder import Embedder
    from fastbert.inference.loading import load_model, load_tokenizer
    from fastbert.inference.masks import fill_mask
    from fastbert.patching import patch

    loaded = load_model(AutoModelForMaskedLM, model, may_miss=())
    tokenizer = load_tokenizer(model)
    loaded = patch(loaded.to(torch_device(device), torch_dtype(dtype)))  # type: ignore[arg-type]
    filled = fill_mask(loaded, tokenizer, text, top_k)
    tokens = Embedder(loaded, tokenizer).tokenize([text])
    warn_of_tokenizer(tokens.unknown, len(tokens.ids), model)
    console = Console()
    for place, fillings in enumerate(filled, 1):
        table = Table("token", "probability", "text", box=box.SIMPLE_HEAD)
        table.columns[1].justify = "right"
        if len(filled) > 1:
            table.title = f"mask {place} of {len(filled)}"
        for filling in fillings:
            table.add_row(Text(filling.token), f"{filling.probability:.4f}", Text(filling.text))
        console.print(table)
