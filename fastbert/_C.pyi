"""Host-side helpers of fastbert that are too slow in Python."""

import numpy as np
import numpy.typing as npt

def pack_lengths(
    lengths: npt.ArrayLike, padded_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Where the tokens of right-padded sequences lie, without the padding."""

def keep_mask(
    heads: int,
    first_row: int,
    rows: int,
    cols: int,
    threshold: int,
    seed: int,
    stream: int,
    scores: bool = False,
    numbers: npt.NDArray[np.int64] | None = None,
) -> npt.NDArray[np.bool_]:
    """The dropout mask that `fastbert.reference.keep_mask` specifies, True where kept."""
