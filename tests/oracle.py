"""How the tests decide that a result is right."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_accurate(actual: Tensor, naive: Tensor, exact: Tensor, *, factor: float = 2.0) -> None:
    """`actual` may lose at most `factor` times the accuracy that plain PyTorch loses in the same dtype.

    Args:
        actual: from the operator.
        naive: from plain PyTorch, in the operator's dtype.
        exact: from the reference, in float64.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == naive.dtype
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "NaN or infinity"
    roundings = 1 if actual.dtype.itemsize == 2 else 16  # sums of float32 are themselves in float32, in any order
    floor = roundings * torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = factor * (naive.double() - exact).abs().max() + floor
    worst = (actual.double() - exact).abs().max()
    assert worst <= allowed, f"max error {worst:.3e} > {allowed:.3e} allowed"


def assert_operator_accurate(
    operator: Callable[..., Any],
    specification: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    naive: Callable[..., Any] | None = None,
    factor: float = 2.0,
) -> None:
    """Every output of an operator, by the three-way oracle.

    Args:
        specification: the reference; computed in float64 it is exact.
        naive: plain PyTorch, where that is not the reference in the operator's dtype.
    """
    exactly = [to_float64(a) for a in arguments]
    runs = (operator, arguments), (naive or specification, arguments), (specification, exactly)
    outputs = [_tuple(function(*given)) for function, given in runs]
    for actual, naive, exact in zip(*outputs, strict=True):
        assert_accurate(actual, naive, exact, factor=factor)


def opcheck(operator: Any, arguments: Sequence[Any]) -> None:
    """torch.library.opcheck; interpreted, only what a launcher can do wrong: shapes, strides, writing to its inputs.

    What autograd and torch.compile make of an operator does not depend on who serves it.
    """
    of_launchers = ("test_schema", "test_faketensor")
    options = {"test_utils": of_launchers} if os.environ.get("TRITON_INTERPRET") == "1" else {}
    torch.library.opcheck(operator, arguments, **options)


def to_float64(argument: Any) -> Any:
    is_number = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if is_number else argument


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def far_rows(rows: Tensor) -> Tensor:
    """The same rows, (M, N) or (M, 1, N), 2^30 elements apart: their offsets need 64 bits from the third on.

    The memory between them is never touched, so it costs addresses only.
    """
    far = torch.empty(2**30 * (rows.shape[0] - 1) + rows.shape[-1], dtype=rows.dtype, device=rows.device)
    far = far.as_strided(rows.shape, (2**30, *rows.stride()[1:]))
    return far.copy_(rows)
