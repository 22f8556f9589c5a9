"""Ctrl-C in a command that can be gone on with."""

import contextlib
import os
from collections.abc import Callable, Iterator

import typer

from fastbert.terminal import note


@contextlib.contextmanager
def saying_what_is_kept(kept: Callable[[], str]) -> Iterator[None]:
    """At Ctrl-C, say it, of several processes once, and end with exit status 130."""
    try:
        yield
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            note(f"stopped{kept()}")
        raise typer.Exit(130) from None
