"""Dropout for the operators' CPU sides: the mask of `reference.keep_mask`, from C++ where the extension is built."""

import torch
from torch import Tensor

from fastbert import reference

try:
    from fastbert import _C
except ImportError:  # a bare checkout: right, but slower
    _C = None  # type: ignore[assignment]


def dropout_(x: Tensor, first_row: int, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """Drop elements of x, (M, N) or (heads, rows, cols), in place, and scale what is kept."""
    if dropout_p == 0:
        return x
    assert seed is not None
    heads, rows, cols = x.shape if x.ndim == 3 else (1, *x.shape)
    if _C is None:
        keep = reference.keep_mask(heads, first_row, rows, cols, dropout_p, seed, stream)
    else:
        threshold = reference.drop_threshold(dropout_p)
        keep = torch.from_numpy(_C.keep_mask(heads, first_row, rows, cols, threshold, int(seed), stream))
    return x.mul_(reference.keep_scale(dropout_p)).masked_fill_(keep.view(x.shape).logical_not_(), 0.0)
