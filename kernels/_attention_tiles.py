"""Which tiles attention's kernels take: by pass, head size, dtype, the longest sequence and the chip."""

import torch

from fastbert.kernels import _launch
from fastbert.kernels._triton import triton


def blocks(
    pass_: str, HEAD_DIM: int, dtype: torch.dtype, max_seqlen: int, chip: _launch.Chip, causal: bool = False
) -> _launch.Blocks:
    """The tile of one pass: "fwd", "dq", "dkdv", or "one_block" of the latter. Shorter sequences get smaller ones.

    What each compiles to stands in bench/results/codegen.md. On Hopper 128 x 64 in 128 registers keeps two programs
    on a multiprocessor, so that one's exponentials run beside the other's products; the causal mask needs more.
    """
    if dtype == torch.float32:
        tiles = _TF32 if _launch.precision(dtype) == "tf32" else _FLOAT32
    else:
        tiles = _TILES[chip.tensor_cores]
    wide = HEAD_DIM > 64 or HEAD_DIM % 8 != 0  # rows of odd sizes are loaded in pieces, each with its own address
    tile = tiles[256 if HEAD_DIM > 128 else 128 if wide else 64][pass_]
    longest = max(16, triton.next_power_of_2(max_seqlen))
    if longest >= tile.M and longest >= tile.N:
        return tile._replace(maxnreg=None) if causal else tile
    M, N = min(tile.M, longest), min(tile.N, longest)
    if dtype == torch.float32:
        num_warps = M * N // 128
    else:
        num_warps = M // 16  # a warp has 16 rows of an accumulator
    num_warps = max(1, num_warps, *((4, triton.next_power_of_2(HEAD_DIM) // 16) if wide else ()))
    return _launch.Blocks(M, N, min(tile.num_warps, num_warps), tile.num_stages)


_Tiles = dict[int, dict[str, _launch.Blocks]]  # by the largest head_dim, and by pass
_WGMMA: _Tiles = {
    64: {
        "fwd": _launch.Blocks(128, 64, 8, 3, maxnreg=128),
        "dq": _launch.Blocks(128, 64, 8, 2, maxnreg=128),
        "dkdv": _launch.Blocks(64, 128, 8, 2),
        "one_block": _launch.Blocks(128, 128, 8, 1),
    },
    128: {
        "fwd": _launch.Blocks(128, 64, 8, 2),
        "dq": _launch.Blocks(128, 32, 8, 2),
        "dkdv": _launch.Blocks(32, 128, 8, 2),
    },
    256: {
        "fwd": _launch.Blocks(64, 32, 8, 1),
        "dq": _launch.Blocks(64, 32, 8, 1),
        "dkdv": _launch.Blocks(16, 64, 8, 2),
    },
}
_TCGEN05: _Tiles = {
    64: {
        "fwd": _launch.Blocks(128, 64, 4, 3),
        "dq": _launch.Blocks(128, 64, 8, 2),
        "dkdv": _launch.Blocks(64, 128, 8, 2),
        "one_block": _launch.Blocks(128, 128, 8, 1),
    },
    128: {**_WGMMA[128], "dq": _launch.Blocks(64, 64, 4, 1), "dkdv": _launch.Blocks(64, 128, 8, 2)},
    256: {**_WGMMA[256], "dkdv": _launch.Blocks(32, 64, 8, 1)},
}
_MMA: _Tiles = {
    64: {
        "fwd": _launch.Blocks(64, 64, 4, 3),
        "dq": _launch.Blocks(64, 32, 4, 2),
        "dkdv": _launch.Blocks(32, 64, 4, 1),
        "one_block": _launch.Blocks(64, 64, 4, 1),
    },
    128: {
        "fwd": _launch.Blocks(64, 64, 4, 2),
        "dq": _launch.Blocks(64, 32, 4, 1),
        "dkdv": _launch.Blocks(32, 64, 8, 1),
    },
    256: {
        "fwd": _launch.Blocks(32, 32, 4, 1),
        "dq": _launch.Blocks(32, 32, 4, 1),
        "dkdv": _launch.Blocks(16, 16, 4, 1),
    },
}
_FLOAT32: _Tiles = {
    64: {
        "fwd": _launch.Blocks(64, 32, 4, 1),
        "dq": _launch.Blocks(32, 32, 8, 1),
        "dkdv": _launch.Blocks(16, 32, 8, 1),
        "one_block": _launch.Blocks(32, 32, 8, 1),
    },
    128: {
        "fwd": _launch.Blocks(64, 64, 8, 1),
        "dq": _launch.Blocks(16, 16, 8, 1),
        "dkdv": _launch.Blocks(16, 16, 4, 1),
    },
    256: {
        "fwd": _launch.Blocks(32, 32, 8, 1),
        "dq": _launch.Blocks(16, 16, 8, 1),
        "dkdv": _launch.Blocks(16, 16, 4, 1),
    },
}


_TF32: _Tiles = {
    64: {
        "fwd": _launch.Blocks(64, 64, 8, 2),
        "dq": _launch.Blocks(64, 32, 8, 1),
        "dkdv": _launch.Blocks(32, 32, 4, 1),
        "one_block": _launch.Blocks(32, 32, 4, 1),
    },
    128: {
        "fwd": _launch.Blocks(64, 32, 4, 1),
        "dq": _launch.Blocks(32, 32, 4, 1),
        "dkdv": _launch.Blocks(32, 32, 4, 1),
    },
    256: {**_FLOAT32[256], "dkdv": _launch.Blocks(16, 16, 8, 1)},
}
_TILES = {"mma": _MMA, "wgmma": _WGMMA, "tcgen05": _TCGEN05}  # of 16 bits, by `_launch.Chip.tensor_cores`


def takes_one_block(HEAD_DIM: int, dtype: torch.dtype, max_seqlen: int, chip: _launch.Chip) -> bool:
    """Whether a program of the backward can own a whole (sequence, head)."""
    small = HEAD_DIM <= 64 and HEAD_DIM % 8 == 0
    return small and max_seqlen <= blocks("one_block", HEAD_DIM, dtype, max_seqlen, chip).M
