"""fastbert plot: the curves of runs."""

from pathlib import Path
from typing import Annotated

import typer

from fastbert.errors import InputError
from fastbert.terminal import note


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS...", help="Folders of `fastbert pretrain`, or of `fastbert finetune`.")
    ],
    *,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture.", show_default="curves.png in the first run")
    ] = None,
) -> None:
    """Curves of runs, as a PNG, or as an SVG where --output ends in .svg.

    Of pretraining: losses, accuracies, learning rate and speed. Of fine-tuning: loss and dev figures of every training;
    of a single run what its best model takes for what, or its predictions of numbers over what is true.
    """
    from fastbert.training import plot, plot_finetuning

    tuned = {plot_finetuning.is_finetuning(run) for run in runs}
    if len(tuned) == 2:
        raise InputError("some of these are runs of pretraining and some of fine-tuning: plot each kind for itself")
    target = output if output is not None else runs[0] / "curves.png"
    (plot_finetuning if tuned.pop() else plot).plot(runs, target)
    note(f"{target}")
