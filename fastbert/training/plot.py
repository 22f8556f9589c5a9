"""Curves of pretraining runs, as a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastbert.data.store import read_json
from fastbert.errors import InputError, require
from fastbert.training.checkpoints import LOG, RUN

_PANELS = (
    ("masked-LM loss, nats", "mlm_loss", "unigram entropy"),
    ("masked-LM accuracy", "mlm_accuracy", None),
    ("next-sentence loss, nats", "nsp_loss", "a coin"),
    ("next-sentence accuracy", "nsp_accuracy", "chance"),
    ("learning rate", "learning_rate", None),
    ("gradient norm", "grad_norm", None),
    ("real tokens a second", "tokens_per_second", None),
    ("share of time waiting for data", "data_wait", None),
)


def read_log(run: Path) -> list[dict[str, Any]]:
    """A run's log, a record each time it logged, rising in steps.

    Raises:
        InputError: if it has none.
    """
    path = run / LOG if run.is_dir() else run
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        records: dict[int, dict[str, Any]] = {}
        for record in map(json.loads, lines):  # a step may have several
            records[record["step"]] = {**records.get(record["step"], {}), **record}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no log of a run: {error}") from error
    if not records:
        raise InputError(f"{path} is empty: the run has not logged yet")
    return [records[step] for step in sorted(records)]


def plot(runs: Sequence[Path], target: Path) -> None:
    """Draw every curve that the runs have, a panel for each.

    Raises:
        InputError: if a run has no log, the picture cannot be written, or matplotlib is missing.
    """
    require("matplotlib", to="draw curves")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    curves = {run: read_log(run) for run in runs}
    panels = [panel for panel in _PANELS if any(panel[1] in record for log in curves.values() for record in log)]
    columns = 2
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(11, 2.7 * rows + 0.6), squeeze=False, layout="constrained")
    lines: list[Any] = []
    for axis, (title, key, landmark) in zip(axes.flat, panels, strict=False):
        drawn = [
            axis.plot(*zip(*points, strict=True), label=run.name or str(run), linewidth=1.4)[0]
            for run, log in curves.items()
            if (points := [(record["step"], record[key]) for record in log if record.get(key) is not None])
        ]
        lines = lines or drawn
        level = _level(landmark, list(curves))
        if level is not None:
            axis.axhline(level, color="0.35", linestyle="--", linewidth=1)
            axis.annotate(
                f"{landmark} {level:.2f}",
                (1, level),
                xycoords=("axes fraction", "data"),
                xytext=(-4, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color="0.25",
            )
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("optimiser step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.margins(y=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    if len(curves) > 1:
        figure.legend(handles=lines, loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    try:
        figure.savefig(target, dpi=140)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {target}: {error}") from error
    finally:
        plt.close(figure)


def _level(landmark: str | None, runs: Sequence[Path]) -> float | None:
    """Where a curve has to get past."""
    if landmark == "chance":
        return 0.5
    if landmark == "a coin":
        return math.log(2)
    if landmark == "unigram entropy":
        entropies = {(read_json(run / RUN) or {}).get("entropy") for run in runs}
        only = entropies.pop() if len(entropies) == 1 else None
        return only if isinstance(only, float) else None
    return None
