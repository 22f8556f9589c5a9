"""The `fastbert::` operator namespace. PyTorch's dispatcher is our only backend registry."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import register_flop_formula

from fastbert import reference

_LIB = torch.library.Library("fastbert", "FRAGMENT")
HAS_TRITON = importlib.util.find_spec("triton") is not None  # made for Linux only
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if _INTERPRETED and not HAS_TRITON:
    raise ModuleNotFoundError("TRITON_INTERPRET=1 needs Triton, which is not installed", name="triton")
_SIDES: dict[str, dict[str, Callable[..., Any]]] = {}


def define(
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> OpOverload:
    """Register one operator and return it, callable.

    `cuda` launches Triton, `cpu` is the reference or PyTorch's own fused CPU kernel, `fake` computes only shapes
    and dtypes, `setup_context` and `backward` are its autograd formula. An operator without a formula raises when
    gradients are asked for (that is what a second derivative meets). `flops` counts for torch.utils.flop_counter,
    given the operator's arguments. Where Triton is not installed, the reference serves CUDA tensors.
    Under TRITON_INTERPRET=1 the Triton launcher also serves CPU tensors, so the very same
    tests exercise the kernels on a machine without a GPU.
    """
    name = schema.partition("(")[0]
    if not HAS_TRITON:
        cuda = getattr(reference, name.replace("_bwd", "_backward").removesuffix("_fwd"))
    _SIDES[name] = {"cuda": cuda, "cpu": cuda if _INTERPRETED else cpu}
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(name, _on_its_device(cuda), "CUDA")
    _LIB.impl(name, _SIDES[name]["cpu"], "CPU")
    torch.library.register_fake(f"fastbert::{name}", fake, lib=_LIB)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        if backward is None:
            raise NotImplementedError(f"fastbert::{name} has no derivative: fastbert computes first derivatives only")
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    torch.library.register_autograd(f"fastbert::{name}", differentiate, setup_context=keep, lib=_LIB)
    packet = getattr(torch.ops.fastbert, name)
    if flops is not None:
        count = flops
        register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None, **kwargs: count(*args, **kwargs))
    op: OpOverload = packet.default
    return op


def _on_its_device(side: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, wherever the tensors lie."""

    def launch(first: torch.Tensor, *rest: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return side(first, *rest)
        with torch.cuda.device(first.device):
            return side(first, *rest)

    return launch


def backends(device: str) -> dict[str, str]:
    """For each operator, what serves it on "cpu" or "cuda"."""
    return {name: _describe(sides[device]) for name, sides in sorted(_SIDES.items()) if device in sides}


def _describe(side: Callable[..., Any]) -> str:
    if side.__module__ == "fastbert.reference":
        return "plain PyTorch (the reference)"
    if side.__module__.endswith("_attention_cpu"):
        return "C++, or without the extension PyTorch's CPU kernels"
    return "Triton" if side.__name__.startswith("_launch") else "PyTorch's CPU kernels"
