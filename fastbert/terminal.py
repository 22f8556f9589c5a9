"""What the commands print on stderr: notes and progress bars."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


def note(message: str) -> None:
    print(f"fastbert: {message}", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """1 text, 2,000 texts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on stderr, which shows up after a second, and only on a terminal."""
    from rich.progress import MofNCompleteColumn

    start, done = time.perf_counter(), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        seconds = time.perf_counter() - start
        update(done, f"{done / seconds:,.0f} {unit}/s" if seconds > 0 else "")

    with bar(what, total, MofNCompleteColumn()) as update:
        yield advance


@contextlib.contextmanager
def bar(what: str, total: float | None, *columns: "ProgressColumn") -> Iterator[Callable[[float, str], None]]:
    """A function that says how much of the total is done, and how fast; the bar is that of `progress`.

    Args:
        columns: between the bar and how fast it is.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rate = TextColumn("{task.fields[rate]}")
    every = (TextColumn("{task.description}"), BarColumn(), *columns, rate, TimeRemainingColumn())
    shown = Progress(*every, console=console, transient=True, disable=not console.is_terminal)
    task = shown.add_task(what, total=total, rate="")
    start = time.perf_counter()

    def update(done: float, rate: str) -> None:
        if not shown.live.is_started and time.perf_counter() - start > 1:
            shown.start()
        shown.update(task, completed=done, rate=rate)

    try:
        yield update
    finally:
        shown.stop()
