"""What the launchers know about the chip they launch on, and the one way in which they launch."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

OLDEST = (8, 0)  # compute capability: before it tensor cores know no bfloat16, and nothing is copied asynchronously


class Chip(NamedTuple):
    """Its compute capability, and how many multiprocessors it has."""

    capability: tuple[int, int]
    processors: int

    @property
    def tensor_cores(self) -> str:
        """How they are driven, and by that how large tiles may be.

        "wgmma" (H100, H200) and "tcgen05" (B200, B300, Thor): by a group of warps, operands in 227 KiB of shared
        memory. "mma": by a warp, operands in registers, with 99 KiB of shared memory or more. That is what all others
        have, RTX 50 and RTX PRO (12.x) among them, and what a chip that nobody knows yet can do in any case.
        https://docs.nvidia.com/cuda/cuda-c-programming-guide/#features-and-technical-specifications
        """
        if self.capability == (9, 0):
            return "wgmma"
        return "tcgen05" if self.capability[0] in (10, 11) else "mma"


class Blocks(NamedTuple):
    """Rows and columns of a tile, warps per program, how many steps ahead a loop loads, registers a thread may use."""

    M: int
    N: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def meta(self) -> dict[str, int | None]:
        """As a launch takes them."""
        return {f"BLOCK_{name}" if len(name) == 1 else name: value for name, value in self._asdict().items()}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """`kernel[grid](*args, **meta)`, but within `only_compiling` without the launch."""
    if _compiling is None or not is_compiling():
        kernel.run(*args, grid=grid, warmup=False, **meta)
    elif _compiling[1] is None or _compiling[1] == torch.cuda.current_device():
        kernel.run(*args, grid=grid, warmup=True, **meta)


_compiling: tuple[int, int | None] | None = None  # a thread, and the device that it compiles for
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def only_compiling(device: int | None = None) -> Iterator[None]:
    """What this thread launches is compiled, where it was not yet, and not launched: outputs are not written.

    Other threads launch as ever. A backward must run in this one: `torch.autograd.set_multithreading_enabled(False)`.

    Args:
        device: of several, the one to compile for; what would be launched on another is left out.
    """
    global _compiling
    with _ONE_AT_A_TIME:
        before, _compiling = _compiling, (threading.get_ident(), device)
        try:
            yield
        finally:
            _compiling = before


def is_compiling() -> bool:
    """Whether this thread is within `only_compiling`."""
    return _compiling is not None and _compiling[0] == threading.get_ident()


def chip(device: torch.device) -> Chip:
    """Of a CUDA device; for the interpreter's CPU tensors something small, so that loops run more than once.

    Raises:
        RuntimeError: if it is too old for the kernels.
    """
    if device.type == "cpu":
        return Chip((8, 0), 2)
    reason = why_not(device)
    if reason is not None:
        raise RuntimeError(f"fastbert has no kernels for {reason}")
    return _cuda_chip(device.index)


def why_not(device: torch.device) -> str | None:
    """Why fastbert's operators do not run on a device, or None: for people."""
    if device.type != "cuda":
        return None if device.type == "cpu" else f"device {device.type}"
    capability = _cuda_chip(device.index).capability
    if capability >= OLDEST:
        return None
    major, minor = capability
    return f"a GPU of compute capability {major}.{minor}: the kernels need {OLDEST[0]}.{OLDEST[1]}"


@functools.cache
def _cuda_chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip((properties.major, properties.minor), properties.multi_processor_count)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: IEEE, unless the user allowed PyTorch tf32, in the old way or the new."""
    if dtype != torch.float32:
        return "ieee"
    allowed = torch.backends.cuda.matmul.fp32_precision
    if allowed == "none":
        allowed = getattr(torch.backends, "fp32_precision", "none")
    return "tf32" if allowed == "tf32" else "ieee"
