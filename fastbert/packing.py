"""Packing: the tokens of a batch end to end, without padding, and the way back.

Dimension key:  B batch   L padded length   T packed tokens
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

try:
    from fastbert import _C
except ImportError:  # a bare checkout
    _C = None  # type: ignore[assignment]


DEBUG = os.environ.get("FASTBERT_DEBUG", "0") not in ("", "0")  # look at values too, also where that waits for a GPU


def check_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> None:
    """Look at the values, which waits for a GPU.

    Raises:
        ValueError: if they do not rise from 0 to the number of tokens, or max_seqlen is too small.
    """
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, but is {bounds}")
    longest = max((end - start for start, end in pairwise(bounds)), default=0)
    if max_seqlen < longest:
        raise ValueError(f"max_seqlen is {max_seqlen}, but the longest sequence has {longest} tokens")


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a batch lie once padding is gone.

    Attributes:
        cu_seqlens: (B + 1,) int32, where each sequence starts among the packed tokens, and T.
        max_seqlen: tokens in the longest sequence.
        position_ids: (T,) int64, each token's place in its own row.
        indices: (T,) int64, each token's place in the flattened rectangle; None where there is nothing to remove,
            so that packing and unpacking are views.
        shape: the rectangle, (B, L); (1, T) for a batch that came packed.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    indices: Tensor | None
    shape: tuple[int, int]

    @property
    def tokens(self) -> int:
        """T, the number of tokens that are no padding."""
        return self.position_ids.shape[0]

    @property
    def sequences(self) -> int:
        """B, empty ones included."""
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device | str) -> "Packing":
        """A batch without padding. No host synchronisation."""
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=device) * length
        position_ids = torch.arange(length, device=device).expand(batch, length).reshape(-1)
        return cls(cu_seqlens, length, position_ids, None, (batch, length))

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int] | Tensor, padded_length: int | None = None, device: torch.device | str = "cpu"
    ) -> "Packing":
        """Right-padded sequences of known lengths. No host synchronisation where lengths lie on the host.

        Args:
            lengths: (B,) integers in [0, padded_length].
            padded_length: L; the longest length where it is None.

        Raises:
            ValueError: if a length is out of range, or there are 2^31 tokens or more.
        """
        on_host = [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
        longest = max(on_host, default=0)
        L = longest if padded_length is None else padded_length
        if _C is not None:
            indices, cu_seqlens, position_ids = (torch.from_numpy(array) for array in _C.pack_lengths(on_host, L))
        else:
            for row, n in enumerate(on_host):
                if not 0 <= n <= L:
                    raise ValueError(f"lengths[{row}] is {n}, not in [0, {L}]")
            if sum(on_host) >= 2**31:
                raise ValueError("lengths add up to more than 2^31 - 1 tokens")
            cu_seqlens = torch.tensor([0, *accumulate(on_host)], dtype=torch.int32)
            position_ids = torch.cat([torch.arange(0), *(torch.arange(n) for n in on_host)])
            indices = position_ids + torch.arange(len(on_host)).repeat_interleave(torch.tensor(on_host).long()) * L
        full = indices.shape[0] == len(on_host) * L
        return cls(
            cu_seqlens.to(device, non_blocking=True),
            longest,
            position_ids.to(device, non_blocking=True),
            None if full else indices.to(device, non_blocking=True),
            (len(on_host), L),
        )

    @classmethod
    def from_mask(cls, mask: Tensor) -> "Packing":
        """The tokens where a (B, L) mask is not 0: padding on either side, holes and empty rows alike.

        One host synchronisation.

        Raises:
            ValueError: if the mask has not two dimensions.
        """
        if mask.ndim != 2:
            raise ValueError(f"mask must be (batch, length), but is {tuple(mask.shape)}")
        keep = mask != 0
        seqlens = keep.sum(-1)
        tokens, max_seqlen = torch.stack([seqlens.sum(), seqlens.amax()]).tolist() if len(mask) else (0, 0)
        return cls.from_counts(keep, seqlens, tokens, max_seqlen)

    @classmethod
    def from_counts(cls, keep: Tensor, seqlens: Tensor, tokens: int, max_seqlen: int) -> "Packing":
        """`from_mask` where the host knows what it would wait for. No host synchronisation.

        Args:
            keep: (B, L) bool, the mask.  seqlens: (B,), its sums.
            tokens: the sum of these.  max_seqlen: the largest.
        """
        B, L = keep.shape
        if tokens == B * L:
            return cls.full(B, L, keep.device)
        cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=keep.device)
        cu_seqlens[1:] = seqlens.cumsum(0)
        indices = torch.nonzero_static(keep.reshape(-1), size=tokens).squeeze(-1)
        return cls(cu_seqlens, max_seqlen, indices % L, indices, (B, L))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, tokens: int) -> "Packing":
        """A batch that is packed already, (1, T). No host synchronisation.

        Raises:
            ValueError: if cu_seqlens is no (B + 1,) int32; on a CPU, and everywhere with FASTBERT_DEBUG=1, also if it
                does not rise from 0 to T or max_seqlen is too small.
        """
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.dtype != torch.int32:
            raise ValueError(
                f"cu_seqlens must be (batch + 1,) int32, but is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        if (cu_seqlens.device.type == "cpu" or DEBUG) and not torch.compiler.is_compiling():
            check_cu_seqlens(cu_seqlens, max_seqlen, tokens)
        token = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
        seq = torch.searchsorted(cu_seqlens, token, right=True) - 1
        position_ids = (token - cu_seqlens[seq]).long()
        return cls(cu_seqlens, max_seqlen, position_ids, None, (1, tokens))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packing":
        """The same on another device, for models whose layers lie on several."""
        cu_seqlens, position_ids = (
            t.to(device, non_blocking=non_blocking) for t in (self.cu_seqlens, self.position_ids)
        )
        indices = None if self.indices is None else self.indices.to(device, non_blocking=non_blocking)
        return Packing(cu_seqlens, self.max_seqlen, position_ids, indices, self.shape)

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, ...) to (T, ...)."""
        flat: Tensor = padded.flatten(0, 1)
        return flat if self.indices is None else flat.index_select(0, self.indices)

    def unpack(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) to (B, L, ...), padding filled with `fill`."""
        B, L = self.shape
        if self.indices is None:
            return packed.view(B, L, *packed.shape[1:])
        padded = packed.new_full((B * L, *packed.shape[1:]), fill)
        return padded.index_copy_(0, self.indices, packed).view(B, L, *packed.shape[1:])

    def per_sequence(self) -> "Packing":
        """The same packed tokens as right-padded rows, (B, max_seqlen): for a batch that came packed."""
        seqlens = self.cu_seqlens.diff().long()
        row = torch.repeat_interleave(
            torch.arange(self.sequences, device=seqlens.device), seqlens, output_size=self.tokens
        )
        column = torch.arange(self.tokens, device=seqlens.device) - self.cu_seqlens.long()[row]
        return Packing(
            self.cu_seqlens,
            self.max_seqlen,
            column,
            row * self.max_seqlen + column,
            (self.sequences, self.max_seqlen),
        )

    def first(self, packed: Tensor) -> Tensor:
        """(T, N) to (B, N): each sequence's first token; zeros for an empty one."""
        if self.tokens == 0:
            return packed.new_zeros(self.sequences, *packed.shape[1:])
        return self.blank_empty(packed.index_select(0, self.first_rows()))

    def first_rows(self) -> Tensor:
        """(B,) int64: each sequence's first token among the packed ones; any other for an empty sequence."""
        return self.cu_seqlens[:-1].long().clamp(max=self.tokens - 1)

    def blank_empty(self, rows: Tensor) -> Tensor:
        """(B, N) as given, but zeros for an empty sequence."""
        return torch.where((self.cu_seqlens.diff() > 0)[:, None], rows, 0.0)
