"""Host-side helpers of fastbert that are too slow in Python."""

from collections.abc import Sequence
from typing import Any

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

def can_attend() -> bool:
    """Whether this CPU has the instructions for attention."""

class AttentionCall:
    """What attention and its backward are both called with."""

    def __init__(
        self,
        q: npt.NDArray[np.float32],
        k: npt.NDArray[np.float32],
        v: npt.NDArray[np.float32],
        cu_seqlens: npt.NDArray[np.int32],
        scale: float,
        causal: bool,
        threshold: int,
        keep_scale: float,
        seed: int,
        stream: int,
        threads: int,
    ) -> None: ...
    def forward(self, o: npt.NDArray[np.float32], lse: npt.NDArray[np.float32]) -> None:
        """Writes `fastbert.reference.attention`'s output, (T, H, D), and lse, (H, T)."""

    def backward(
        self,
        grad: npt.NDArray[np.float32],
        o: npt.NDArray[np.float32],
        lse: npt.NDArray[np.float32],
        dq: npt.NDArray[np.float32],
        dk: npt.NDArray[np.float32],
        dv: npt.NDArray[np.float32],
    ) -> None:
        """Writes the gradients of q, k and v, (T, H, D), from that of o."""

def can_encode(precision: str) -> bool:
    """Whether this CPU has the instructions for an Encoder of that precision: fp32, bf16 or int8."""

def some_words(addresses: Sequence[int], sizes: Sequence[int]) -> int:
    """A digest of a few words of each of these pieces of memory, which must be there."""

class Encoder:
    """BERT's layers for inference, over weights in the order in which they are read."""

    def __init__(
        self,
        *,
        precision: str,
        hidden: int,
        heads: int,
        head_dim: int,
        inner: int,
        eps: float,
        scale: float,
        tanh_gelu: bool,
        norm_first: bool = False,
    ) -> None: ...
    def add_layer(self, weights: Sequence[npt.NDArray[np.float32] | None]) -> None:
        """Copies the weights of one more layer."""

    def set_norm(self, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32], eps: float) -> None:
        """Copies the weights of a LayerNorm behind the last layer."""

    def run(
        self,
        hidden: npt.NDArray[np.float32],
        cu_seqlens: npt.NDArray[np.int32],
        order: Sequence[int],
        first_only: bool,
        threads: int,
    ) -> npt.NDArray[np.float32]:
        """All layers."""

    def embed_and_run(
        self,
        parts: Sequence[tuple[npt.NDArray[Any], npt.NDArray[np.int64]]],
        norm: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], float] | None,
        cu_seqlens: npt.NDArray[np.int32],
        order: Sequence[int],
        first_only: bool,
        threads: int,
    ) -> npt.NDArray[np.float32]:
        """The sum of a row of each table, its LayerNorm, and all layers."""

class Masking:
    """How tokens are chosen for prediction, and what becomes of them."""

    def __init__(
        self,
        *,
        unit: str = "token",
        rate: float = 0.15,
        replace_by_mask: float = 0.8,
        replace_by_random: float = 0.1,
        max_predictions: int = 0,
        span_p: float = 0.2,
        max_span: int = 10,
    ) -> None: ...

class Plan:
    """The sequences of some documents of an epoch, shuffled, before they are written."""

    def __len__(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def first_document(self) -> int: ...
    @property
    def next_document(self) -> int: ...
    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(sequences,) tokens, special ones included."""

class Sampler:
    """Sequences for pretraining from a token store. Safe to use from several threads."""

    def __init__(
        self,
        parts: list[tuple[npt.NDArray[Any], npt.NDArray[np.uint32], npt.NDArray[np.uint32]]],
        kinds: npt.NDArray[np.uint8],
        cls: int,
        sep: int,
        mask: int,
        *,
        form: str,
        max_length: int,
        short_probability: float,
        window_tokens: int,
        seed: int,
        static_copies: int,
        objective: str,
        masking: Masking,
        threads: int = 0,
    ) -> None: ...
    @property
    def documents(self) -> int: ...
    def plan(self, epoch: int, first_document: int) -> Plan: ...
    def batch(self, plan: Plan, picks: npt.NDArray[np.int64]) -> dict[str, Any]: ...

def group_into_batches(
    lengths: npt.NDArray[np.int64], budget: int, *, grouping: str, seed: int, epoch: int, index: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sequences that share a batch of at most `budget` tokens: batch i has order[offsets[i]:offsets[i + 1]]."""

def corrupt(
    ids: npt.NDArray[np.int64],
    cu_seqlens: npt.NDArray[np.int64],
    kinds: npt.NDArray[np.uint8],
    mask: int,
    masking: Masking,
    *,
    seed: int,
    epoch: int,
    first_index: int = 0,
    unit_starts: npt.NDArray[np.uint8] | None = None,
    threads: int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Masked-LM corruption of packed sequences: the corrupted ids, the labels, and which tokens have one."""
