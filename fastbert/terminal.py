"""What the commands print on stderr: notes and progress bars."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console


def note(message: str) -> None:
    print(f"fastbert: {message}", file=sys.stderr)


def counted(number: int, noun: str) -> str:
    """1 text, 2,000 texts."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


@contextlib.contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """A function that advances a bar on stderr, which shows up after a second, and only on a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(what, total=total, rate="")
    start, done, shown = time.perf_counter(), 0, False

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        seconds = time.perf_counter() - start
        if not shown and seconds > 1:
            bar.start()
            shown = True
        bar.update(task, completed=done, rate=f"{done / seconds:,.0f} {unit}/s" if seconds > 0 else "")

    try:
        yield advance
    finally:
        bar.stop()
