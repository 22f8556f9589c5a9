"""From a token store to packed batches for pretraining: what is cut, masked and batched, by the C++ core.

Every draw depends on (seed, epoch, document) alone: batches are the same for any number of threads or processes, and
after a resume.

Dimension key:  B sequences   T packed tokens   M tokens with a label
"""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset

from fastbert.data.store import Store
from fastbert.errors import NO_EXTENSION, InputError

try:
    from fastbert import _C
except ImportError:  # a bare checkout
    _C = None  # type: ignore[assignment]

OBJECTIVES = ("mlm+nsp", "mlm", "left-to-right")
MASKINGS = ("token", "whole-word", "span")
Batch = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """So many optimiser steps with sequences of at most `max_length` tokens, special ones included."""

    max_length: int
    steps: int


@dataclass(frozen=True)
class Sampling:
    """What becomes of the text. The defaults are those of BERT, https://arxiv.org/abs/1810.04805.

    Attributes:
        objective: "mlm+nsp", masked tokens of sentence pairs; "mlm", masked tokens of full sentences, without the next
            sentence (RoBERTa); "left-to-right", the next token of full sentences.
        masking: "token"; "whole-word", all pieces of a word; "span", runs of words (SpanBERT).
        mask_rate: of the tokens that are not special, these are to be predicted; of those replace_by_mask become
            [MASK], replace_by_random any other token, and the rest stays.
        max_predictions: in a sequence; 0 for any number.
        static_copies: masks and cuts repeat after so many epochs; 0 draws anew in every epoch.
        short_sequences: the share that is cut to a random length; None for 0.1 with sentence pairs, else 0.
        batch_size: sequences in an optimiser step, over all processes; with batch_tokens: None.
        batch_tokens: tokens in an optimiser step at most, over all processes, filled with sequences of all lengths.
        grouping: of batch_tokens: "packed", as full as they get; "by-length", neighbours in length.
        window_tokens: about as many are shuffled at a time.
    """

    objective: str = "mlm+nsp"
    masking: str = "token"
    mask_rate: float = 0.15
    replace_by_mask: float = 0.8
    replace_by_random: float = 0.1
    max_predictions: int = 0
    static_copies: int = 0
    short_sequences: float | None = None
    batch_size: int | None = 256
    batch_tokens: int | None = None
    grouping: str = "packed"
    window_tokens: int = 1 << 24
    seed: int = 0


@dataclass(frozen=True)
class _Window:
    """Documents that are planned together, and how many units (sequences or packs) of the phase came before."""

    epoch: int
    document: int
    units_before: int


class PretrainingBatches(IterableDataset[Batch]):
    """Packed micro-batches of one process, `accumulation` a step, made ahead in a thread of their own.

    A batch has `input_ids`, `token_type_ids`, `position_ids`, `labels` (-100 where there is none), (1, T) int64;
    `cu_seq_lens_q` (B + 1,) int32; `max_length_q`; `label_rows` (M,) int64, which tokens have a label; with "mlm+nsp"
    `next_sentence_label` (B,) int64, 1 where B is another document's. "left-to-right" has `shift_labels` instead of
    `labels`: each token's successor. They are arguments of `fastbert.BertForPreTraining`, `BertForMaskedLM` and
    `BertLMHeadModel`; nothing has to be read back from a GPU. With CUDA, tensors are in pinned memory.

    Args:
        phases: one after the other.
        rank, world_size: of this process. Every process gets its own share of each step.
        accumulation: micro-batches of a process in a step.
        threads: of the C++ core; 0 for one a core.
        prefetch: micro-batches that are made ahead.

    Raises:
        InputError: naming the option that cannot be.
    """

    def __init__(
        self,
        store: Store,
        sampling: Sampling,
        phases: Sequence[Phase],
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        threads: int = 0,
        prefetch: int = 8,
    ) -> None:
        if _C is None:
            raise InputError(f"pretraining needs {NO_EXTENSION}")
        if sampling.objective not in OBJECTIVES:
            raise InputError(f"the objective must be one of {', '.join(OBJECTIVES)}, but is {sampling.objective}")
        if (sampling.batch_size is None) == (sampling.batch_tokens is None):
            raise InputError("exactly one of batch_size and batch_tokens must be given")
        if not 0 <= rank < world_size:
            raise InputError(f"rank must be in [0, {world_size}), but is {rank}")
        self._parts = world_size * accumulation
        size = sampling.batch_tokens if sampling.batch_size is None else sampling.batch_size
        assert size is not None
        if size < self._parts or (sampling.batch_size is not None and size % self._parts):
            raise InputError(
                f"a batch of {size} cannot be divided by {world_size} processes x {accumulation} accumulated batches"
            )
        for phase in phases:
            if sampling.batch_tokens is not None and phase.max_length > size // self._parts:
                raise InputError(
                    f"batches of {size // self._parts} tokens are shorter than a sequence of {phase.max_length}"
                )
        self.store = store
        self.sampling = sampling
        self.phases = tuple(phases)
        self.rank = rank
        self.world_size = world_size
        self.prefetch = prefetch
        self._share = size // self._parts
        self._kinds = np.zeros(store.vocab_size, np.uint8)
        self._kinds[list(store.special.all)] |= 1
        self._kinds[store.continuations] |= 2
        self._samplers = [self._sampler(phase, threads) for phase in self.phases]
        self._start: dict[str, int] = {"step": 0, "epoch": 0, "document": 0, "offset": 0}
        self._windows: list[list[_Window]] = [[] for _ in self.phases]

    @property
    def steps(self) -> int:
        """Of all phases."""
        return sum(phase.steps for phase in self.phases)

    def state_dict(self, step: int) -> dict[str, int]:
        """Where optimiser step `step` begins, of those that have been iterated, or behind the last of them."""
        phase, before = self._phase_of(step)
        units = (step - before) * self._units_a_step
        windows = [w for w in self._windows[phase] if w.units_before <= units]
        if step == self._start["step"]:
            return dict(self._start)
        if not windows:  # a phase that has not begun
            return {"step": step, "epoch": self._epochs_begun(phase), "document": 0, "offset": 0}
        window = windows[-1]
        return {
            "step": step,
            "epoch": window.epoch,
            "document": window.document,
            "offset": units - window.units_before,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Iterate from there.

        Raises:
            InputError: if it is none that `state_dict` gave.
        """
        keys = ("step", "epoch", "document", "offset")
        if sorted(state) != sorted(keys) or not all(isinstance(state[key], int) and state[key] >= 0 for key in keys):
            raise InputError(f"this is no state of pretraining batches: {dict(state)}")
        if state["step"] > self.steps:
            raise InputError(f"the state is at step {state['step']}, but there are {self.steps}")
        self._start = dict(state)
        self._windows = [[] for _ in self.phases]

    def __iter__(self) -> Iterator[Batch]:
        """Raises: InputError, if the store holds tokens that are not in its vocabulary."""
        made: queue.Queue[Batch | BaseException | None] = queue.Queue(self.prefetch)
        stopped = threading.Event()

        def put(item: Batch | BaseException | None) -> bool:
            while not stopped.is_set():
                try:
                    made.put(item, timeout=0.1)
                except queue.Full:
                    continue
                return True
            return False

        def make() -> None:
            try:
                with closing(self._micro_batches()) as batches:
                    for batch in batches:
                        if not put(batch):
                            return
                put(None)
            except BaseException as error:  # raised where the batch is wanted
                put(error)

        maker = threading.Thread(target=make, name="fastbert batches", daemon=True)
        maker.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            maker.join()

    @property
    def _units_a_step(self) -> int:
        """Sequences, or packs, that a step takes from the stream."""
        return self._parts if self.sampling.batch_size is None else self._parts * self._share

    def _phase_of(self, step: int) -> tuple[int, int]:
        """The phase of a step and the steps before that; the last phase, for the end."""
        before = 0
        for i, phase in enumerate(self.phases):
            if step < before + phase.steps or i == len(self.phases) - 1:
                return i, before
            before += phase.steps
        raise InputError("there are no phases")

    def _epochs_begun(self, phase: int) -> int:
        """The first epoch that no phase before this one has seen."""
        return max((w.epoch + 1 for windows in self._windows[:phase] for w in windows), default=self._start["epoch"])

    def _sampler(self, phase: Phase, threads: int) -> Any:
        sampling, store = self.sampling, self.store
        pairs = sampling.objective == "mlm+nsp"
        short = sampling.short_sequences
        try:
            return _C.Sampler(
                [(part.tokens, part.sentences, part.documents) for part in store.parts],
                self._kinds,
                store.special.cls,
                store.special.sep,
                store.special.mask,
                form="pairs" if pairs else "full-sentences",
                max_length=phase.max_length,
                short_probability=(0.1 if pairs else 0.0) if short is None else short,
                window_tokens=sampling.window_tokens,
                seed=sampling.seed,
                static_copies=sampling.static_copies,
                objective="left-to-right" if sampling.objective == "left-to-right" else "masked",
                masking=_C.Masking(
                    unit=sampling.masking,
                    rate=sampling.mask_rate,
                    replace_by_mask=sampling.replace_by_mask,
                    replace_by_random=sampling.replace_by_random,
                    max_predictions=sampling.max_predictions,
                ),
                threads=threads,
            )
        except (ValueError, OverflowError, TypeError) as error:
            raise InputError(str(error).splitlines()[0]) from error

    def _micro_batches(self) -> Generator[Batch, None, None]:
        epoch, document, offset = (self._start[key] for key in ("epoch", "document", "offset"))
        first, before = self._phase_of(self._start["step"])
        done = self._start["step"] - before
        for i in range(first, len(self.phases)):
            sampler = self._samplers[i]
            stream = self._stream(sampler, i, epoch, document, offset, done * self._units_a_step - offset)
            for _ in range(done, self.phases[i].steps):
                for part in range(self._parts):
                    sequences = list(islice(stream, self._units_a_step // self._parts))
                    if part % self.world_size == self.rank:
                        yield self._write(sampler, sequences)
            epoch, document, offset, done = self._epochs_begun(i + 1), 0, 0, 0

    def _stream(
        self, sampler: Any, phase: int, epoch: int, document: int, offset: int, units: int
    ) -> Iterator[tuple[Any, npt.NDArray[np.int64]]]:
        """The sequences, or packs of them, of one epoch after the other: a plan, and which of its sequences."""
        while True:
            try:
                plan = sampler.plan(epoch, document)
            except ValueError as error:
                raise InputError(str(error)) from error
            self._windows[phase].append(_Window(epoch, document, units))
            if self.sampling.batch_size is None:
                order, offsets = _C.group_into_batches(
                    plan.lengths,
                    self._share,
                    grouping=self.sampling.grouping,
                    seed=self.sampling.seed,
                    epoch=epoch,
                    index=document,
                )
            else:
                order = np.arange(len(plan))
                offsets = np.arange(len(plan) + 1)
            for unit in range(offset, len(offsets) - 1):
                yield plan, order[offsets[unit] : offsets[unit + 1]]
            units, offset = units + len(offsets) - 1, 0
            document = plan.next_document
            if document == sampler.documents:
                epoch, document = epoch + 1, 0

    def _write(self, sampler: Any, sequences: list[tuple[Any, npt.NDArray[np.int64]]]) -> Batch:
        runs: list[tuple[Any, list[npt.NDArray[np.int64]]]] = []
        for plan, picks in sequences:
            if not runs or runs[-1][0] is not plan:
                runs.append((plan, []))
            runs[-1][1].append(picks)
        try:
            pieces = [sampler.batch(plan, np.concatenate(picks)) for plan, picks in runs]
        except ValueError as error:
            raise InputError(f"{self.store.path}: {error}") from error
        return self._tensors(pieces[0] if len(pieces) == 1 else _joined(pieces))

    def _tensors(self, arrays: dict[str, Any]) -> Batch:
        left_to_right = self.sampling.objective == "left-to-right"
        names = {"cu_seqlens": "cu_seq_lens_q", "labels": "shift_labels" if left_to_right else "labels"}
        batch: Batch = {"max_length_q": int(arrays.pop("max_seqlen"))}
        for name, array in arrays.items():
            t = torch.from_numpy(array)
            if name in ("input_ids", "token_type_ids", "position_ids", "labels"):
                t = t[None]
            batch[names.get(name, name)] = t.pin_memory() if torch.cuda.is_available() else t
        return batch


def fixed_batches(store: Store, objective: str, max_length: int, sequences: int, tokens: int) -> Iterator[Batch]:
    """The same sequences with the same masks whenever they are asked for: what models are compared on.

    BERT's own masks, 15 % of single tokens, whatever a run trains with. The first `sequences` of the epoch's shuffled
    order, or all there are, in batches of at most `tokens`.

    Raises:
        InputError: as `PretrainingBatches`.
    """
    source = PretrainingBatches(store, Sampling(objective, batch_size=1), [Phase(max_length, 1)])
    sampler = source._samplers[0]
    stream = takewhile(lambda unit: unit[0].epoch == 0, source._stream(sampler, 0, 0, 0, 0, 0))
    some = islice(stream, sequences)
    while group := list(islice(some, max(1, tokens // max_length))):
        yield source._write(sampler, group)


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches end to end."""
    tokens = np.cumsum([0, *(len(piece["input_ids"]) for piece in pieces)])
    joined = {
        name: np.concatenate([piece[name] for piece in pieces])
        for name in pieces[0]
        if name not in ("cu_seqlens", "label_rows", "max_seqlen")
    }
    bounds = [piece["cu_seqlens"][1:] + start for piece, start in zip(pieces, tokens, strict=False)]
    joined["cu_seqlens"] = np.concatenate([[0], *bounds]).astype(np.int32)
    joined["label_rows"] = np.concatenate(
        [piece["label_rows"] + start for piece, start in zip(pieces, tokens, strict=False)]
    )
    joined["max_seqlen"] = max(piece["max_seqlen"] for piece in pieces)
    return joined
