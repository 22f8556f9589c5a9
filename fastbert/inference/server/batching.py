"""Texts of many requests in batches: a queue in which requests take turns, and one thread that owns the model.

Dimension key:  B texts   N elements of a result
"""

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastbert.inference.server.metrics import Metrics
from fastbert.inference.tokens import Tokens, joined

Results = npt.NDArray[np.float32]


class Work:
    """The texts of one request, longest first, and their results as they come.

    Attributes:
        result: (B, N), a row for each text, in their order. To cancel it takes what is left out of the queue.
    """

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.result: Future[Results] = Future()
        self.since = time.perf_counter()
        self._order = np.argsort(-tokens.lengths, kind="stable")
        self._ends = tokens.lengths[self._order].cumsum()
        self._taken = 0
        self._left = len(self._order)
        self._rows: Results | None = None

    @property
    def all_taken(self) -> bool:
        return self._taken == len(self._order)

    def take(self, share: int, room: int) -> npt.NDArray[np.int64]:
        """The next texts, with `share` tokens or one text; none where that one has no room."""
        before = self._ends[self._taken - 1] if self._taken else 0
        end = int(np.searchsorted(self._ends, before + min(share, room), side="right"))
        if end <= self._taken:
            end = self._taken + int(self._ends[self._taken] - before <= room)
        rows = self._order[self._taken : end]
        self._taken = end
        return rows

    def put(self, rows: npt.NDArray[np.int64], results: Results) -> None:
        if self._rows is None:
            self._rows = np.empty((len(self._order), *results.shape[1:]), np.float32)
        self._rows[rows] = results
        self._left -= len(rows)
        if not self._left and self.result.set_running_or_notify_cancel():
            self.result.set_result(self._rows)

    def fail(self, error: Exception) -> None:
        if not self.result.done() and self.result.set_running_or_notify_cancel():
            self.result.set_exception(error)


class Part(NamedTuple):
    """Some texts of a request, in a batch."""

    work: Work
    rows: npt.NDArray[np.int64]


def _prompt(part: Part) -> int:
    return part.work.tokens.prompt


class Batcher:
    """A thread that runs a model on what waits.

    Args:
        run: tokens of B texts to (B, N) results; called in that thread alone.
        batch_tokens: tokens a batch may have; a longer text makes one of its own.

    Attributes:
        failing: the last batch failed.
        seconds_per_text: of late.
    """

    def __init__(self, run: Callable[[Tokens], Results], batch_tokens: int, metrics: Metrics) -> None:
        self._run, self._batch_tokens, self._metrics = run, batch_tokens, metrics
        self.failing, self.seconds_per_text = False, 0.0
        self._queue: deque[Work] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="fastbert batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests with texts that no batch has taken yet."""
        return len(self._queue)

    def submit(self, tokens: Tokens) -> "Future[Results]":
        """Queues the texts of a request, at least one."""
        work = Work(tokens)
        with self._changed:
            self._queue.append(work)
            self._changed.notify()
        return work.result

    def close(self) -> None:
        """Ends the thread, when what is queued is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def take(self) -> list[Part]:
        """The next batch. Requests take turns, the longest waiting first, each with an equal share of the batch: one of
        a thousand texts holds up nobody's query. A text that has no room begins the next batch."""
        parts: list[Part] = []
        room = self._batch_tokens
        share = room // max(1, len(self._queue))
        while self._queue and room > 0:
            work = self._queue.popleft()
            if work.result.done():  # cancelled, or failed in an earlier batch
                continue
            rows = work.take(share, room if parts else sys.maxsize)
            if not len(rows):
                self._queue.appendleft(work)
                break
            parts.append(Part(work, rows))
            room -= int(work.tokens.lengths[rows].sum())
            if not work.all_taken:
                self._queue.append(work)
        return parts

    def _loop(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._closed:
                        return
                    self._changed.wait()
                parts = self.take()
            for _, group in groupby(sorted(parts, key=_prompt), _prompt):
                self._do(list(group))
            del parts  # or the last requests would stay while nothing comes

    def _do(self, parts: Sequence[Part]) -> None:
        start = time.perf_counter()
        try:
            tokens = joined([part.work.tokens.select(part.rows) for part in parts])
            results = self._run(tokens)
            if not np.isfinite(results).all():
                raise FloatingPointError("the model gave values that are not finite: try another dtype")
            self.failing = False
            seconds, done = time.perf_counter() - start, 0
            self._metrics.batch(len(results), len(tokens.ids), seconds)
            for work, rows in parts:
                work.put(rows, results[done : done + len(rows)])
                done += len(rows)
        except Exception as error:
            self._fail(parts, error)
            return
        of_late = self.seconds_per_text or seconds / done
        self.seconds_per_text = 0.9 * of_late + 0.1 * seconds / done

    def _fail(self, parts: Sequence[Part], error: Exception) -> None:
        if len({part.work for part in parts}) > 1:  # each alone, for one request's fault is not the others'
            for part in parts:
                if not part.work.result.done():
                    self._do([part])
            return
        self.failing = True
        self._metrics.failures.inc()
        traceback.print_exception(error)
        parts[0].work.fail(error)
