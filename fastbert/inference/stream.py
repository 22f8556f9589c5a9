"""Items of any number through an engine, in windows: a thread reads and tokenises ahead of the encoder."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

from fastbert.errors import InputError
from fastbert.inference.tokens import Tokens

WINDOW = 4096
_LONGEST_WINDOW = 1 << 20  # characters
_AHEAD = 2
_SECONDS_TO_END = 1.0  # that a thread gets which may wait for a pipe

Row = TypeVar("Row")
Item = str | tuple[Any, ...]  # a text, or several, or a text and several others


class Streamed(Protocol):
    """What a stream needs of an engine."""

    def tokenize(self, items: Sequence[Any]) -> Tokens: ...
    def results(self, tokens: Tokens, progress: Callable[[int], None] | None = None) -> Any:
        """One for each item, in their order: an array, or a list."""


@dataclass(frozen=True, eq=False)
class Window(Generic[Row]):
    """Rows that came one after the other, and the result of each.

    Attributes:
        results: an array, or a list, as the engine gives them.
        empty: how many of them have no text.
    """

    rows: list[Row]
    tokens: Tokens
    results: Any
    empty: int


class Stream(Generic[Row]):
    """Iterate for windows, in the order of the rows.

    Memory is that of a few windows, whatever the number of rows. Inside a window the engine sorts by length and makes
    batches by its budget of tokens, so what a window comes to depends on its rows alone. An error of the rows or the
    tokenizer comes out of the iteration, after the windows before it; where that ends early, so does the thread.

    Args:
        engine: an `Embedder`, `Reranker`, `Classifier`, ...
        rows: items, or what `item` makes one of: a text, or a pair of texts.
        window: rows in a window, fewer where they have more than a million characters.
        skip: called with the rows of each window, in order, in the thread; those for which it is true are left out.
        progress: called with the number of rows and tokens that are done; in a window, rows are done as its tokens are.

    Attributes:
        waited: seconds in which the encoder had to wait for a window.

    Raises:
        InputError: if `window` is less than 1, or `rows` is one string.
    """

    def __init__(
        self,
        engine: Streamed,
        rows: Iterable[Row],
        item: Callable[[Row], Item] = lambda row: cast(Item, row),
        *,
        window: int = WINDOW,
        skip: Callable[[list[Row]], bool] = lambda rows: False,
        progress: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> None:
        if window < 1:
            raise InputError(f"window must be at least 1, but is {window}")
        if isinstance(rows, str):
            raise InputError("a stream takes many texts, but is given one string")
        self.waited = 0.0
        self._engine, self._rows, self._item = engine, rows, item
        self._done = 0, 0
        self._window, self._skip, self._progress = window, skip, progress

    def __iter__(self) -> Iterator[Window[Row]]:
        ready: queue.Queue[tuple[list[Row], Tokens] | BaseException | None] = queue.Queue(_AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=self._tokenize, args=(ready, stop), name="fastbert-tokenizer", daemon=True)
        thread.start()
        try:
            while True:
                start = time.perf_counter()
                got = ready.get()
                self.waited += time.perf_counter() - start
                if got is None:
                    return
                if isinstance(got, BaseException):
                    raise got
                rows, tokens = got
                results = self._engine.results(tokens, self._advance(len(rows), tokens))
                empty = sum(not _whole(self._item(row)).strip() for row in rows)
                yield Window(rows, tokens, results, empty)
                del got, rows, tokens, results  # not kept while the next one is waited for
        finally:
            stop.set()
            while not ready.empty():  # a thread that waits for room goes on, and sees that it should stop
                ready.get()
            thread.join(_SECONDS_TO_END)

    def _advance(self, rows: int, tokens: Tokens) -> Callable[[int], None]:
        """For the progress of a window."""
        rows_before, tokens_before = self._done
        self._done = rows_before + rows, tokens_before + len(tokens.ids)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            self._progress(rows_before + rows * done // max(len(tokens.ids), 1), tokens_before + done)

        return advance

    def _tokenize(self, ready: "queue.Queue[Any]", stop: threading.Event) -> None:
        end: BaseException | None = None
        try:
            for rows in self._windows():
                if stop.is_set():
                    return
                if not self._skip(rows):
                    ready.put((rows, self._engine.tokenize([self._item(row) for row in rows])))
        except BaseException as error:
            end = error
        ready.put(end)

    def _windows(self) -> Iterator[list[Row]]:
        """Cut by what is read alone, before it is tokenised: the same rows make the same windows."""
        rows: list[Row] = []
        size = 0
        for row in self._rows:
            item = self._item(row)
            rows.append(row)
            size += len(_whole(item))
            if len(rows) == self._window or size >= _LONGEST_WINDOW:
                yield rows
                rows, size = [], 0
        if rows:
            yield rows


def _whole(item: Any) -> str:
    """All its texts."""
    return item if isinstance(item, str) else "".join(map(_whole, item))
