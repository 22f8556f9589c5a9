"""Kernels compiled ahead, in threads, instead of one by one wherever a step first needs them.

The model itself runs on small packed batches that among them need all that its batches can need. What the launchers
choose goes by the longest sequence, by whether all are equally long, by whether the tokens are fewer than twice the
features (`encoder`), and by which sizes 16 divides. Nothing is launched: a launch compiles, or finds what is compiled.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastbert.families import CLASSES, _base
from fastbert.kernels import _launch
from fastbert.machine import cores
from fastbert.terminal import counted

TRIES = 20
LENGTHS = (16, 32, 64, 128)  # tiles shrink with a shorter longest sequence; all that are longer have the same


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did. Its `str` is for people.

    Attributes:
        kernels: that were not in memory yet: compiled now, or read from Triton's cache on the disk.
        threads: 0 where there was nothing to do, because the model is not on a GPU.
        failures: what did not compile, or did not fit into the GPU's memory; it is met again where it is needed.
    """

    kernels: int
    seconds: float
    threads: int
    failures: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.threads:
            return "nothing to compile: Triton kernels run on a GPU only"
        done = f"{counted(self.kernels, 'kernel')} compiled or loaded in {self.seconds:.1f} s"
        lines = [f"{done}, on {counted(self.threads, 'thread')}"]
        return "\n".join([*lines, *(f"warning: {failure}" for failure in self.failures)])


def warm_up(
    model: nn.Module, *, training: bool = False, max_length: int | None = None, threads: int | None = None
) -> WarmUp:
    """Compile the kernels that a model's batches will need, before the first of them.

    Parameters, gradients, buffers, training flags and random states stay as they are, and nothing is communicated, but
    by FSDP, under which all processes must call this. Hooks see the small batches. Autocast is that of the caller.

    Args:
        model: one of fastbert's, or what contains one: patched, in DDP, with adapters.
        training: what a training step needs, in training mode; else what inference needs.
        max_length: tokens of the longest sequence that will come; what the model takes where it is None.
        threads: one a core where it is None.

    Raises:
        ValueError: if nothing in the model is patched, or it cannot take sequences of max_length, or none packed.
    """
    start = time.perf_counter()
    fast = outermost(model)
    longest = _base.max_tokens(fast)
    max_length = longest if max_length is None else max_length
    if not 1 <= max_length <= longest:
        raise ValueError(f"max_length must be in [1, {longest}] for this model, but is {max_length}")
    devices = _gpus(fast)
    if not devices:
        return WarmUp(0, 0.0, 0)
    from triton import AsyncCompileMode

    threads = threads or cores()
    kernels, failures = 0, dict[str, None]()
    with _Compilers(threads, "fastbert warm-up") as pool:
        for device in devices:
            only = device if len(devices) > 1 else None
            with AsyncCompileMode(pool, ignore_errors=True) as mode, _launch.only_compiling(only):
                failures |= dict.fromkeys(rehearse(fast, training, max_length))
            compiled = list(mode.future_kernels.values())
            kernels += len(compiled)
            failures |= dict.fromkeys(filter(None, pool.map(partial(_load, device), compiled)))
    return WarmUp(kernels, time.perf_counter() - start, threads, tuple(failures))


def rehearse(model: PreTrainedModel, training: bool, max_length: int) -> list[str]:
    """Run the model on the small batches. Returns what it could not run."""
    features, failures = model.config.hidden_size, []
    with _left_as_it_is(model, training):
        for seqlens in _batches(max_length, features):
            try:
                _run(model, seqlens, training)
            except torch.OutOfMemoryError:
                failures.append(f"{sum(seqlens)} tokens do not fit into the GPU's memory: not all kernels are compiled")
    return failures


def _batches(max_length: int, features: int) -> Iterator[list[int]]:
    """Lengths of the sequences: for each class of lengths equal ones and others, with few tokens and with many.

    The tokens of the one are a multiple of 16 where L is one, those of the other are odd.
    """
    for longest in (*(length for length in LENGTHS if length < max_length), max_length):
        yield [longest]
        yield [longest, 1, 1, 1]
        if longest < 2 * features:
            yield [longest] * -(-2 * features // longest)
            yield [longest] + [1] * max(3, 2 * features - longest)


def _run(model: PreTrainedModel, seqlens: list[int], training: bool) -> None:
    """A forward, and in training a backward, with labels where the loss of these needs other kernels."""
    T, device = sum(seqlens), model.device
    ids = torch.zeros(1, T, dtype=torch.int64, device=device)
    batch: dict[str, Any] = {
        "input_ids": ids,
        "cu_seq_lens_q": torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device),
        "max_length_q": max(seqlens),
    }
    if training and model.get_output_embeddings() is not None:
        labels = 16 if seqlens[0] == seqlens[-1] else 17
        batch["labels"] = ids.masked_fill(torch.arange(T, device=device) >= min(labels, T // 2), -100)
        pair_label = getattr(model, "_pair_label", None)
        if pair_label is not None:
            batch[pair_label] = torch.zeros(len(seqlens), dtype=torch.int64, device=device)
    output = model(**batch, return_dict=True)
    loss = output.get("loss")
    if loss is None:
        loss = sum(t.float().sum() for t in output.values() if isinstance(t, Tensor) and t.is_floating_point())
    if training and isinstance(loss, Tensor) and loss.requires_grad:
        _differentiate(model, loss)


def _differentiate(model: PreTrainedModel, loss: Tensor) -> None:
    """Gradients that go nowhere: no `.grad`, no hooks of DDP. FSDP's must run, for they free what it gathered."""
    if _is_sharded(model):
        loss.backward()
    else:
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


def _is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def _left_as_it_is(model: PreTrainedModel, training: bool) -> Iterator[None]:
    """In training or evaluation mode, and at the end as before: modes, gradients, counts of calls, random states.

    The backward runs in this thread, where launches only compile. Outputs are never written, so NaN means nothing.
    """
    modes = {module: module.training for module in model.modules()}
    states = [_base.state(module) for module in modes]
    counts = [(state.packed_calls, state.fallbacks.copy()) for state in states]
    gradients = [(p, p.grad) for p in model.parameters()] if training and _is_sharded(model) else []
    for p, _ in gradients:
        p.grad = None
    if model.training != training:
        for module in modes:
            module.training = training
    try:
        with (
            torch.random.fork_rng(_gpus(model)),
            torch.set_grad_enabled(training),
            torch.autograd.set_multithreading_enabled(False),
            torch.autograd.set_detect_anomaly(False),
        ):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for p, gradient in gradients:
            p.grad = gradient
        for state, (packed_calls, fallbacks) in zip(states, counts, strict=True):
            state.packed_calls, state.fallbacks = packed_calls, fallbacks


def outermost(model: nn.Module) -> PreTrainedModel:
    """The outermost model of fastbert's that takes packed batches."""
    known = tuple(fast for fast in CLASSES.values() if issubclass(fast, PreTrainedModel))
    for module in model.modules():
        if isinstance(module, known):
            reads = getattr(module, "_reads", None)
            packed = reads is None or reads() in (None, "first")  # ELECTRA's summary of all tokens has no kernels
            return cast(PreTrainedModel, module if packed else module.base_model)
    raise ValueError(f"{type(model).__name__} is not patched")


class _Compilers(ThreadPoolExecutor):
    """Threads that try again where they disturbed each other.

    Older Pythons count how deep `ast.parse` is for all threads in one place, and raise a SystemError where that is off.
    Triton would keep the failure, and raise it in the first step.
    """

    def submit(self, function: Any, /, *args: Any, **named: Any) -> Future[Any]:
        return super().submit(_undisturbed, partial(function, *args, **named))


def _undisturbed(function: Callable[[], Any]) -> Any:
    for _ in range(TRIES - 1):
        try:
            return function()
        except Exception as error:
            if not _is_disturbance(error):
                raise
    return function()


def _is_disturbance(error: BaseException | None) -> bool:
    """Whether it comes from a SystemError: inside of a kernel's code Triton makes a CompilationError of it."""
    while error is not None and not isinstance(error, SystemError):
        error = error.__cause__ or error.__context__
    return error is not None


def _load(device: int, compiled: Any) -> str | None:
    """Bind the launcher and load the code, so that a CUDA graph can be captured at once. Returns why it could not."""
    try:
        with torch.cuda.device(device):
            compiled.result()._init_handles()
    except Exception as error:
        return f"a kernel cannot be launched: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
