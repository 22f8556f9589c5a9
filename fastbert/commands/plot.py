"""fastbert plot: the curves of runs."""

from pathlib import Path
from typing import Annotated

import typer

from fastbert.terminal import note


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUNS...", help="Folders of `fastbert pretrain`.")],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture.", show_default="curves.png in the first run")
    ] = None,
) -> None:
    """Losses, accuracies, learning rate and speed of runs, as a PNG, or as an SVG where --output ends in .svg."""
    from fastbert.training.plot import plot as draw

    target = output if output is not None else runs[0] / "curves.png"
    draw(runs, target)
    note(f"{target}")
