"""What a provider comes to, whatever becomes of the process that tries it.

Before a provider is tried, the run on disk says that its process was stopped; afterwards, what it came to. So a process
that dies, or hangs and is killed, leaves word, and the next one goes on behind it. What spoils a process for all that
comes after ends it: an illegal access, and a CUDA graph that could not be captured, after which PyTorch's generator on
the GPU fails. Nothing that ended a process is tried again.
"""

import gc
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from bench import clock
from bench.record import OURS, Recorder, Row, Work

CANNOT_GO_ON = 97  # exit status
STOPPED = "its process was stopped"
TIME_OVER = "not measured: the time was over"
AT_ONCE = OURS, "PyTorch"  # names begin so of what is captured without being timed by events first


class NotApplicableError(Exception):
    """A provider cannot do this case; the message says why."""


def end_process() -> NoReturn:
    """Without destructors, which may wait for a GPU that does not answer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(CANNOT_GO_ON)


class Attempts:
    """Keeps the book of one run.

    Args:
        recorder: None where nothing is measured: then nothing is written, and no process ends.
        resume: whether rows of the run that are there go on where they stopped, or are measured afresh.
    """

    def __init__(
        self,
        recorder: Recorder | None,
        *,
        device: str,
        budget: clock.Budget,
        resume: bool,
        end: Callable[[], NoReturn] = end_process,
    ) -> None:
        self.over = False
        self._recorder, self._device, self._budget, self._resume, self._end = recorder, device, budget, resume, end
        self._captured: set[str] = set()

    def row(self, bench: str, case: Mapping[str, Any], work: Work | None = None, unit: str = "") -> Row:
        """The row of a case, with what it came to so far."""
        if self._recorder is not None and self._resume:
            for row in self._recorder.run.rows:
                if (row.bench, row.case) == (bench, dict(case)):
                    for name in [name for name, why in row.failures.items() if why == TIME_OVER]:
                        del row.failures[name]
                    return row
        return Row(bench, dict(case), work or Work(), unit=unit)

    def make(self, row: Row, name: str, do: Callable[[], str | None]) -> Exception | None:
        """Let a provider do what it has to, unless it did, or failed to, before.

        Args:
            do: returns what is wrong with it, or None.

        Returns:
            what it raised.
        """
        if name in row.failures or name in row.timings or name in row.values:
            return None
        if self._budget.left() <= 0:
            self.over = True
            row.failures[name] = TIME_OVER
            self.write(row)
            return None
        failed: Exception | None = None
        row.failures[name] = STOPPED
        self.write(row)
        try:
            why = do()
        except NotApplicableError as error:
            why = str(error)
        except Exception as error:  # another library, at a size that it was not made for, is no reason to stop
            why, failed = reason(error), error
            self._let_go(error)
        if why is None:
            row.failures.pop(name, None)
        else:
            row.failures[name] = why
        self.write(row)
        self._tidy_up()
        return failed

    def refused(self, bench: str, name: str) -> str | None:
        """Why a provider could not be captured before."""
        return None if self._recorder is None else self._recorder.run.uncaptured.get(f"{bench}: {name}")

    def met(self, bench: str, name: str) -> bool:
        """Whether a provider may be captured without being timed by events first."""
        return name.startswith(AT_ONCE) or f"{bench}: {name}" in self._captured

    @contextmanager
    def capture(self, row: Row, name: str, *, only: bool) -> Iterator[None]:
        """What is captured, and replayed for the first times, in here; if that fails the process ends.

        Args:
            only: whether a provider has no figure without a graph. Else, if this fails, it keeps the one by events that
                it has, or the next process makes one.
        """
        what = f"{row.bench}: {name}"
        run = None if self._recorder is None else self._recorder.run
        if run is not None:
            run.uncaptured[what] = STOPPED
            if not only:
                row.failures.pop(name, None)
            self.write(row)
        try:
            yield
        except Exception as error:
            if run is None:
                raise
            run.uncaptured[what] = reason(error)
            if only:
                row.failures[name] = f"cannot be captured: {reason(error)}"
            self.write(row)
            self._end()
        if run is not None:
            del run.uncaptured[what]
        self._captured.add(what)

    def write(self, row: Row) -> None:
        if self._recorder is not None:
            self._recorder.add(row)

    def _let_go(self, error: BaseException | None) -> None:
        """Of tensors that a traceback holds: the next provider may need the memory."""
        while self._device == "cuda" and error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__

    def _tidy_up(self) -> None:
        if self._device != "cuda":
            return
        try:
            gc.collect()
            torch.cuda.empty_cache()
            clock.check()
        except Exception:
            if self._recorder is None:
                raise
            self._end()


def is_error(why: str) -> bool:
    """Whether a provider failed, or was wrong, and is not only absent or not made for a case."""
    return re.match(r"\w+: ", why) is not None


def reason(error: BaseException) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
