"""What the launchers would compile on a chip that is not here: every launch's kernel, argument types and constants.

Nothing here repeats a launcher's configurations. The launchers themselves are called, on unfilled CPU tensors, with
another chip's numbers in place of this machine's; Triton's own launch code binds and specialises the arguments, and
what it then would compile is kept.
"""

import importlib
import os
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastbert.kernels import _launch


class Multiprocessor(NamedTuple):
    """What one of a chip's multiprocessors holds at once, beside its registers."""

    chip: _launch.Chip
    shared: int  # bytes that one program may use
    warps: int
    programs: int


CHIPS = {  # A100; RTX A6000; L4, L40S, RTX 40; H100, H200; B200; RTX 50, RTX PRO 6000 (and GB10, sm_121)
    "sm_80": Multiprocessor(_launch.Chip((8, 0), 108), 166912, 64, 32),
    "sm_86": Multiprocessor(_launch.Chip((8, 6), 84), 101376, 48, 16),
    "sm_89": Multiprocessor(_launch.Chip((8, 9), 142), 101376, 48, 24),
    "sm_90": Multiprocessor(_launch.Chip((9, 0), 132), 232448, 64, 32),
    "sm_100": Multiprocessor(_launch.Chip((10, 0), 148), 232448, 64, 32),
    "sm_120": Multiprocessor(_launch.Chip((12, 0), 170), 101376, 48, 24),
}
REGISTERS = 64 * 1024  # of a multiprocessor
TENSOR_MEMORY = 512  # columns, of a multiprocessor of sm_100
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Case(NamedTuple):
    """A call of an operator's launchers, forward and backward. `usual`: a size that most models have."""

    operator: str
    dtype: str
    launch: Callable[[], None]
    usual: bool


OPTIONS = {"warps": "num_warps", "stages": "num_stages", "registers": "maxnreg"}


class Launch(NamedTuple):
    """What Triton would have compiled, in plain data that another process can compile."""

    operator: str
    module: str
    kernel: str
    dtype: str
    chip: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]  # constexprs, and arguments that are None or 1
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    named: dict[str, Any]  # the constants, by name

    def compile(self) -> Any:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True  # a third of the time
            return triton.compile(source, target=_target(self.chip), options=self.options)

    def configuration(self) -> str:
        """The constants that tell one launch from another, as short as they can be read."""
        shown = {
            name.removeprefix("BLOCK_"): value
            for name, value in self.named.items()
            if value not in (None, 0) and name != "PRECISION" and not name.startswith("stride_")
        }
        pointers = {name.removesuffix("_ptr"): type_[1:] for name, type_ in self.signature.items() if type_[0] == "*"}
        shown |= {name: type_ for name, type_ in pointers.items() if name in ("residual", "weight", "numbers")}
        shown |= {short: self.options[name] for short, name in OPTIONS.items() if self.options[name] is not None}
        return " ".join(name if value is True else f"{name}={value}" for name, value in shown.items())


def launches(chip: str, cases: Iterable[Case]) -> list[Launch]:
    """All different launches of these cases on a chip, without launching them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("interpreted kernels are not compiled: unset TRITON_INTERPRET")
    found: dict[tuple[str, str], Launch] = {}

    def keep(
        kernel: JITFunction[Any],
        key: Any,
        signature: Any,
        _device: Any,
        constants: Any,
        options: Any,
        attrs: Any,
        *_: Any,
    ) -> None:
        named = {kernel.params[path[0]].name: value for path, value in constants.items()}
        launch = Launch(
            case.operator, kernel.__module__, kernel.__name__, case.dtype, chip,
            signature, constants, attrs, dict(options.__dict__), named,
        )  # fmt: skip
        found.setdefault((kernel.__name__, str(key)), launch)

    def precision(_dtype: torch.dtype) -> str:
        return "tf32" if case.dtype == "tf32" else "ieee"

    device = SimpleNamespace(
        get_current_device=lambda: chip,
        get_current_stream=lambda _device: 0,
        get_current_target=lambda: _target(chip),
    )
    with (
        mock.patch.object(_launch, "chip", return_value=CHIPS[chip].chip),
        mock.patch.object(_launch, "precision", precision),
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "_do_compile", keep),
    ):
        for case in cases:
            case.launch()
    return list(found.values())


def _target(chip: str) -> GPUTarget:
    major, minor = CHIPS[chip].chip.capability
    return GPUTarget("cuda", 10 * major + minor, 32)
