"""A CUDA graph's stand-in on a CPU: operations noted once, and done again on the same tensors, without a model's code.

As in a graph, numbers from the host are those of the capture for good, and every replay writes the same outputs.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbert.inference.graphs import Cuda


class Tape(TorchDispatchMode):
    """Notes operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = op(*args, **(kwargs or {}))
        self.done.append((op, args, kwargs or {}, output))
        return output

    def replay(self) -> None:
        for op, args, kwargs, output in self.done:
            for old, new in zip(tree_leaves(output), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # not a view, nor in place
                    old.copy_(new)

    def reads(self) -> list[str]:
        """Operations by which the host learned a value."""
        names = (str(op) for op, *_ in self.done)
        return [name for name in names if name.startswith(("aten._local_scalar_dense", "aten.nonzero.", "aten.equal"))]


class OnACpu(Cuda):
    """Captures on a tape.

    Attributes:
        tapes: of all captures.
        fails: what the next capture raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tapes: list[Tape] = []
        self.fails: Exception | None = None

    def why_not(self, device: torch.device) -> str | None:
        return None

    @contextlib.contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        yield

    def capture(self, run: Callable[[], Any], first: bool) -> tuple[Callable[[], None], Any]:
        if self.fails is not None:
            raise self.fails
        run()
        with Tape() as tape:
            output = run()
        self.tapes.append(tape)

        def replay() -> None:
            with torch.no_grad():
                tape.replay()

        return replay, output
