"""Launch code without a GPU: Triton binds and specialises the arguments, and what it would compile is noted.

Products are not computed: on a CPU they would take most of the time, and nothing here is about numbers.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelParam, create_function_from_signature

from fastbert import _library, prepared
from fastbert.kernels import _launch

Batch = dict[str, Any]


class Launches:
    """What was compiled, as (kernel, key), and how often a kernel was launched.

    Attributes:
        kernels: by name.
        specialised: the keys of each kernel, if none of its arguments were in do_not_specialize.
    """

    def __init__(self) -> None:
        self.compiled: list[tuple[str, str]] = []
        self.launched = 0
        self.kernels: dict[str, JITFunction[Any]] = {}
        self.specialised: dict[str, set[str]] = {}

    def variants(self) -> Counter[str]:
        return Counter(kernel for kernel, _ in self.compiled)


@contextlib.contextmanager
def on_a_gpu(
    capability: tuple[int, int] = (9, 0), specialise: bool = False, compiles: bool = False, shared: int = 232448
) -> Iterator[Launches]:
    """Operators on CPU tensors go to the launchers, which see this chip. Every time nothing is compiled yet.

    Args:
        specialise: note `Launches.specialised`, too.
        compiles: what is compiled is compiled indeed. It is not launched either.
        shared: bytes of shared memory that a program can have.
    """
    launches, binders = Launches(), dict[JITFunction[Any], Any]()
    device = f"pretended {id(launches)}"
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def launched(*_: Any) -> None:
        launches.launched += 1

    ready = SimpleNamespace(launch_metadata=lambda *_: None, run=launched, function=None, packed_metadata=None)
    compile = JITFunction._do_compile

    def note_compiled(kernel: JITFunction[Any], key: str, *args: Any) -> Any:
        launches.compiled.append((kernel.__name__, key))
        if compiles:
            return compile(kernel, key, *args)
        kernel.device_caches[device][0][key] = ready
        return ready

    launch = _launch.launch

    def note_launch(kernel: JITFunction[Any], grid: Any, *args: Any, **meta: Any) -> None:
        launch(kernel, grid, *args, **meta)
        launches.kernels[kernel.__name__] = kernel
        if not specialise:
            return
        if kernel not in binders:
            params = [KernelParam(p.num, p._param, False, p.do_not_specialize_on_alignment) for p in kernel.params]
            backend = kernel.device_caches[device][3]
            binders[kernel] = create_function_from_signature(kernel.signature, params, backend)
        _, key, options = binders[kernel](*args, **meta)
        launches.specialised.setdefault(kernel.__name__, set()).add(f"{key} {options}")

    pretended = SimpleNamespace(
        get_current_device=lambda: device,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: target,
        launcher_cls=lambda *_: launched,
        utils=SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": shared}, load_binary=lambda *_: (1, 1, 32, 0, 1024)
        ),
    )
    with (
        mock.patch.object(_launch, "chip", return_value=_launch.Chip(capability, 132)),
        mock.patch.object(driver, "_active", pretended),
        mock.patch.object(JITFunction, "_do_compile", note_compiled),
        mock.patch.object(_launch, "launch", note_launch),
        mock.patch.object(prepared, "INTERPRETED", True),  # layers one by one, as on a GPU
        _served("fastbert", {name: sides["cuda"] for name, sides in _library._SIDES.items()}),
        _served("aten", {"mm": _mm, "addmm": lambda bias, a, b, **_: _mm(a, b)}),
    ):
        try:
            yield launches
        finally:
            for kernel in launches.kernels.values():
                kernel.device_caches.pop(device, None)


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@contextlib.contextmanager
def _served(namespace: str, functions: dict[str, Any]) -> Iterator[None]:
    """Operators on CPU tensors by these functions."""
    library = torch.library.Library(namespace, "IMPL")
    try:
        for name, function in functions.items():
            library.impl(name, function, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def random_lengths(draw: random.Random, longest: int, tokens: int) -> list[int]:
    """Of a batch: some short, some of the longest, some all alike; one in five batches has a single sequence."""
    longest = draw.choice([longest, longest, draw.randint(1, longest)])
    count = draw.choice([1, draw.randint(2, 4), draw.randint(2, 40), draw.choice([16, 32]), 8])
    lengths = [longest, *(draw.choice([longest, draw.randint(1, longest)]) for _ in range(count - 1))]
    if draw.random() < 0.3:
        lengths = [longest] * count
    return lengths[: max(1, tokens // longest)]


def packed_batch(draw: random.Random, seqlens: list[int], vocabulary: int, labels: bool = False) -> Batch:
    """As the pretraining collator gives them."""
    T = sum(seqlens)
    ids = torch.tensor([draw.randrange(vocabulary) for _ in range(T)])[None]
    batch: Batch = {
        "input_ids": ids,
        "token_type_ids": ids % 2,
        "position_ids": torch.cat([torch.arange(n) for n in seqlens])[None],
        "cu_seq_lens_q": torch.tensor([0, *seqlens]).cumsum(0).int(),
        "max_length_q": max(seqlens),
    }
    if labels:
        rows = torch.tensor(sorted(draw.sample(range(T), max(1, round(0.15 * T)))))
        batch["labels"] = torch.full_like(ids, -100).index_copy(1, rows, ids[:, rows])
        batch["label_rows"] = rows
    return batch


def padded_batch(draw: random.Random, seqlens: list[int], vocabulary: int) -> Batch:
    """As users give them, right-padded; without a mask where there is no padding."""
    B, L = len(seqlens), max(seqlens)
    mask = torch.arange(L) < torch.tensor(seqlens)[:, None]
    ids = torch.tensor([[draw.randrange(vocabulary) for _ in range(L)] for _ in range(B)]) * mask
    return {"input_ids": ids} if mask.all() else {"input_ids": ids, "attention_mask": mask.long()}
