"""Curves of pretraining runs, as a picture. Those of fine-tuning runs: plot_finetuning.py."""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fastbert.data.store import read_json
from fastbert.errors import InputError, require
from fastbert.training.files import LOG, RUN
from fastbert.training.style import BLUE, BROWN, GREEN, GREY, INK, ORANGE, PAPER, PINK, SLATE, STYLE, VIOLET, save

_LETTERS = 120  # that a line of the legend has room for
COLOURS = (BLUE, ORANGE, GREEN, VIOLET, PINK, BROWN, SLATE)
_SMOOTHED = 20  # points that a phase is worth once it is smoothed
_Runs = TypeVar("_Runs")
_NAMED = 0.15  # of an axis: a phase that is shorter has no room for its name, unless it is the last


def count(x: float, _: Any) -> str:
    return f"{x:,.0f}"


def percent(x: float, _: Any) -> str:
    return f"{100 * x:.3g}%"


def small(x: float, _: Any) -> str:
    return f"{x:.3g}" if x == 0 else f"{x:.1e}".replace(".0e", "e").replace("e-0", "e-")


@dataclass(frozen=True)
class _Panel:
    """
    Attributes:
        key, held_out: in a log's records, of the batches that are learnt from, and of texts that are not.
        landmark: where a curve has to get past.  form: of the ticks.  from_zero: where what is small is good as it is.
        smooth: whether it is noisy.
    """

    title: str
    key: str
    held_out: str = ""
    landmark: str = ""
    form: Callable[[float, Any], str] | None = None
    from_zero: bool = False
    smooth: bool = True


_PANELS = (
    _Panel("masked-LM loss, nats", "mlm_loss", "eval_mlm_loss", "unigram\nentropy"),
    _Panel("masked-LM accuracy", "mlm_accuracy", "eval_mlm_accuracy", form=percent),
    _Panel("next-sentence loss, nats", "nsp_loss", "eval_nsp_loss", "a coin"),
    _Panel("next-sentence accuracy", "nsp_accuracy", "eval_nsp_accuracy", "chance", percent),
    _Panel("learning rate", "learning_rate", form=small, from_zero=True, smooth=False),
    _Panel("gradient norm", "grad_norm", from_zero=True),
    _Panel("real tokens a second", "tokens_per_second", form=count, from_zero=True),
    _Panel("share of time waiting for data", "data_wait", form=percent, from_zero=True),
)


@dataclass(frozen=True)
class _Run:
    """
    Attributes:
        log: rising in steps.  phases: (first step, max_length).
    """

    name: str
    colour: str
    log: list[dict[str, Any]]
    phases: tuple[tuple[int, int], ...]
    entropy: float | None

    def points(self, key: str) -> tuple[list[int], list[float]]:
        found = [(record["step"], record[key]) for record in self.log if record.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]


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
    except OSError as error:
        what = "there is no such file or folder" if not path.exists() else error.strerror or error
        raise InputError(f"{path} is no log of a run: {what}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no log of a run: {error}") from error
    if not records:
        raise InputError(f"{path} is empty: the run has not logged yet")
    return [records[step] for step in sorted(records)]


def plot(runs: Sequence[Path], target: Path) -> None:
    """Draw every curve that the runs have, a panel for each, in the format that the target's name ends in.

    Raises:
        InputError: if a run has no log, the picture cannot be written, or matplotlib is missing.
    """
    require("matplotlib", to="draw curves")
    write(draw, [_read(*it) for it in zip(runs, names(runs), cycle(COLOURS), strict=False)], target)


def write(draw: Callable[[_Runs], Any], runs: _Runs, target: Path) -> None:
    """Draw in the house's style, into a file.

    Raises:
        InputError: if the picture cannot be written.
    """
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = draw(runs)
        try:
            save(figure, target)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {target}: {error}") from error


def folder_of(run: Path) -> Path:
    """Of a run that is given by its log, too."""
    return run.resolve() if run.is_dir() else run.resolve().parent


def names(runs: Sequence[Path]) -> list[str]:
    """As short as tells them apart."""
    folders = [folder_of(run) for run in runs]
    if len({*folders}) == 1:
        return [folder.name for folder in folders]
    common = os.path.commonpath(folders)
    return [str(folder.relative_to(common)) for folder in folders]


def _read(run: Path, name: str, colour: str) -> _Run:
    log = read_log(run)
    about = read_json(folder_of(run) / RUN) or {}
    fixed, entropy = about.get("fixed", {}), about.get("entropy")
    phases = fixed.get("phases") or []
    starts = accumulate((share for _, share in phases[:-1]), initial=0.0)
    steps = [round(start * fixed.get("steps", 0)) for start in starts]
    named = tuple((step, length) for step, (length, _) in zip(steps, phases, strict=False))
    return _Run(name, colour, log, named, entropy if isinstance(entropy, float) else None)


def draw(runs: Sequence[_Run]) -> Any:
    """The figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = [it for it in _PANELS if any(run.points(key)[0] for run in runs for key in (it.key, it.held_out))]
    rows = math.ceil(len(panels) / 2)
    figure = Figure((11, 2.5 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True)
    smoothed = held_out = False
    for axis, panel in zip(axes.flat, panels, strict=False):
        for run in runs:
            steps, values = run.points(panel.key)
            begun = [step for step, _ in run.phases[1:]]
            smooth = list(smoothed_of(steps, values, begun)) if panel.smooth else []
            smoothed |= bool(smooth)
            alone = "o" if len(steps) == 1 else None
            axis.plot(steps, values, color=run.colour, marker=alone, **look(raw=bool(smooth)))
            for part in smooth:
                axis.plot(*part, color=run.colour, **look())
            steps, values = run.points(panel.held_out)
            held_out |= bool(steps)
            axis.plot(steps, values, color=run.colour, **look(held_out=True))
        _finish(axis, panel, runs)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    for axis in list(axes.flat)[max(0, len(panels) - 2) : len(panels)]:
        axis.set_xlabel("optimiser step")
        axis.tick_params(labelbottom=True)
    entries = [(run.name, run.colour, look()) for run in runs] if len(runs) > 1 else []
    entries += [("smoothed", INK, look()), ("as logged", INK, look(raw=True))] if smoothed else []
    entries += [("held out", INK, look(held_out=True))] if held_out else []
    handles = [Line2D([], [], label=name, color=colour, **look) for name, colour, look in entries]
    title = runs[0].name if len(runs) == 1 else ""
    columns = max(1, _LETTERS // (8 + max((len(name) for name, *_ in entries), default=0)))
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": min(6, columns), "alignment": "left"}
    figure.legend(handles=handles, title=title, title_fontproperties={"weight": "bold", "size": 12}, **place)
    return figure


def smoothed_of(
    steps: Sequence[int], values: Sequence[float], begun: Sequence[int] = (), worth: int = _SMOOTHED
) -> Iterator[tuple[list[int], Any]]:
    """Means around each point, in each phase for itself; nothing where there are too few points for that.

    Args:
        begun: the last steps before other phases.
        worth: points that all are worth once they are smoothed.
    """
    window = len(steps) // worth
    if window < 2:
        return
    for first, last in pairwise([0, *begun, math.inf]):
        inside = [i for i, step in enumerate(steps) if first < step <= last]
        if len(inside) > window:
            ones, part = np.ones(window + 1 - window % 2), np.array([values[i] for i in inside])
            counts = np.convolve(np.ones_like(part), ones, "same")
            yield [steps[i] for i in inside], np.convolve(part, ones, "same") / counts


def look(raw: bool = False, held_out: bool = False) -> dict[str, Any]:
    if held_out:
        return {"linewidth": 0.8, "linestyle": "--", "marker": "o", "markersize": 4, "markerfacecolor": PAPER}
    return {"linewidth": 0.8, "alpha": 0.35} if raw else {"linewidth": 1.6}


def _finish(axis: Any, panel: _Panel, runs: Sequence[_Run]) -> None:
    alike = len({run.phases for run in runs}) == 1
    changes = any(len(run.phases) > 1 for run in runs)
    last = max(record["step"] for run in runs for record in run.log)
    axis.set_title(panel.title, pad=16 if alike and changes else 6)
    dress(axis, last)
    if panel.form is not None:
        axis.yaxis.set_major_formatter(panel.form)
    if panel.from_zero or (panel.form is percent and axis.get_ylim()[0] < 0):  # no share is below 0
        axis.set_ylim(bottom=-0.02 * axis.get_ylim()[1])
    level = _level(panel.landmark, runs)
    if level is not None:
        axis.axhline(level, color=GREY, linestyle="--", linewidth=1, zorder=1)
        _right_of(axis, level, f"{panel.landmark} {level:.2f}")
    for run in runs[:1] if alike else runs:
        begun = [(step, length) for step, length in run.phases if step < last] if changes else []
        ends = [step for step, _ in begun[1:]]
        for (step, length), end in zip(begun, [*ends, math.inf], strict=False):
            if step:
                axis.axvline(step, color=GREY if alike else run.colour, linestyle=":", linewidth=1.2, zorder=1)
            if alike and end - step >= _NAMED * last:
                _above(axis, step, f"{length} tokens")


def dress(axis: Any, last: int) -> None:
    """An axis of steps up to the last one."""
    axis.grid()
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.xaxis.set_major_formatter(count)
    axis.margins(y=0.08)
    axis.set_xlim(0, 1.01 * max(last, 1))
    axis.locator_params(axis="x", nbins=6)


def _right_of(axis: Any, y: float, text: str) -> None:
    """Where no curve comes."""
    place = {"xy": (1, y), "xycoords": axis.get_yaxis_transform(), "annotation_clip": False}
    axis.annotate(text, xytext=(5, 0), textcoords="offset points", va="center", color=GREY, fontsize=8.5, **place)


def _above(axis: Any, x: float, text: str) -> None:
    place = {"xy": (x, 1), "xycoords": axis.get_xaxis_transform(), "annotation_clip": False}
    axis.annotate(text, xytext=(0, 3), textcoords="offset points", ha="left", color=GREY, fontsize=8.5, **place)


def _level(landmark: str, runs: Sequence[_Run]) -> float | None:
    if landmark == "chance":
        return 0.5
    if landmark == "a coin":
        return math.log(2)
    if landmark.startswith("unigram"):
        entropies = {run.entropy for run in runs}
        return entropies.pop() if len(entropies) == 1 else None
    return None
