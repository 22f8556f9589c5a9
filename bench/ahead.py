"""Compiles what `make tune` is about to ask for, in processes, while the GPU times.

Nothing here knows a kernel's configurations. The questions are put, in their order, to tensors without memory, with the
GPU's numbers in place of this process's: the launchers run, Triton's launch code binds and specialises their arguments,
and what it then would compile goes to a pool of processes, which leave it in Triton's cache on disk. The process that
times asks for the very same and finds it there. Nothing here touches the GPU.
"""

import ast
import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import tune
from bench.process import ROOT, environment
from fastbert import _library
from fastbert.kernels import _launch

MODULE = "-m", "bench.ahead"
REHEARSED = 1  # kernels that are compiled where there is no GPU to run them
OFTEN = 20  # kernels between two words


class Ahead:
    """A process that compiles for one question after the other, until the context is left.

    Args:
        device: on a CPU it looks at all launches of a Hopper, and compiles the first of them.
    """

    def __init__(self, device: str, smallest: bool) -> None:
        self._rehearsal = device != "cuda"
        if self._rehearsal:
            from bench.codegen import CHIPS

            chip, processes = CHIPS["sm_90"].chip, 1
        else:
            chip = _launch.chip(torch.device("cuda", torch.cuda.current_device()))
            processes = max(1, (os.cpu_count() or 1) - 2)
        most = [str(REHEARSED)] if self._rehearsal else []
        small = smallest and not self._rehearsal
        self._arguments = [repr(tuple(chip)), str(int(small)), str(processes), *most]
        self._said: list[str] = []

    def __enter__(self) -> "Ahead":
        variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, *MODULE, *self._arguments]
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, preexec_fn=os.setpgrp
        )
        return self

    def __exit__(self, error: Any, *_: Any) -> None:
        """What is not compiled by now is not needed; but a rehearsal is there to see all of it."""
        if not self._rehearsal or error is not None:
            self._kill()
        output, _ = self._process.communicate()
        self._said = output.strip().splitlines()
        self._kill()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    @property
    def failed(self) -> bool:
        """Whether it died by itself."""
        return self._process.returncode not in (0, -signal.SIGKILL)

    def said(self) -> str:
        last = self._said[-1] if self._said else "no kernel compiled ahead"
        return f"{last}; then it failed with status {self._process.returncode}" if self.failed else last


class Launch(NamedTuple):
    """What Triton would compile, in plain data."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def compile(self, chip: _launch.Chip) -> str | None:
        """Into the cache on disk; why not, if not."""
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        try:
            triton.compile(source, target=_target(chip), options=self.options)
        except Exception as error:  # the process that times will say so
            return f"{type(error).__name__}: {error}"
        return None


class _Launchers(TorchDispatchMode):
    """fastbert's operators by the launchers of their CUDA sides, whatever the tensors are on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastbert":
            func = _library._SIDES[func.overloadpacket.__name__]["cuda"]
        return func(*args, **(kwargs or {}))


def launches(chip: _launch.Chip, smallest: bool) -> Iterator[Launch]:
    """What the questions launch on a chip, in their order, each once, without launching it."""
    found: dict[tuple[str, str, str], Launch] = {}
    new: list[Launch] = []

    def keep(
        kernel: Any, key: Any, signature: Any, _device: Any, constants: Any, options: Any, attributes: Any, *_: Any
    ) -> None:
        launch = Launch(
            kernel.__module__, kernel.__name__, signature, constants, attributes, dict(options.__dict__)
        )  # fmt: skip
        if found.setdefault((launch.module, launch.kernel, str(key)), launch) is launch:
            new.append(launch)

    def ready(operator: Any, _specification: Any, arguments: Any) -> tune.Ready:
        return tune.Ready(partial(operator, *arguments), ())

    device = SimpleNamespace(
        get_current_device=lambda: "ahead", get_current_stream=lambda _: 0, get_current_target=lambda: _target(chip)
    )
    with (
        mock.patch.object(_launch, "chip", return_value=chip),
        mock.patch.object(tune, "_ready", ready),
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "_do_compile", keep),
        torch.no_grad(),
        _Launchers(),
    ):
        for question in tune.questions("meta", smallest):
            step = question.ready().step
            for candidate in question.candidates.values():
                with mock.patch.object(question.module, question.attribute, candidate.replacement):
                    step()
                yield from new
                new.clear()


def _target(chip: _launch.Chip) -> GPUTarget:
    return GPUTarget("cuda", 10 * chip.capability[0] + chip.capability[1], 32)


def main(chip: _launch.Chip, smallest: bool, processes: int, most: int | None) -> None:
    start, failures = time.monotonic(), []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        waiting = [
            pool.submit(launch.compile, chip) if most is None or i < most else None
            for i, launch in enumerate(launches(chip, smallest))
        ]
        started = list(filter(None, waiting))
        for done, future in enumerate(as_completed(started), 1):
            failures += [why] if (why := future.result()) else []
            if done % OFTEN == 0 or done == len(started):
                failed = f", {len(failures)} failed: {failures[0].splitlines()[0][:100]}" if failures else ""
                seconds = time.monotonic() - start
                print(f"{done} of {len(waiting)} kernels compiled ahead, {seconds:.0f} s{failed}", flush=True)


if __name__ == "__main__":
    numbers, smallest, processes, *most = sys.argv[1:]
    main(_launch.Chip(*ast.literal_eval(numbers)), smallest == "1", int(processes), int(most[0]) if most else None)
