"""fastbert warm-up: a model's kernels, compiled before it is needed."""

import contextlib
from typing import Annotated

import typer

from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, Model, torch_device, torch_dtype
from fastbert.errors import InputError


def warm_up(
    model: Model,
    *,
    training: Annotated[
        bool, typer.Option("--training", help="For training steps, with float32 weights and autocast to --dtype.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens of the longest sequence.", show_default="what the model takes")
    ] = None,
    dtype: DtypeOption = Dtype.fp32,
    threads: Annotated[int | None, typer.Option(min=1, help="That compile.", show_default="one a core")] = None,
    device: DeviceOption = None,
) -> None:
    """Compile the kernels that a checkpoint's model needs into Triton's cache on the disk: no first batch waits then.

    As the class that its config names, and so as its encoder alone.
    """
    import torch

    import fastbert
    from fastbert.verify import load_architecture

    target, number = torch_device(device), torch_dtype(dtype)
    loaded: torch.nn.Module = fastbert.patch(load_architecture(model))
    mixed = training and dtype is not Dtype.fp32
    loaded = loaded.to(target, torch.float32 if training else number)
    with torch.autocast(target.type, number) if mixed else contextlib.nullcontext():
        try:
            done = fastbert.warm_up(loaded, training=training, max_length=max_length, threads=threads)
        except ValueError as error:
            raise InputError(f"{model}: {error}") from error
    typer.echo(f"{model}: {done}")
