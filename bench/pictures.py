"""The pictures of a run: whole models, kernels under their ceiling, and where a step's time goes.

Each is drawn from a run and nothing else, and saved twice, for light and for dark pages.
"""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from bench.record import OURS, Roof, Row, Run
from bench.shown import (
    KERNELS,
    LENGTHS,
    MODELS,
    SDPA,
    STOCK,
    TASKS,
    Gain,
    describe,
    engines,
    fastest,
    fastest_compiled,
    how_many,
    kernels,
    library,
    losses,
    precisions,
    sides,
    telling,
    where,
)
from bench.table import duration
from fastbert.training.style import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PAPER,
    PINK,
    SLATE,
    STYLE,
    VIOLET,
    darkened,
    svg,
)

WIDTH = 620  # points, 827 pixels of a page: a README's column
DARK = "-dark"
PARTS = {
    "matrix products": BLUE,
    "attention": GREEN,
    "cross-entropy": ORANGE,
    "LayerNorm": VIOLET,
    "GELU": PINK,
    "dropout": BROWN,
    "all layers in one call": INK,
}
REST = "everything else"
LEAST = 0.03  # of a row: a part that is less in all of them is not drawn apart


def draw(run: Run, folder: Path) -> dict[str, str]:
    """Write a run's pictures, and remove others that a former report left.

    Returns:
        what each shows, by its name.
    """
    shown = {}
    with rc_context(STYLE):
        for name, figure in figures(run).items():
            folder.mkdir(parents=True, exist_ok=True)
            light = svg(figure)
            (folder / f"{name}.svg").write_text(light)
            (folder / f"{name}{DARK}.svg").write_text(darkened(light))
            shown[name] = figure.get_label()
    kept = {f"{name}{variant}.svg" for name in shown for variant in ("", DARK)}
    for path in [*folder.glob("*.svg"), *folder.glob("*.png")]:
        if path.name not in kept:
            path.unlink()
    return shown


def figures(run: Run) -> dict[str, Figure]:
    """The pictures that a run has data for; each one's label says what it shows."""
    return {name: figure for name, make in PICTURES.items() if (figure := make(run)) is not None}


def headline(run: Run) -> Figure | None:
    """How many times as fast as transformers whole models are."""
    rows = telling(run)
    if not rows:
        return None
    figure, ((ax,),) = _figure(run, 1.45 + 0.46 * len(rows), notes=[losses(rows)])
    slower, compiled = [], [fastest_compiled(row) for row in rows]
    for y, (row, other) in enumerate(zip(rows, compiled, strict=True)):
        gain = Gain.of(row, OURS, SDPA)
        slower.append(gain.slower)
        at = y - 0.14 if other else y
        ax.barh(at, gain.ratio, 0.36, color=_colour(gain))
        ax.plot((gain.low, gain.high), (at, at), color=INK, linewidth=1)
        _beside(ax, at, str(gain), weight="bold")
        if other:
            theirs = Gain.of(row, other, SDPA)
            ax.barh(y + 0.22, theirs.ratio, 0.2, color=PALE)
            _beside(ax, y + 0.24, str(theirs), color=GREY, fontsize=8)
        _name(ax, y, f"{MODELS[row.case['model']]}, {row.case['step']}", describe(row))
    ax.set_xlabel("tokens a second, relative to transformers with SDPA (the line at 1 x)")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g} x")
    ax.set_xlim(0, 1.03 * max(ax.dataLim.x1, 1))
    _finish([ax], len(rows))
    ax.axvline(1, color=INK, linewidth=1)
    handles: list[Artist] = [Patch(color=BLUE, label=OURS)] if not all(slower) else []
    if any(slower):
        handles.append(Patch(color=ORANGE, label=f"{OURS}, where it is slower"))
    if any(compiled):
        handles.append(Patch(color=PALE, label="transformers, torch.compile"))
    handles.append(Line2D([], [], color=INK, linewidth=1, label="spread, 20th to 80th percentile"))
    _head(figure, f"How many times as fast as transformers, on a {'GPU' if run.device == 'cuda' else 'CPU'}", handles)
    figure.set_label(f"How many times as fast as transformers with SDPA whole models are, on {run.name}")
    return figure


def ceiling(run: Run) -> Figure | None:
    """Every kernel's share of the measured ceiling, fastbert's and that of the fastest other."""
    roof = Roof(run)
    found = {key: passes for key, passes in kernels(run).items() if any(map(roof.seconds, passes.values()))}
    if not found:
        return None
    drawn = [row for passes in found.values() for row in passes.values()]
    notes = [f"* {Roof.EXCEEDED}"] if any(map(roof.exceeded, drawn)) else []
    if run.device == "cpu":
        notes.append("On a CPU all but attention is made of PyTorch's kernels: its gain is padding left out.")
    figure, ((left, right),) = _figure(run, 1.55 + 0.38 * len(found), notes=notes, columns=2, sharey=True, sharex=True)
    slower = []
    for y, passes in enumerate(found.values()):
        for pass_, row in passes.items():
            if roof.seconds(row) is None:
                continue
            ax = left if pass_ == "forward" else right
            other = fastest(row, (name for name in row.timings if not name.startswith(OURS)))
            gain = Gain.of(row, OURS, other) if other else Gain(1, 1, 1)
            slower.append(gain.slower)
            ax.barh(y - 0.19, roof.share(row, OURS), 0.34, color=_colour(gain))
            ours = " with its forward" if pass_ == "both" else ""
            _beside(ax, y - 0.19, roof.percent(row, OURS) + ours, weight="bold", fontsize=8)
            if other:
                ax.barh(y + 0.19, roof.share(row, other), 0.34, color=PALE)
                _beside(ax, y + 0.2, f"{roof.percent(row, other)} {other}", color=GREY, fontsize=8)
    for y, ((bench, size), passes) in enumerate(found.items()):
        size = LENGTHS.get(size, f"length {size}" if bench == "attention" else f"hidden {size}")
        dropout = ", dropout" if any(row.case.get("dropout") for row in passes.values()) else ""
        _name(left, y, KERNELS[bench], size + dropout)
    _finish([left, right], len(found))
    for ax, what in ((left, "forward"), (right, "backward")):
        ax.set(title=what, xlim=(0, 1))
        ax.set_xticks([0, 0.5, 1])
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    handles: list[Artist] = [Patch(color=BLUE, label=OURS)] if not all(slower) else []
    if any(slower):
        handles.append(Patch(color=ORANGE, label=f"{OURS}, where another is faster"))
    handles.append(Patch(color=PALE, label="the fastest other, by name"))
    dtype = drawn[0].case["dtype"]
    _head(figure, f"Share of the ceiling that a copy and plain products reach, {dtype}", handles)
    figure.set_label(f"Share of the measured ceiling that each kernel reaches, {dtype}, on {run.name}")
    return figure


def breakdown(run: Run) -> Figure | None:
    """Where the time of a step goes, for every provider."""
    cases: dict[str, list[Row]] = {}
    for row in run.find("breakdown"):
        title = f"{MODELS.get(row.case['model'], row.case['model'])}, {row.case['step']}, {describe(row)}"
        cases.setdefault(title, []).append(row)
    if not cases:
        return None
    rows = [row for of in cases.values() for row in of]
    apart = [part for part in PARTS if any(row.values.get(part, 0) > LEAST * sum(row.values.values()) for row in rows)]
    colours = {part: PARTS[part] for part in apart} | {REST: SLATE}
    height = 1.2 + sum(0.75 + 0.3 * len(of) for of in cases.values())
    figure, axes = _figure(run, height, rows=len(cases), height_ratios=[len(of) for of in cases.values()])
    for (ax,), (title, of) in zip(axes, cases.items(), strict=True):
        longest = max(sum(row.values.values()) for row in of)
        for y, row in enumerate(of):
            start, total = 0.0, sum(row.values.values())
            seconds = {part: row.values.get(part, 0.0) for part in apart}
            seconds[REST] = total - sum(seconds.values())
            for part, taken in seconds.items():
                ax.barh(y, taken, 0.72, start, facecolor=colours[part], edgecolor=PAPER, linewidth=0.8)
                if taken > 0.045 * longest:
                    share = f"{taken / total:.0%}"
                    ax.text(start + taken / 2, y, share, ha="center", va="center_baseline", color=PAPER, fontsize=8)
                start += taken
            _beside(ax, y, duration(total), weight="bold")
            _name(ax, y, row.case["provider"])
        ax.set(title=title, xlim=(0, longest))
        ax.xaxis.set_major_formatter(lambda s, _: duration(s) if s else "0")
        ax.locator_params(axis="x", nbins=6)
        _finish([ax], len(of))
    handles = [Patch(color=colour, label=part) for part, colour in colours.items()]
    _head(figure, "Where the time of a step goes", handles)
    figure.set_label(f"Where the time of a step goes, in fastbert and in transformers, on {run.name}")
    return figure


def inference(run: Run) -> Figure | None:
    """How many times as fast as sentence-transformers engines are from strings on, in each precision."""
    rows = engines(run)
    if not rows:
        return None
    panels = precisions(rows)
    figure, (axes,) = _figure(run, 1.55 + 0.42 * len(rows), columns=len(panels), sharey=True)
    slower = []
    for precision, ax in zip(panels, axes, strict=True):
        for y, row in enumerate(rows):
            ours, other = sides(row, precision)
            both = ours and other
            if ours:
                gain = Gain.of(row, ours, STOCK)
                slower.append(other is not None and Gain.of(row, ours, other).slower)
                ax.barh(y - 0.19 if both else y, gain.ratio, 0.34, color=ORANGE if slower[-1] else BLUE)
                _beside(ax, y - 0.19 if both else y, f"{gain.ratio:.2f} x", weight="bold", fontsize=8)
            if other:
                gain = Gain.of(row, other, STOCK)
                ax.barh(y + 0.19 if both else y, gain.ratio, 0.34, color=PALE)
                _beside(ax, y + 0.2 if both else y, f"{gain.ratio:.2f} x {library(other)}", color=GREY, fontsize=8)
    for y, row in enumerate(rows):
        _name(axes[0], y, TASKS[row.case["task"]], f"{MODELS[row.case['model']]}, {how_many(row)}")
    _finish(axes, len(rows))
    for precision, ax in zip(panels, axes, strict=True):
        ax.set(title=precision, xlim=(0, 1.03 * max(1, ax.dataLim.x1)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g} x")
        ax.locator_params(axis="x", nbins=3)
        ax.axvline(1, color=INK, linewidth=1)
    handles: list[Artist] = [Patch(color=BLUE, label=OURS)] if not all(slower) else []
    if any(slower):
        handles.append(Patch(color=ORANGE, label=f"{OURS}, where another is faster"))
    handles.append(Patch(color=PALE, label="the fastest other, by name"))
    _head(figure, f"From strings: how many times as fast as {STOCK}, {rows[0].case['dtype']}", handles)
    figure.set_label(f"How many times as fast as {STOCK} engines are from strings on, on {run.name}")
    return figure


PICTURES: dict[str, Callable[[Run], Figure | None]] = {
    make.__name__: make for make in (headline, inference, ceiling, breakdown)
}


def _figure(
    run: Run, height: float, *, notes: Sequence[str] = (), rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure that says at its foot what was measured, and its axes."""
    foot = [line for text in (*notes, where(run)) for line in textwrap.wrap(text, 145)]
    size = WIDTH, round(72 * height + 10 * len(foot))  # whole, so that the paper ends with the picture
    figure = Figure((size[0] / 72, size[1] / 72), layout="constrained")
    FigureCanvasAgg(figure)
    figure.supxlabel("\n".join(foot), x=0.012, ha="left", color=GREY, fontsize=8)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _head(figure: Figure, title: str, handles: Sequence[Artist], columns: int = 4) -> None:
    """Title and legend in one, so that neither covers the other."""
    options: dict[str, Any] = {"handlelength": 1.1, "columnspacing": 1.6, "alignment": "left"}
    legend = figure.legend(handles=handles, title=title, loc="outside upper left", ncols=columns, **options)
    legend.get_title().set(weight="bold", size=12)


def _colour(gain: Gain) -> str:
    return ORANGE if gain.slower else BLUE


def _name(ax: Axes, y: float, name: str, more: str = "") -> None:
    """Of a row, left of its axis; what more there is of it in a second line."""
    look: dict[str, Any] = {
        "textcoords": "offset points",
        "ha": "right",
        "va": "center_baseline",
        "annotation_clip": False,
    }
    place = {"xy": (0, y), "xycoords": ax.get_yaxis_transform()}
    ax.annotate(name, xytext=(-8, 5.5 if more else 0), **place, **look)
    if more:
        ax.annotate(more, xytext=(-8, -6), fontsize=8, color=GREY, **place, **look)


def _beside(ax: Axes, y: float, text: str, **font: Any) -> None:
    """A row's figure, right of its axis, where no bar and no line comes."""
    place = {"xy": (1, y), "xycoords": ax.get_yaxis_transform(), "annotation_clip": False}
    ax.annotate(text, xytext=(6, 0), textcoords="offset points", ha="left", va="center_baseline", **place, **font)


def _finish(axes: Sequence[Axes], rows: int) -> None:
    for ax in axes:
        ax.set(ylim=(rows - 0.45, -0.55))
        ax.tick_params(left=False, labelleft=False, length=0)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.grid(axis="x")
