"""Options that several commands have, and what their values mean."""

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from fastbert.errors import InputError
from fastbert.terminal import counted

if TYPE_CHECKING:
    import torch


class Dtype(str, enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Precision(str, enum.Enum):
    """Of engines: `fastbert.inference.precision`."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    int8 = "int8"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a model on the Hugging Face hub.")
]
PrecisionOption = Annotated[
    Precision, typer.Option("--dtype", help="What products are computed in; auto: bf16 where the chip has it.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="What the weights are kept and computed in.")]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens", min=1, help="Tokens in a batch; there is no padding.", show_default="2048, on a GPU 16384"
    ),
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one")]


def torch_dtype(dtype: Dtype) -> "torch.dtype":
    import torch

    return {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}[dtype]


def torch_device(name: str | None) -> "torch.device":
    """Raises: InputError, if there is none of this name."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu, cuda or cuda:N, but is {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, but is {name!r}")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise InputError(f"--device {name}: PyTorch sees {counted(gpus, 'GPU') if gpus else 'no GPU'} here")
    return device
