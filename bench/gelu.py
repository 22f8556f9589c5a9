"""The GELU that the kernels compute, against float64: every float16 and bfloat16 there is, and a grid of float32.

    python -m bench gelu        prints the table, and writes it to bench/results/gelu.md

On a CPU in Triton's interpreter, whose exponential and square root are NumPy's; on a GPU with its own approximations.
"""

import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels._gelu import gelu_and_slope
from fastbert.kernels._triton import tl, triton

OUTPUT = Path(__file__).parent / "results/gelu.md"
DTYPES = "bfloat16", "float16", "float32"
FORMS = "none", "tanh"
GRID = 14.0, 1_000_001  # of float32; beyond it, gelu is x or less than float32 can hold


class Errors(NamedTuple):
    """The largest: of the value, of the value relative to itself, of the derivative."""

    value: float
    relative: float
    slope: float


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, slope_ptr, elements, APPROXIMATE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < elements
    y, slope = gelu_and_slope(tl.load(x_ptr + offs, mask=mask, other=0.0), APPROXIMATE, WIDE)
    tl.store(y_ptr + offs, y, mask=mask)
    tl.store(slope_ptr + offs, slope, mask=mask)


def values(dtype: str) -> Tensor:
    """All finite values of a dtype, or a grid, as float32."""
    if dtype == "float32":
        return torch.linspace(-GRID[0], GRID[0], GRID[1])
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(getattr(torch, dtype))
    return every[every.isfinite()].float()


def exact(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """gelu and gelu' in float64, by functions that keep their digits where they are small."""
    z = x.double()
    if approximate == "tanh":
        u = 2 * (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
        du = 2 * (2 / torch.pi) ** 0.5 * (1 + 3 * 0.044715 * z**2)
        s, other = torch.sigmoid(u), torch.sigmoid(-u)
        return z * s, s + torch.where(s * other == 0, 0.0, z * s * other * du)
    e = (-z * z / 2).exp()
    tail = 0.5 * torch.special.erfcx(z.abs() / 2**0.5) * e
    phi = torch.where(z < 0, tail, 1 - tail)
    return z * phi, phi + torch.where(e == 0, 0.0, z * e / (2 * torch.pi) ** 0.5)


def ours(x: Tensor, dtype: str, approximate: str) -> tuple[Tensor, Tensor]:
    y, slope = torch.empty_like(x), torch.empty_like(x)
    BLOCK = 1024 if x.is_cuda else 65536
    grid = (triton.cdiv(x.numel(), BLOCK),)
    _gelu_kernel[grid](x, y, slope, x.numel(), approximate, dtype == "float32", BLOCK)
    return y, slope


def pytorch(x: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    z = x.clone().requires_grad_()
    y = F.gelu(z, approximate=approximate)
    return y.detach(), torch.autograd.grad(y.sum(), z)[0]


def compare(x: Tensor, actual: tuple[Tensor, Tensor], approximate: str) -> Errors:
    """Absolute errors of |x| < 100, where they are not those of x; relative ones where float32 holds the value."""
    (y, slope), (y_exact, slope_exact) = (tuple(t.double() for t in pair) for pair in (actual, exact(x, approximate)))
    near, normal = x.abs() < 100, y_exact.abs() > 1e-37
    return Errors(
        float((y - y_exact)[near].abs().max()),
        float((y / y_exact - 1)[normal].abs().max()),
        float((slope - slope_exact)[near].abs().max()),
    )


def errors(dtype: str, approximate: str) -> Errors:
    """Of the kernels, in float32, before the result is rounded."""
    x = values(dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    return compare(x, ours(x, dtype, approximate), approximate)


def main() -> None:
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("python -m bench gelu needs a GPU, or TRITON_INTERPRET=1")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "Triton's interpreter"
    lines = [
        "# GELU: largest errors against float64",
        "",
        "Of every finite float16 and bfloat16 and of 1,000,001 float32 in [-14, 14], before rounding to the dtype, for",
        "|x| < 100; relative where the value is above 1e-37. PyTorch computes all of them in float32.",
        f"`python -m bench gelu` in {where}, triton {triton.__version__}, torch {torch.__version__}.",
        "",
        "| dtype | form | value | PyTorch | relative | PyTorch | derivative | PyTorch |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for dtype in DTYPES:
        for form in FORMS:
            x = values(dtype)
            pairs = zip(errors(dtype, form), compare(x, pytorch(x, form), form), strict=True)
            cells = " | ".join(f"{error:.1e}" for pair in pairs for error in pair)
            lines.append(f"| {dtype} | {'erf' if form == 'none' else form} | {cells} |")
    text = "\n".join(lines) + "\n"
    OUTPUT.write_text(text)
    print(text)
