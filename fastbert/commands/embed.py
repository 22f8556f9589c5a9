"""fastbert embed: vectors of texts."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from fastbert.commands.options import BatchTokensOption, DeviceOption, Model, Precision, PrecisionOption, torch_device
from fastbert.commands.streamed import (
    ForceOption,
    FormatOption,
    IdKeyOption,
    ResumeOption,
    StreamedRun,
    TextKeyOption,
    TextsArgument,
    WindowOption,
)
from fastbert.terminal import note


class Pool(str, enum.Enum):
    mean = "mean"
    cls = "cls"
    max = "max"
    mean_sqrt_len_tokens = "mean_sqrt_len_tokens"
    weightedmean = "weightedmean"
    lasttoken = "lasttoken"


def embed(
    model: Model,
    texts: TextsArgument = Path("-"),
    *,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The file: .npy or .safetensors, float32 (texts, hidden size), or .parquet: id, text, vector.",
        ),
    ],
    text_key: TextKeyOption = "text",
    id_key: IdKeyOption = None,
    format: FormatOption = None,
    keep_text: Annotated[bool, typer.Option(help="Write the texts into a .parquet, too.")] = True,
    prompt: Annotated[
        str | None,
        typer.Option(help="The model's prompt of this name before each text.", show_default="the model's own default"),
    ] = None,
    pool: Annotated[
        list[Pool] | None,
        typer.Option(help="What of a text's tokens; several are joined.", show_default="what the model says, or mean"),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scale each vector to length 1.", show_default="what the model says")
    ] = None,
    truncate_dim: Annotated[
        int | None, typer.Option(help="Elements of a vector that are kept.", show_default="what the model says")
    ] = None,
    batch_tokens: BatchTokensOption = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a text is cut to.", show_default="what the model says")
    ] = None,
    dtype: PrecisionOption = Precision.fp32,
    device: DeviceOption = None,
    window: WindowOption = 4096,
    resume: ResumeOption = False,
    force: ForceOption = False,
) -> None:
    """Vectors of texts, a row for each, empty ones too, in their order."""
    from fastbert.inference.embedder import Embedder
    from fastbert.inference.formats import VECTORS, format_of
    from fastbert.inference.inputs import Rows

    form = format_of(output, VECTORS, texts=["text"] if keep_text else [])
    rows = Rows(texts, {"--text-key": text_key}, id_key, format)
    run = StreamedRun(rows, output, form, resume=resume, force=force, window=window)
    if run.finished:
        return
    embedder = Embedder.from_pretrained(
        model,
        dtype=dtype.value,
        device=torch_device(device),
        prompt=prompt,
        pool=[each.value for each in pool] if pool else None,
        normalize=normalize,
        truncate_dim=truncate_dim,
        batch_tokens=batch_tokens,
        max_length=max_length,
    )
    note(str(embedder))
    run(embedder, model, {"keep_text": keep_text})
