"""Pictures of fine-tuning runs: how trainings went, and what the best model takes for what.

Dimension key:  C classes
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.data.store import read_json
from fastbert.errors import InputError, require
from fastbert.training import files
from fastbert.training.plot import COLOURS, dress, folder_of, look, names, read_log, small, smoothed_of, write
from fastbert.training.style import BLUE, GREY, INK, PAPER

KIND = "finetuning"
_RUNS, _RESULTS, _PREDICTIONS = "runs", "results.json", "dev-predictions.jsonl"
_NO_FIGURES = ("step", "time", "epoch")
_WORTH = 8  # points that a training's loss is worth once it is smoothed: trainings are short
_PANELS = 6  # of curves, with the loss and the learning rate
_COLUMNS = 3
_NAMED = 20  # classes that have their names and counts in the matrix
_LISTED = 15  # mistakes, or classes, in a list
_LETTERS, _LETTER = 22, 0.075  # of a class's name, and the inches that one takes
_SMALLEST_CELL, _LARGEST_CELL, _MATRIX = 0.4, 0.95, 4.2  # inches
_SHARES = 8  # classes that have shares in the matrix, too
_WIDTH = 11.0


@dataclass(frozen=True)
class _Training:
    """
    Attributes:
        log: rising in steps.
    """

    name: str
    learning_rate: float
    seed: int
    log: list[dict[str, Any]]

    def points(self, key: str) -> tuple[list[int], list[float]]:
        found = [(record["step"], record[key]) for record in self.log if record.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]


@dataclass(frozen=True)
class _Run:
    """
    Attributes:
        main: the figure that models are chosen by.
        best: the name of the training whose model is kept; None while there is none.
        split: what is written of the best model, and its name.
        numbers: (2, n), true ones and predicted ones, of a regression.
    """

    name: str
    main: str
    trainings: list[_Training]
    best: str | None = None
    split: dict[str, Any] = field(default_factory=dict)
    split_name: str = "dev"
    numbers: npt.NDArray[np.float64] | None = None


def is_finetuning(run: Path) -> bool:
    """Whether a folder is such a run's."""
    return (read_json(folder_of(run) / files.RUN) or {}).get("kind") == KIND


def plot(runs: Sequence[Path], target: Path) -> None:
    """Draw the trainings of runs; of a single run what its best model takes for what, too.

    Raises:
        InputError: if a run has no log, the picture cannot be written, or matplotlib is missing.
    """
    require("matplotlib", to="draw curves")
    write(draw, [_read(folder_of(run), name) for run, name in zip(runs, names(runs), strict=True)], target)


def _read(run: Path, name: str) -> _Run:
    about = read_json(run / files.RUN) or {}
    trainings = [
        _Training(folder.name, float(match[1]), int(match[2]), read_log(folder))
        for folder in (run / _RUNS).glob("*")
        if (match := re.fullmatch(r"lr-(.+)-seed-(\d+)", folder.name)) and (folder / files.LOG).is_file()
    ]
    if not trainings:
        raise InputError(f"{run} has no training's log: the run has not logged yet")
    trainings.sort(key=lambda it: (-it.learning_rate, it.seed))
    results = read_json(run / _RESULTS)
    if results is None:
        return _Run(name, about["main"], trainings)
    split_name, split = next(iter(results["splits"].items()))
    numbers = None if split["per_class"] else _numbers(run / _PREDICTIONS)
    return _Run(name, about["main"], trainings, results["training"], split, split_name, numbers)


def _numbers(path: Path) -> npt.NDArray[np.float64] | None:
    """(2, n): what is true and what was predicted, where these are numbers."""
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = np.array([(record["true"], record["score"]) for record in found], np.float64)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values.T if len(values) else None


def draw(runs: Sequence[_Run]) -> Any:
    """The figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    keys = _keys(runs)
    heights = [2.3 * math.ceil(len(keys) / _COLUMNS) + 0.6]
    below = _below(runs[0]) if len(runs) == 1 else 0.0
    figure = Figure((_WIDTH, heights[0] + below), layout="constrained")
    FigureCanvasAgg(figure)
    if not below:
        _curves(figure, runs, keys)
        return figure
    parts: Any = figure.subfigures(2, 1, height_ratios=[heights[0], below])
    above, rest = parts
    _curves(above, runs, keys)
    run = runs[0]
    if run.split.get("confusion"):
        _confusion(rest, run)
    elif run.numbers is not None:
        _scatter(rest, run)
    else:
        _by_class(rest.subplots(), run)
    return figure


def _below(run: _Run) -> float:
    """How many inches the best model's picture takes; 0 for none."""
    classes = len(run.split.get("classes") or ())
    if run.split.get("confusion"):
        if classes > _NAMED:
            return 5.4
        return classes * _cell(classes) + 0.9 + _across(run.split["classes"])
    if run.numbers is not None:
        return 4.2
    return 0.9 + 0.3 * min(len(run.split.get("per_class") or ()), _NAMED) if run.split.get("per_class") else 0.0


# Curves.


def _keys(runs: Sequence[_Run]) -> list[str]:
    """Of a log: the loss, dev's figures, the main one first, but none that equals another, and the learning rate."""
    main = f"eval_{runs[0].main}"
    logged = dict.fromkeys(key for run in runs for it in run.trainings for record in it.log for key in record)
    evaluated = [key for key in logged if key.startswith("eval_") and key.removeprefix("eval_") not in _NO_FIGURES]
    evaluated.sort(key=lambda key: (key != main, key != "eval_loss"))
    kept: dict[str, str] = {}
    for key in evaluated:
        kept.setdefault(repr([it.points(key) for run in runs for it in run.trainings]), key)
    dev = list(kept.values())[: _PANELS - 2]
    return [key for key in ("loss", *dev, "learning_rate") if key in logged]


@dataclass(frozen=True)
class _Line:
    run: _Run
    training: _Training
    colour: str

    @property
    def best(self) -> bool:
        return self.training.name == self.run.best


def _lines(runs: Sequence[_Run]) -> tuple[list[_Line], list[tuple[str, str]]]:
    """Every training with its colour, and what the colours mean: runs, learning rates, or seeds."""

    def meant(run: _Run, training: _Training) -> str:
        if len(runs) > 1:
            return run.name
        if len({it.learning_rate for it in run.trainings}) > 1:
            return f"learning rate {training.learning_rate:g}"
        return f"seed {training.seed}" if len(run.trainings) > 1 else ""

    every = [(run, training) for run in runs for training in run.trainings]
    groups = dict.fromkeys(meant(*it) for it in every)
    colours = dict(zip(groups, cycle(COLOURS), strict=False))
    entries = [(name, colour) for name, colour in colours.items() if name]
    return [_Line(run, training, colours[meant(run, training)]) for run, training in every], entries


def _curves(figure: Any, runs: Sequence[_Run], keys: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    rows = math.ceil(len(keys) / _COLUMNS)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False)
    lines, entries = _lines(runs)
    last = max(record["step"] for line in lines for record in line.training.log)
    smoothed = False
    for axis, key in zip(axes.flat, keys, strict=False):
        for line in sorted(lines, key=lambda line: line.best):  # above the others
            smoothed |= _curve(axis, line, key, len(lines))
        axis.set_title(_title(key))
        dress(axis, last)
        axis.set_xlim(0, 1.03 * last)
        axis.locator_params(axis="x", nbins=5)
        if key == "learning_rate":
            axis.yaxis.set_major_formatter(small)
        if key.startswith("eval_") and key != "eval_loss":
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}")  # as figures are written elsewhere
        if key in ("learning_rate", "loss"):
            axis.set_ylim(bottom=min(0.0, -0.02 * axis.get_ylim()[1]))
    for i, axis in enumerate(axes.flat):
        if i >= len(keys):
            axis.remove()
        elif i + _COLUMNS >= len(keys):
            axis.set_xlabel("optimiser step")
    handles = [Line2D([], [], label=name, color=colour, **look()) for name, colour in entries]
    if smoothed:
        handles.append(Line2D([], [], label="smoothed", color=INK, **look()))
    if smoothed and len(lines) == 1:
        handles.append(Line2D([], [], label="as logged", color=INK, **look(raw=True)))
    if any(key.startswith("eval_") for key in keys):
        handles.append(Line2D([], [], label="dev", color=INK, **look(held_out=True)))
    if len(lines) > 1 and any(line.best for line in lines):
        handles.append(Line2D([], [], label="the best", color=INK, linewidth=2.6))
    place: dict[str, Any] = {"loc": "outside upper left", "ncols": 6 if len(runs) == 1 else 3, "alignment": "left"}
    bold = {"weight": "bold", "size": 11}
    figure.legend(handles=handles, title=_heading(runs), title_fontproperties=bold, **place)


def _curve(axis: Any, line: _Line, key: str, many: int) -> bool:
    """Whether it was smoothed."""
    steps, values = line.training.points(key)
    width = {} if many == 1 else {"linewidth": 2.6 if line.best else 1.0}
    if key.startswith("eval_"):
        axis.plot(steps, values, color=line.colour, **{**look(held_out=True), **width})
        return False
    smooth = list(smoothed_of(steps, values, worth=_WORTH)) if key == "loss" else []
    if not smooth or many == 1:
        alone = "o" if len(steps) == 1 else None
        axis.plot(steps, values, color=line.colour, marker=alone, **{**look(raw=bool(smooth)), **width})
    for part in smooth:
        axis.plot(*part, color=line.colour, **{**look(), **width})
    return bool(smooth)


def _title(key: str) -> str:
    if not key.startswith("eval_"):
        return "training loss" if key == "loss" else key.replace("_", " ")
    return f"dev {_worded(key.removeprefix('eval_'))}"


def _worded(name: str) -> str:
    return name.replace("_", " ").replace("f1", "F1").replace("roc auc", "ROC AUC")


def _heading(runs: Sequence[_Run]) -> str:
    if len(runs) > 1:
        return ""
    run = runs[0]
    if run.best is None:
        return run.name
    value = run.split["metrics"].get(run.main)
    said = "" if value is None else f", {_worded(run.main)} {100 * value:.2f}"
    best = next((it for it in run.trainings if it.name == run.best), None)
    if best is None or len(run.trainings) == 1:
        return f"{run.name}{said}"
    return f"{run.name}: best of {len(run.trainings)}, learning rate {best.learning_rate:g}, seed {best.seed}{said}"


# What the best model takes for what.


def _cell(classes: int) -> float:
    return min(_LARGEST_CELL, max(_SMALLEST_CELL, _MATRIX / classes))


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1].rstrip()}…"


def _upright(classes: Sequence[str]) -> bool:
    """Whether names stand upright below the matrix: side by side they would not fit."""
    return max(len(_short(name)) for name in classes) * _LETTER > _cell(len(classes))


def _across(classes: Sequence[str]) -> float:
    return max(len(_short(name)) for name in classes) * _LETTER if _upright(classes) else 0.2


def _confusion(figure: Any, run: _Run) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    counts_CC = np.array(run.split["confusion"])
    classes = [_short(name) for name in run.split["classes"]]
    C = len(classes)
    shares_CC = counts_CC / np.maximum(counts_CC.sum(1, keepdims=True), 1)
    if C <= _NAMED:
        width = C * _cell(C)
        around = max(map(len, classes)) * _LETTER + 0.9
        axis, beside = figure.subplots(1, 2, width_ratios=[width, _WIDTH - width - around], sharey=True)
    else:
        axis, beside = figure.subplots(1, 2, width_ratios=[4.4, _WIDTH - 4.4])
        axis.set(aspect="equal", anchor="NW")
    cmap = LinearSegmentedColormap.from_list("share", [PAPER, BLUE])
    axis.pcolormesh(shares_CC, cmap=cmap, vmin=0, vmax=1, edgecolors=PAPER, linewidth=1 if C <= _NAMED else 0)
    axis.set(xlim=(0, C), ylim=(C, 0), xlabel="predicted", ylabel="true")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_title(f"{run.split_name}: {counts_CC.sum():,} examples")
    if C > _NAMED:
        axis.spines[:].set_visible(True)
        axis.locator_params(integer=True)
        _mistakes(beside, counts_CC, classes)
        return
    middles = np.arange(C) + 0.5
    upright: dict[str, Any] = {"rotation": 90} if _upright(run.split["classes"]) else {}
    axis.set_xticks(middles, classes, **upright)
    axis.set_yticks(middles, classes)
    for i in range(C):
        for j in range(C):
            ink = PAPER if shares_CC[i, j] > 0.55 else INK if counts_CC[i, j] else GREY
            said = f"{counts_CC[i, j]:,}" + (f"\n{100 * shares_CC[i, j]:.0f} %" if C <= _SHARES else "")
            size = 9 if C <= _SHARES else 7
            axis.text(j + 0.5, i + 0.5, said, ha="center", va="center", color=ink, fontsize=size)
    _by_class(beside, run, named=False)


def _bars(axis: Any, labels: Sequence[str], values: Sequence[float], said: Sequence[str], most: float) -> None:
    """Args: labels: none where the axis shares those of another."""
    places = np.arange(len(values)) + 0.5
    axis.barh(places, values, height=min(0.62, 0.3 / _cell(len(values))), color=BLUE)
    for place, value, words in zip(places, values, said, strict=True):
        axis.text(value + 0.01 * most, place, words, va="center", ha="left", color=INK, fontsize=8.5)
    if labels:
        axis.set_yticks(places, labels)
    axis.tick_params(labelleft=bool(labels))
    axis.set(ylim=(len(values), 0), xlim=(0, 1.18 * most), xticks=[])
    axis.tick_params(length=0)
    axis.spines[["bottom"]].set_visible(False)


def _by_class(axis: Any, run: _Run, named: bool = True) -> None:
    """F1 of each, of the most frequent ones where there are many."""
    found = run.split["per_class"]
    rows = range(len(found))
    shown = sorted(sorted(rows, key=lambda i: -found[i].get("count", 0))[:_NAMED])
    values = [found[i]["f1"] for i in shown]
    said = [f"{100 * value:.1f}" + (f" (n = {found[i]['count']:,})" if "count" in found[i] else "")
            for i, value in zip(shown, values, strict=True)]  # fmt: skip
    _bars(axis, [_short(str(found[i]["class"])) for i in shown] if named else [], values, said, 1.0)
    axis.set_title("F1 of each" if len(shown) == len(rows) else f"F1 of the {len(shown)} most frequent")


def _mistakes(axis: Any, counts_CC: npt.NDArray[np.int64], classes: Sequence[str]) -> None:
    wrong_CC = counts_CC * ~np.eye(len(classes), dtype=bool)
    order = [divmod(int(i), len(classes)) for i in np.argsort(-wrong_CC, axis=None, kind="stable")[:_LISTED]]
    order = [(i, j) for i, j in order if wrong_CC[i, j]]
    values = [int(wrong_CC[i, j]) for i, j in order]
    _bars(axis, [f"{classes[i]}, taken for {classes[j]}" for i, j in order], values, [f"{n:,}" for n in values],
          max(values, default=1))  # fmt: skip
    axis.set_title("the most frequent mistakes")


def _scatter(figure: Any, run: _Run) -> None:
    assert run.numbers is not None
    true, predicted = run.numbers
    axis, beside = figure.subplots(1, 2)
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axis.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, zorder=1)
    axis.plot(true, predicted, "o", color=BLUE, markersize=3.5, alpha=max(0.2, min(0.8, 100 / len(true))),
              markeredgewidth=0)  # fmt: skip
    axis.set_title(f"{run.split_name}: {len(true):,} examples")
    axis.set(xlabel="true", ylabel="predicted")
    beside.hist(predicted - true, bins="auto", color=BLUE, edgecolor=PAPER, linewidth=0.8)
    beside.axvline(0, color=GREY, linestyle="--", linewidth=1)
    beside.set_title("predicted minus true")
    beside.set(xlabel="difference", ylabel="examples")
    for each in (axis, beside):
        each.grid()
        each.tick_params(length=0)
        each.spines[["left", "bottom"]].set_visible(False)
