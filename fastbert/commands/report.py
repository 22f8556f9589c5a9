"""fastbert report: what is fused in a model."""

from typing import TYPE_CHECKING

import typer

from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, Model, torch_device, torch_dtype

if TYPE_CHECKING:
    import torch


def report_command(model: Model, *, dtype: DtypeOption = Dtype.fp32, device: DeviceOption = None) -> None:
    """What is fused in this checkpoint's model, what is not, and which way each of its matrix products takes."""
    from fastbert import patch, report
    from fastbert.verify import load_architecture

    loaded: torch.nn.Module = patch(load_architecture(model))
    typer.echo(report(loaded.to(torch_device(device), torch_dtype(dtype))))
