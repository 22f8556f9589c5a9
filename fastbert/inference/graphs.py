"""CUDA graphs of a model in inference: what its launches cost the host is paid once, not in every call.

A graph is captured for a tier: a number of tokens, of sequences, and of tokens in the longest. A batch is filled up to
the next tier by sequences of their own that nobody reads, and by empty ones; no token of the batch sees them. A call
copies the batch into the graph's buffers, replays it, and copies out what belongs to the batch, without reading
anything back from the GPU. What a graph cannot do runs as ever, and is counted.

Dimension key:  B sequences   L padded length   T packed tokens
"""

import contextlib
import logging
import operator
import os
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastbert import packing as packed_batches
from fastbert.families import _base, _inputs
from fastbert.families._heads import PADDING_LOGIT
from fastbert.families._model import BaseModel
from fastbert.kernels import _launch
from fastbert.packing import Packing
from fastbert.survey import Survey
from fastbert.terminal import counted
from fastbert.touched import HOOKS, is_hooked
from fastbert.warmup import outermost, warm_up

SHORTEST = 16  # of a tier's longest sequence; kernels have tiles from there on
_OF_TOKENS = ("token_type_ids", "position_ids", "task_type_ids")
_TAKEN = {
    *("input_ids", "attention_mask", *_OF_TOKENS, "cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "max_length_k"),
    *("output_hidden_states", "output_attentions", "return_dict"),
}
_log = logging.getLogger("fastbert")


class Tier(NamedTuple):
    """Packed tokens, sequences, and tokens in the longest, of a graph's buffers."""

    tokens: int
    sequences: int
    longest: int


def tier_of(tokens: int, sequences: int, longest: int, limit: int) -> Tier:
    """The smallest tier that holds a batch, and what it is filled up with, in sequences no longer than the tier's.

    limit: tokens that a sequence may have.
    """
    step = max(16, 1 << max(0, (tokens - 1).bit_length() - 4))  # an eighth of a power of two
    T = -(-tokens // step) * step
    L = min(limit, max(SHORTEST, 1 << (longest - 1).bit_length()))
    needed = sequences + -(-(T - tokens) // L)
    return Tier(T, max(2, 1 << (needed - 1).bit_length()), L)  # one sequence is no row of tokens: two at least


def graphs(model: nn.Module, *, most: int = 32, max_tokens: int = 16384) -> "Graphs":
    """Let a patched model on a GPU run through CUDA graphs in inference, from now on.

    That is for calls in eval mode without gradients, packed or padded; all others run as before, and so does everything
    on a CPU. A graph is captured at the first batch of its size, or by `Graphs.warm_up`. All are dropped when the model
    is moved, changed in any part, or given other weights. FASTBERT_GRAPHS=0 in the environment switches them off.

    Args:
        model: one of fastbert's, or what contains one.
        most: graphs that are kept; the one not used for longest goes.  max_tokens: of a batch; a larger one keeps a GPU
            busy without them.

    Raises:
        ValueError: if nothing in the model is patched, or an option is below 1.
    """
    if most < 1 or max_tokens < 1:
        raise ValueError(f"most and max_tokens must be at least 1, but are {most} and {max_tokens}")
    fast = outermost(model)
    return Graphs(fast, most, max_tokens, Cuda())


class Graphs:
    """The CUDA graphs of a model. Its `str` is for people.

    Attributes:
        enabled: whether calls may take them.
        captures: how many were captured.  replays: calls that took one.  plain: the other calls, by reason.
    """

    def __init__(self, model: PreTrainedModel, most: int, max_tokens: int, gpu: "Cuda") -> None:
        self.enabled = os.environ.get("FASTBERT_GRAPHS", "1") != "0"
        self.captures, self.replays = 0, 0
        self.plain: Counter[str] = Counter()
        self._model, self._most, self._max_tokens, self._gpu = weakref.ref(model), most, max_tokens, gpu
        self._captured: OrderedDict[Any, _Captured] = OrderedDict()
        self._refused: dict[Any, str] = {}
        self._watch: _Watch | None = None
        self._lock = threading.RLock()
        _base.state(model).graphs = self

    def __str__(self) -> str:
        lines = [f"{counted(len(self._captured), 'CUDA graph')}; calls: {self.replays:,} replayed"]
        lines[0] += f", {self.plain.total():,} without"
        return "\n".join([*lines, *(f"  {count:3} x {why}" for why, count in self.plain.most_common())])

    def warm_up(self, batches: Iterable[Sequence[int]]) -> None:
        """Compile kernels, and capture the graphs for batches whose sequences have these lengths.

        Raises:
            ValueError: if one is longer than the model takes.
        """
        model, batches = cast(PreTrainedModel, self._model()), [list(lengths) for lengths in batches]
        warm_up(model, max_length=max(map(max, batches), default=1))
        for lengths in batches:
            ids = torch.zeros(1, sum(lengths), dtype=torch.int64, device=model.device)
            bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=model.device)
            with torch.inference_mode():
                model(input_ids=ids, cu_seq_lens_q=bounds, max_length_q=max(lengths))

    def remove(self) -> None:
        """Let the model run without them, and free their memory."""
        model = self._model()
        if model is not None and _base.state(model).graphs is self:
            _base.state(model).graphs = None
        self._drop()

    def call(self, model: PreTrainedModel, plain: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """What the model returns, or None where it has to run plainly, as `plain` does."""
        with self._lock:
            try:
                return self._replayed(model, plain, kwargs)
            except _PlainlyError as why:
                self.plain[str(why)] += 1
                return None

    def _replayed(self, model: PreTrainedModel, plain: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        base, device = self._checked(model, kwargs)
        batch = _batch_of(base, kwargs, device)
        if batch.tokens > self._max_tokens:
            raise _PlainlyError(f"more than {self._max_tokens:,} tokens")
        limit = _base.max_tokens(model)
        if not (0 < batch.longest <= limit and batch.tokens > 0 and batch.sequences > 0):
            raise _PlainlyError("a batch that is empty, or longer than the model takes")
        selection = kwargs.get("output_hidden_states", model.config.output_hidden_states)
        tier = tier_of(batch.tokens, batch.sequences, batch.longest, limit)
        key = tier, tuple(batch.of_tokens), repr(selection), *_settings(device.type)
        if key in self._refused:
            raise _PlainlyError(self._refused[key])
        with self._gpu.in_turn(device):
            captured = self._captured.get(key)
            if captured is None:
                captured = self._capture(key, tier, batch, partial(plain, output_hidden_states=selection), base)
            self._captured.move_to_end(key)
            captured.fill(batch)
            captured.replay()
            output = captured.cut(batch)
        self.replays += 1
        _base.state(base).count_packed()
        return output.to_tuple() if kwargs.get("return_dict", model.config.return_dict) is False else output

    def _checked(self, model: PreTrainedModel, kwargs: dict[str, Any]) -> tuple[Any, torch.device]:
        """The base model, and where it lies. Graphs of a model that has changed are dropped."""
        if not self.enabled:
            raise _PlainlyError("they are switched off")
        if model is not self._model():
            raise _PlainlyError("a replica of the model")
        if torch.is_grad_enabled():
            raise _PlainlyError("gradients are enabled")
        if _launch.is_compiling():
            raise _PlainlyError("kernels are being compiled ahead")
        for name, value in kwargs.items():
            if name not in _TAKEN and value is not None:
                raise _PlainlyError(f"the argument {name}")
        base: Any = model.base_model
        if not isinstance(base, BaseModel):
            raise _PlainlyError(f"a {type(base).__name__} in place of the model")
        why = _base.forced(cast(Any, base)) or base._why_not_packed(None, kwargs)
        surveys = [_base.survey(model) if model is not base else None, _base.state(cast(Any, base)).survey]
        if self._watch is None or not self._watch.holds(surveys):
            self._drop()
            self._watch = _Watch(model, surveys)
        device = self._watch.device
        if why := why or self._gpu.why_not(device) or self._watch.why_not:
            raise _PlainlyError(why)
        return base, device

    def _capture(self, key: Any, tier: Tier, batch: "_Batch", run: Callable[..., Any], base: Any) -> "_Captured":
        state = _base.state(base)
        packed_calls = state.packed_calls
        try:
            captured = _Captured(tier, batch, run, self._gpu, first=not self._captured)
            captured.cut(batch)
        except ValueError as error:  # something is wrong with the batch: a plain call says so
            raise _PlainlyError(f"{type(error).__name__}: {error}") from error
        except RuntimeError as error:
            reason = f"the capture failed: {str(error).strip().splitlines()[0]}"
            self._refused[key] = reason
            _log.warning("%s: %s; it runs without a CUDA graph", type(base).__name__, reason)
            raise _PlainlyError(reason) from error
        finally:
            state.packed_calls = packed_calls
        captured.keeps = state.copy
        self.captures += 1
        self._captured[key] = captured
        if len(self._captured) > self._most:
            self._captured.popitem(last=False)
        return captured

    def _drop(self) -> None:
        self._captured.clear()
        self._refused.clear()
        self._watch = None


class Cuda:
    """What a GPU does for `Graphs`: captures, and lets one call after the other have the buffers."""

    def __init__(self) -> None:
        self._pool: Any = None  # of all graphs of a model: one runs at a time
        self._done: torch.cuda.Event | None = None

    def why_not(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"the model is on {device.type}"
        return "a CUDA graph is being captured" if torch.cuda.is_current_stream_capturing() else None

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """A stream waits for the one before that used the buffers."""
        with torch.cuda.device(device):
            if self._done is not None:
                self._done.wait()
            yield
            self._done = self._done or torch.cuda.Event()
            self._done.record()

    def capture(self, run: Callable[[], Any], first: bool) -> tuple[Callable[[], None], Any]:
        """How to replay what `run` does, and what it returns; every replay writes that anew. first: there is none."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are compiled and loaded, and libraries have their workspaces
                run()
        current.wait_stream(stream)
        if first:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with what a capture must not do, such as pinning memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


class _PlainlyError(Exception):
    """Why a call takes no graph."""


class _Batch(NamedTuple):
    """A packed batch.

    Attributes:
        of_tokens: (1, T) integers, by the model's names for them.  cu_seqlens: (B + 1,) int32.
        packing: where it came padded.
    """

    of_tokens: dict[str, Tensor]
    cu_seqlens: Tensor
    longest: int
    packing: Packing | None

    @property
    def tokens(self) -> int:
        return self.of_tokens["input_ids"].shape[1]

    @property
    def sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1


def _batch_of(base: Any, kwargs: Mapping[str, Any], device: torch.device) -> _Batch:
    """Checks are those of the model itself, which a batch that looks strange is left to."""
    ids, cu_seqlens = kwargs.get("input_ids"), kwargs.get("cu_seq_lens_q")
    given = {name: kwargs[name] for name in ("input_ids", *_OF_TOKENS) if kwargs.get(name) is not None}
    if not isinstance(ids, Tensor):
        raise _PlainlyError("no input_ids")
    if cu_seqlens is None:
        given = {name: kwargs.get(name) for name in _OF_TOKENS if name != "task_type_ids"}
        task_type_ids, computed = kwargs.get("task_type_ids"), _base.state(base).options.compute_padding
        inputs = _inputs.prepare(
            base._limits(),
            ids,
            kwargs.get("attention_mask"),
            **given,
            inputs_embeds=None,
            task_type_ids=task_type_ids,
            compute_padding=computed,
        )
        if inputs.pads_first or inputs.padding_mask is not None:
            raise _PlainlyError("hidden states of padding are read")
        packed = {name: getattr(inputs, name) for name in ("input_ids", *_OF_TOKENS)}
        of_tokens = {name: t[None] for name, t in packed.items() if t is not None}
        return _Batch(of_tokens, inputs.packing.cu_seqlens, inputs.packing.max_seqlen, inputs.packing)
    shape = (1, ids.shape[-1])
    if kwargs.get("attention_mask") is not None or kwargs.get("max_length_q") is None or packed_batches.DEBUG:
        raise _PlainlyError("a packed batch with a mask, without max_length_q, or to be looked at")
    integers = (torch.int64, torch.int32)
    for t in given.values():
        if not isinstance(t, Tensor) or t.shape != shape or t.device != device or t.dtype not in integers:
            raise _PlainlyError("ids that are not (1, tokens) integers on the model's device")
    if cu_seqlens.ndim != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.device != device:
        raise _PlainlyError("cu_seq_lens_q that is no (sequences + 1,) int32 on the model's device")
    return _Batch(given, cu_seqlens, int(kwargs["max_length_q"]), None)


class _Captured:
    """A graph, with its buffers.

    Attributes:
        keeps: what else has memory that the graph reads, and must live as long.
    """

    keeps: Any = None

    def __init__(self, tier: Tier, batch: _Batch, run: Callable[..., Any], gpu: Cuda, first: bool) -> None:
        T, B, L = tier
        device = batch.cu_seqlens.device
        with torch.inference_mode(False), torch.no_grad():
            self._tier = tier
            self._of_tokens = {
                name: torch.zeros(1, T, dtype=torch.int64, device=device) for name in batch.of_tokens
            }  # beyond the batch: what an earlier one left there
            self._cu_seqlens = torch.zeros(B + 1, dtype=torch.int32, device=device)
            self._steps = torch.arange(1, B + 1, dtype=torch.int32, device=device) * L
            self.fill(batch)
            autocast = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)

            def once() -> Any:
                # A cast weight in autocast's cache would be the graph's memory, or gone when it is replayed.
                with torch.autocast(device.type, *autocast, cache_enabled=False):
                    return run(**self._of_tokens, cu_seq_lens_q=self._cu_seqlens, max_length_q=L, return_dict=True)

            self.replay, self._output = gpu.capture(once, first)

    def fill(self, batch: _Batch) -> None:
        """Copies it in, and bounds behind it: of sequences no longer than the tier's, then of empty ones."""
        T, B = batch.tokens, batch.sequences
        for name, buffer in self._of_tokens.items():
            buffer[:, :T].copy_(batch.of_tokens[name])
        self._cu_seqlens[: B + 1].copy_(batch.cu_seqlens)
        behind = self._cu_seqlens[B + 1 :]
        torch.add(self._steps[: behind.shape[0]], T, out=behind).clamp_(max=self._tier.tokens)

    def cut(self, batch: _Batch) -> Any:
        """Copies out what belongs to the batch."""
        fills = dict.fromkeys(("start_logits", "end_logits"), PADDING_LOGIT)
        cut = {name: self._cut(value, batch, fills.get(name, 0.0)) for name, value in self._output.items()}
        return type(self._output)(**cut)

    def _cut(self, value: Any, batch: _Batch, fill: float) -> Any:
        if value is None:
            return None
        if isinstance(value, tuple):
            return tuple(self._cut(t, batch, fill) for t in value)
        if value.ndim > 1 and value.shape[:2] == (1, self._tier.tokens):
            rows = value[:, : batch.tokens]
            if batch.packing is None:
                return rows.clone()
            padded = batch.packing.unpack(rows[0], fill)
            return padded.clone() if batch.packing.indices is None else padded
        if value.ndim > 0 and value.shape[0] == self._tier.sequences:
            return value[: batch.sequences].clone()
        raise RuntimeError(f"an output of shape {tuple(value.shape)} is neither tokens' nor sequences'")


class _Watch:
    """What was in a model when its graphs were captured, and whether it still is: parts, modes, hooks, weights.

    Attributes:
        device: where it lies.  why_not: why this model has no graphs.
    """

    def __init__(self, model: PreTrainedModel, surveys: Sequence[Survey | None]) -> None:
        modules = list(model.modules())
        known = {m for survey in surveys if survey is not None for m in survey.visited}
        self._surveys = list(surveys)
        self._dicts = [m.__dict__ for m in modules]
        self._others = [m for m in modules if m not in known]  # what no survey looks at
        self._other_dicts = [m.__dict__ for m in self._others]
        self._children = [d["_modules"] for d in self._other_dicts if d["_modules"]]
        self._tensors = [d[kind] for d in self._dicts for kind in ("_parameters", "_buffers") if d[kind]]
        self._then = self._now()
        self.device = model.device
        self.why_not = self._why_not(model, modules)

    def _now(self) -> list[Any]:
        tensors = [t for t in chain.from_iterable(map(dict.values, self._tensors)) if t is not None]
        return [
            list(map(_TRAINING, self._dicts)),
            list(map(type, self._others)),
            list(map(dict.get, self._other_dicts, repeat("forward"))),
            list(chain.from_iterable(map(dict.values, self._children))),
            list(chain.from_iterable(chain.from_iterable(map(HOOKS, self._other_dicts)))),
            list(map(Tensor.data_ptr, tensors)),
            _versions(tensors),  # what was made of a weight may be kept
        ]

    def holds(self, surveys: Sequence[Survey | None]) -> bool:
        return all(map(operator.is_, surveys, self._surveys)) and self._now() == self._then

    def _why_not(self, model: PreTrainedModel, modules: Sequence[nn.Module]) -> str | None:
        if any(m.training for m in modules):
            return "training mode"
        if any(is_hooked(m) for m in modules[1:]):
            return "a module inside of the model is hooked"
        for survey in filter(None, self._surveys):
            if survey.called_leaves or survey.first() is not None:
                return survey.first() or "a part that is called may have a state of its own"
        devices = {t.device for t in chain(model.parameters(), model.buffers())}
        return "the model lies on several devices" if len(devices) > 1 else None


_TRAINING, _VERSION = operator.itemgetter("training"), operator.attrgetter("_version")


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # what was made in inference mode has none
        return [None if t.is_inference() else t._version for t in tensors]


def _settings(device: str) -> tuple[Any, ...]:
    """What decides which kernels run, beside model and batch."""
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return *autocast, _launch.precision(torch.float32), torch.are_deterministic_algorithms_enabled()
