"""What a model's weights and products are in, by name."""

from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from fastbert.errors import InputError
from fastbert.families._base import state
from fastbert.prepared import why_no_precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = ("auto", "int8", *DTYPES)


class Precision(NamedTuple):
    """What `Module.to` and `fastbert.patch` take.

    Attributes:
        dtype: of the weights.
        inference_dtype: of the layers' products in inference, where that is not the weights'.
    """

    dtype: torch.dtype
    inference_dtype: str | None = None


def name_of(model: PreTrainedModel) -> str:
    """Of a patched model: what `choose` was given for it, or could have been; for another dtype PyTorch's name."""
    base = cast(PreTrainedModel, model.base_model)
    names = {dtype: name for name, dtype in DTYPES.items()}
    return state(base).options.inference_dtype or names.get(model.dtype, str(model.dtype))


def choose(dtype: torch.dtype | str | None, device: torch.device | str) -> Precision:
    """The precision of that name on a device; a dtype of PyTorch's is the weights', float32 for None.

    "auto" is bf16 where the chip computes in it, else fp16 on a GPU and fp32 on a CPU. By the name "bf16", on a CPU
    that computes in it, only products are: sums, LayerNorms and weights are in float32.

    Raises:
        InputError: if there is no such name, or the device cannot have it.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return Precision(dtype or torch.float32)
    if dtype not in NAMES:
        raise InputError(f"dtype must be one of {', '.join(NAMES)}, but is {dtype!r}")
    on_cpu = torch.device(device).type == "cpu"
    if dtype == "int8":
        why = why_no_precision("int8", torch.device(device).type)
        if why is not None:
            raise InputError(f"dtype int8: {why}")
        return Precision(torch.float32 if on_cpu else torch.bfloat16, "int8")
    has_bf16 = why_no_precision("bf16") is None if on_cpu else torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == "auto":
        dtype = "bf16" if has_bf16 else "fp32" if on_cpu else "fp16"
    if dtype == "bf16" and on_cpu and has_bf16:
        return Precision(torch.float32, "bf16")
    return Precision(DTYPES[dtype])
