"""What a user passes to an encoder: checked, and packed.

Shapes, dtypes and devices are always checked. Values (ids out of range, positions that restart) are checked where
that costs little: on a CPU always; on a GPU in calls with a 2-D attention_mask, which wait for the GPU anyway to learn
how many tokens there are, and everywhere with FASTBERT_DEBUG=1 in the environment. Without a mask, torch.compile
traces none of these checks.

Dimension key:  B batch   L padded length   T packed tokens   N features   M labelled tokens
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.packing import DEBUG, Packing


class EmptyBatchError(ValueError, RuntimeError):
    """A batch without a token: a ValueError, and what transformers raises, a RuntimeError."""


@dataclass(frozen=True)
class Limits:
    """The sizes of a model's embedding tables, None where a module serves that is none; and where they lie.

    Attributes:
        type_vocab_size: 0 where there are no token types.
        padding_idx: where positions are counted over the ids that are not this one, and begin behind it.
        task_type_vocab_size: None where there is no such table.
        pad_token_id: the id of padding, where it has one.
    """

    vocab_size: int | None
    type_vocab_size: int | None
    max_position_embeddings: int | None
    hidden_size: int
    device: torch.device
    dtype: torch.dtype | None = None
    padding_idx: int | None = None
    task_type_vocab_size: int | None = None
    pad_token_id: int | None = None

    @property
    def first_position(self) -> int:
        """Of a sequence's first token."""
        return 0 if self.padding_idx is None else self.padding_idx + 1

    @property
    def max_tokens(self) -> int | None:
        """In a sequence."""
        return None if self.max_position_embeddings is None else self.max_position_embeddings - self.first_position


class TokenLabels(NamedTuple):
    """A label for each token, and what the head wants to know of them.

    Attributes:
        labels: (B, L) int64, -100 where there is none.
        find: which tokens have one, for a head that reads no others.
        at_most: how many have one, at most, so that nobody has to wait for their number; None where that is unknown.
        rows: (M,) int64, which of the packed tokens have one, where the user knows.
    """

    labels: Tensor
    find: bool = False
    at_most: int | None = None
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Labelled:
    """The tokens that have a label.

    Attributes:
        rows: (M,) int64, which of the packed tokens they are.
        labels: (M,) int64; -100 in surplus rows, of which there are some where fewer have one than was said.
        too_many: () bool, more have one than was said; None where that cannot be.
    """

    rows: Tensor
    labels: Tensor
    too_many: Tensor | None


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch, packed.

    Attributes:
        input_ids, position_ids, token_type_ids: (T,) int64.  With inputs_embeds, input_ids are rows of those.
        inputs_embeds: (B L, N), or None.
        pads_first: some sequence starts with padding, so that its row's first token is none of it.
        labels_on_padding: a loss would need hidden states that are not computed.
        labelled: where the head wants to know.
        padding_mask: (B, L), where padding is computed like other tokens, and is packed: then there is some.
        masked_words: that is so because some of it is no padding.
        task_type_ids: (T,) int64, where the model has such a table.
    """

    packing: Packing
    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    inputs_embeds: Tensor | None
    pads_first: bool = False
    labels_on_padding: bool = False
    labelled: Labelled | None = None
    padding_mask: Tensor | None = None
    masked_words: bool = False
    task_type_ids: Tensor | None = None


def rectangle(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """(B, L) of a batch.

    Raises:
        ValueError: if not exactly one of both is given, or it is empty or of a wrong shape or dtype.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (batch, length), but is {tuple(input_ids.shape)}")
        if input_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"input_ids must be int64 or int32, but is {input_ids.dtype}")
        given, name = input_ids, "input_ids"
    else:
        assert inputs_embeds is not None
        if inputs_embeds.ndim != 3 or not inputs_embeds.is_floating_point():
            raise ValueError(
                "inputs_embeds must be floating point (batch, length, hidden_size), but is "
                f"{tuple(inputs_embeds.shape)} {inputs_embeds.dtype}"
            )
        given, name = inputs_embeds, "inputs_embeds"
    B, L = given.shape[:2]
    if B == 0 or L == 0:
        raise EmptyBatchError(f"{name} is empty: {B} sequences of {L} tokens")
    return B, L


def prepare(
    limits: Limits,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    token_labels: TokenLabels | None = None,
    *,
    task_type_ids: Tensor | None = None,
    compute_padding: bool | None = None,
) -> Inputs:
    """Check a batch and pack it.

    Args:
        input_ids: (B, L), or inputs_embeds: (B, L, N).
        attention_mask: (B, L), 0 where a token is padding; or (1, L).
        token_type_ids, position_ids, task_type_ids: (B, L), or what broadcasts to it.
        cu_seqlens, max_seqlen: for a batch that comes packed, (1, T), without attention_mask.
        token_labels: B L of them, in any shape.
        compute_padding: padding is a token like the others, that nobody attends to. Where it is None, so it is in
            batches that mask an id other than `limits.pad_token_id`: somebody wrote that, and may read what becomes of
            it.

    Raises:
        ValueError: naming the argument and the bound. TypeError: for an argument that is no tensor.
    """
    B, L = rectangle(input_ids, inputs_embeds)
    given = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "attention_mask": attention_mask,
        "token_type_ids": token_type_ids,
        "position_ids": position_ids,
        "task_type_ids": task_type_ids,
        "cu_seq_lens_q": cu_seqlens,
        "label_rows": None if token_labels is None else token_labels.rows,
    }
    for name, t in given.items():
        if t is not None and t.device != limits.device:
            raise ValueError(f"{name} is on {t.device}, but the model on {limits.device}")
    token_type_ids = _broadcast("token_type_ids", token_type_ids, B, L)
    position_ids = _broadcast("position_ids", position_ids, B, L)
    task_type_ids = _broadcast("task_type_ids", task_type_ids, B, L)
    if attention_mask is not None and attention_mask.shape not in ((B, L), (1, L)):
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, not ({B}, {L}) as the batch")
    attention_mask = None if attention_mask is None else attention_mask.expand(B, L)
    if inputs_embeds is not None and limits.dtype is not None:
        wider = torch.promote_types(inputs_embeds.dtype, limits.dtype)
        inputs_embeds = inputs_embeds.to(wider if wider == limits.dtype else inputs_embeds.dtype)
    if inputs_embeds is not None and inputs_embeds.shape[2] != limits.hidden_size:
        raise ValueError(
            f"inputs_embeds has {inputs_embeds.shape[2]} features, not {limits.hidden_size} as the model's embeddings"
        )

    if token_labels is not None:
        token_labels = token_labels._replace(labels=as_token_labels(token_labels.labels, (B, L)))
    if token_labels is not None and token_labels.rows is not None:
        rows = token_labels.rows
        if cu_seqlens is None:
            raise ValueError("label_rows go with a packed batch (cu_seq_lens_q)")
        if rows.ndim != 1 or rows.dtype != torch.int64:
            raise ValueError(f"label_rows must be (labels,) int64, but is {tuple(rows.shape)} {rows.dtype}")
    look = (limits.device.type == "cpu" or DEBUG) and not torch.compiler.is_compiling()
    count, on_padding, masked_words = None, False, False
    if (
        token_labels is not None
        and token_labels.find
        and attention_mask is None
        and (look or (token_labels.at_most is None and token_labels.rows is None))
    ):
        count = _count(token_labels.labels)
    if cu_seqlens is not None:
        packing = _packing_of_packed((B, L), cu_seqlens, max_seqlen, attention_mask)
    elif attention_mask is None:
        packing = Packing.full(B, L, limits.device)
    else:
        ids = input_ids if compute_padding is None and limits.pad_token_id is not None else None
        found = _packing_from_mask(attention_mask, token_labels, ids, limits.pad_token_id)
        packing, count, on_padding, masked_words = found
    padding_mask = None
    if (compute_padding or masked_words) and packing.indices is not None:
        packing, padding_mask, on_padding = Packing.full(B, L, limits.device), attention_mask, False
    at_most = limits.max_tokens
    longest = L if cu_seqlens is None else packing.max_seqlen
    too_long = position_ids is None and at_most is not None and longest > at_most
    if too_long and (limits.padding_idx is None or input_ids is None):
        subject = f"the batch is {L} tokens long" if cu_seqlens is None else f"a sequence of {longest} tokens"
        raise ValueError(f"{subject}, but {_at_most(limits)}")

    counted_BL = None
    if position_ids is None and limits.padding_idx is not None and input_ids is not None:
        counted_BL = _counted(input_ids, limits.padding_idx, None if cu_seqlens is None else packing)
    given_BL = position_ids if counted_BL is None else counted_BL
    inputs = _pack(packing, (B, L), input_ids, token_type_ids, given_BL, inputs_embeds, limits)
    if limits.task_type_vocab_size is not None:
        if task_type_ids is None:
            inputs = replace(inputs, task_type_ids=torch.zeros_like(inputs.input_ids))
        else:
            inputs = replace(inputs, task_type_ids=packing.pack(task_type_ids).long())
    inputs = replace(inputs, padding_mask=padding_mask, masked_words=masked_words)
    if on_padding:
        inputs = replace(inputs, labels_on_padding=True)
    elif token_labels is not None and token_labels.find:
        inputs = replace(inputs, labelled=_labelled(token_labels, packing, count))
    if attention_mask is not None or look or too_long:
        restarts = None
        if position_ids is not None and cu_seqlens is None:
            restarts = _restarts(position_ids, attention_mask, limits.first_position)
        return replace(inputs, pads_first=_check_values(inputs, limits, restarts, counted_BL is not None))
    return inputs


def trusted(limits: Limits, input_ids: Tensor, token_type_ids: Tensor | None, packing: Packing) -> Inputs:
    """`prepare` for a packed batch, (1, T), that is known to be good."""
    counted_1T = None if limits.padding_idx is None else _counted(input_ids, limits.padding_idx, packing)
    inputs = _pack(packing, packing.shape, input_ids, token_type_ids, counted_1T, None, limits)
    if limits.task_type_vocab_size is None:
        return inputs
    return replace(inputs, task_type_ids=torch.zeros_like(inputs.input_ids))


def _at_most(limits: Limits) -> str:
    what = f"max_position_embeddings is {limits.max_position_embeddings}"
    if limits.padding_idx is None:
        return what
    return f"the model takes {limits.max_tokens}: {what}, of which the first {limits.first_position} are for padding"


def _counted(input_ids: Tensor, padding_idx: int, packed: Packing | None) -> Tensor:
    """(B, L): the positions of ids that are not padding_idx, one after the other behind it; the others have it."""
    counts = input_ids != padding_idx
    ends = counts.cumsum(1)
    if packed is not None:  # from each sequence's first token on
        first = torch.arange(packed.tokens, device=ends.device) - packed.position_ids
        ends = ends - (ends - counts.long())[:, first]
    return ends * counts + padding_idx


def _broadcast(name: str, ids: Tensor | None, B: int, L: int) -> Tensor | None:
    if ids is None:
        return None
    if ids.ndim == 0 or ids.ndim > 2 or any(n not in (1, of) for n, of in zip(ids.shape[::-1], (L, B), strict=False)):
        raise ValueError(f"{name} is {tuple(ids.shape)}, not ({B}, {L}) as the batch")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64 or int32, but is {ids.dtype}")
    return ids.expand(B, L)


def as_token_labels(labels: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, L): transformers takes labels of any shape, for it flattens them.

    Raises:
        ValueError: if there are not B L of them.
    """
    if labels.numel() != shape[0] * shape[1]:
        raise ValueError(f"labels is {tuple(labels.shape)}, not {tuple(shape)} as the batch")
    return labels.reshape(shape)


@torch.compiler.disable
def _packing_from_mask(
    attention_mask: Tensor, token_labels: TokenLabels | None, input_ids: Tensor | None, padding_id: int | None
) -> tuple[Packing, int, bool, bool]:
    """The packing, how many tokens have a label, whether padding has, and whether words are masked.

    One synchronisation for all of it. No word is the padding id, nor one below 0, which no vocabulary has.
    """
    keep = attention_mask != 0
    seqlens = keep.sum(-1)
    counts = [seqlens.sum(), seqlens.amax()]
    if token_labels is not None:
        labelled = token_labels.labels != -100
        counts += [labelled.sum(), (labelled & ~keep).sum()]
    if input_ids is not None:
        words = (input_ids != padding_id) & (input_ids >= 0)
        counts.append((words & ~keep).sum())
    tokens, max_seqlen, *others = torch.stack(counts).tolist()
    masked_words = input_ids is not None and others.pop() > 0
    count, on_padding = others or (0, 0)
    return Packing.from_counts(keep, seqlens, tokens, max_seqlen), count, on_padding > 0, masked_words


def _labelled(token_labels: TokenLabels, packing: Packing, count: int | None) -> Labelled:
    """count: how many there are, where that is known instead of a bound."""
    labels_T, bound = packing.pack(token_labels.labels), token_labels.at_most
    labelled_T = labels_T != -100
    if token_labels.rows is not None:
        if count is not None:
            _check_rows(token_labels.rows, labelled_T)
        return Labelled(token_labels.rows, labels_T[token_labels.rows], None)
    if count is None:
        assert bound is not None
        rows = torch.nonzero_static(labelled_T, size=min(bound, packing.tokens), fill_value=-1).squeeze(-1)
        labels = labels_T[rows.clamp(min=0)].masked_fill(rows < 0, -100)
        return Labelled(rows.clamp(min=0), labels, labelled_T.sum() > bound)
    if bound is not None and count > bound:
        raise ValueError(f"max_labels is {bound}, but there are {count} labels")
    rows = torch.nonzero_static(labelled_T, size=count).squeeze(-1)
    return Labelled(rows, labels_T[rows], None)


@torch.compiler.disable
def _check_rows(rows: Tensor, labelled_T: Tensor) -> None:
    if not torch.equal(rows, labelled_T.nonzero().squeeze(-1)):
        raise ValueError("label_rows are not the tokens that have a label, in their order")


@torch.compiler.disable
def _count(labels: Tensor) -> int:
    return int((labels != -100).sum())


def _packing_of_packed(
    shape: tuple[int, int], cu_seqlens: Tensor, max_seqlen: int | None, attention_mask: Tensor | None
) -> Packing:
    B, L = shape
    if B != 1:
        raise ValueError(f"with cu_seq_lens_q the batch must be one row of packed tokens, (1, T), but it has {B} rows")
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seq_lens_q exclude each other: a packed batch has no padding")
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    return Packing.from_cu_seqlens(cu_seqlens, int(max_seqlen), L)


def _pack(
    packing: Packing,
    shape: tuple[int, int],
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    limits: Limits,
) -> Inputs:
    B, L = shape
    device = packing.cu_seqlens.device
    if input_ids is not None:
        packed_ids = packing.pack(input_ids).long()
    else:
        packed_ids = torch.arange(B * L, device=device) if packing.indices is None else packing.indices
    if position_ids is not None:
        positions = packing.pack(position_ids).long()
    else:
        positions = packing.position_ids
        positions = positions + limits.first_position if limits.first_position else positions
    return Inputs(
        packing,
        packed_ids,
        positions,
        torch.zeros_like(packed_ids) if token_type_ids is None else packing.pack(token_type_ids).long(),
        None if inputs_embeds is None else inputs_embeds.reshape(B * L, -1),
    )


@torch.compiler.disable
def _check_values(inputs: Inputs, limits: Limits, restarts: Tensor | None, counted: bool) -> bool:
    """One synchronisation for all of them. Returns whether some sequence starts with padding.

    counted: positions are not the user's.
    """
    packing, positions = inputs.packing, inputs.position_ids
    if packing.tokens == 0:
        return False
    types = (1, "") if limits.type_vocab_size == 0 else (limits.type_vocab_size, "type_vocab_size")
    named = {
        "input_ids": (inputs.input_ids, limits.vocab_size, "vocab_size"),
        "token_type_ids": (inputs.token_type_ids, *types),
        "position_ids": (positions, limits.max_position_embeddings, "max_position_embeddings"),
    }
    if inputs.task_type_ids is not None:
        named["task_type_ids"] = (inputs.task_type_ids, limits.task_type_vocab_size, "task_type_vocab_size")
    if inputs.inputs_embeds is not None:
        del named["input_ids"]
    named = {name: of for name, of in named.items() if of[1] is not None}
    extremes = [bound for ids, _, _ in named.values() for bound in torch.aminmax(ids)]
    pads_first = (packing.first(packing.position_ids[:, None]) > 0).any()
    *values, restarted, padded = torch.stack(
        [*extremes, pads_first if restarts is None else restarts, pads_first]
    ).tolist()
    for (name, (_, bound, what)), low, high in zip(named.items(), values[::2], values[1::2], strict=True):
        if low < 0 or high >= bound:
            if counted and name == "position_ids":
                tokens = high + 1 - limits.first_position
                raise ValueError(f"a sequence of {tokens} tokens, but {_at_most(limits)}")
            why = f"{what} is {bound}" if what else "this model has none but 0"
            raise ValueError(f"{name} has {low if low < 0 else high}, not in [0, {bound}): {why}")
    if restarted and restarts is not None:
        raise ValueError(
            "position_ids restart within a row, so it holds several sequences: "
            "pass cu_seq_lens_q and max_length_q, or they would attend to each other"
        )
    return bool(padded)


def _restarts(position_ids_BL: Tensor, attention_mask: Tensor | None, first: int) -> Tensor:
    """() bool: some row counts up from the first position, or 0, and then again. Other orders are the user's own."""
    if attention_mask is None:
        both_valid = torch.ones_like(position_ids_BL[:, 1:], dtype=torch.bool)
    else:
        both_valid = (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
    after, before = position_ids_BL[:, 1:], position_ids_BL[:, :-1]
    starts = (after == first) | (after == 0)
    counts = ((after - before == 1) | starts | ~both_valid).all(-1)
    return (counts & (starts & (before > after) & both_valid).any(-1)).any()
