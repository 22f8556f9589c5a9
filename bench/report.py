"""What people see of the results: the README's tables, and for every run in bench/results a page with pictures.

All of it is made from result files (`bench/record.py`) and from nothing else; the same files give the same bytes.
"""

import io
import math
import os
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import count, product
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, PercentFormatter
from matplotlib.transforms import Bbox
from PIL import Image

from bench.record import OURS, Roof, Row, Run, speedup
from bench.table import beside, duration, rate

ROOT = Path(__file__).parents[1]
SDPA = "transformers SDPA"
COMPILED = "transformers SDPA, compiled"
GRAPH = ", CUDA graph"
MODELS = {"MiniLM": "MiniLM-L6", "base": "BERT-base", "large": "BERT-large"}
LENGTHS = {"full": "no padding", "wikipedia": "Wikipedia lengths", "squad": "SQuAD lengths"}
REAL = {"inference": ("squad", "wikipedia", "full"), "training": ("wikipedia", "squad", "full")}
DTYPES = {"cuda": ("bfloat16", "float16", "autocast", "float32"), "cpu": ("float32", "bfloat16", "float16", "autocast")}

# Okabe and Ito's colours, which the colour-blind can tell apart; ACCENT is fastbert's alone.
ACCENT, BLUE, GREEN, SKY = "#d55e00", "#0072b2", "#009e73", "#56b4e9"
YELLOW, PINK, ORANGE, VIOLET = "#f0e442", "#cc79a7", "#e69f00", "#5d3a9b"
INK, GREY, PALE = "#1a1a1a", "#595959", "#b8b8b8"
KERNELS = {  # name, colour in the roofline
    "attention": ("attention", BLUE),
    "layer_norm": ("LayerNorm", ORANGE),
    "embedding": ("embedding", PINK),
    "ffn": ("linear + GELU", GREEN),
    "feed_forward": ("feed-forward", SKY),
    "cross_entropy": ("cross-entropy", VIOLET),
}
LINES = {  # colour, marker, line
    OURS: (ACCENT, "o", "-"),
    OURS + GRAPH: (ACCENT, "*", ":"),
    SDPA: (BLUE, "s", "-"),
    SDPA + GRAPH: (BLUE, "X", ":"),
    SDPA + ", cuDNN": (GREEN, "<", "-"),
    COMPILED: (SKY, "^", "-"),
    COMPILED + " dynamic": (SKY, "v", "--"),
    "transformers eager": (GREY, "D", "-"),
    "reference": (PALE, "P", "--"),
}
HOW_TO_READ = """In a cell: median; 20th to 80th percentile; how many times as fast fastbert is; memory at its peak.
Rates count useful work only: no padding, every byte once. 100 % of the ceiling is the least time that this work takes
at the speed of a plain copy and of plain matrix products, as measured in the same run; for a whole model that is its
MFU, by PyTorch's and fastbert's FLOP formulas, against the fastest product that was measured.
"""
PARTS = {  # colour, and the colour of a text on it
    "matrix products": (BLUE, "white"),
    "attention": (GREEN, "white"),
    "LayerNorm": (YELLOW, INK),
    "GELU": (ORANGE, INK),
    "embedding": (PINK, INK),
    "dropout": (SKY, INK),
    "cross-entropy": (INK, "white"),
    "optimizer": (VIOLET, "white"),
    "other": (PALE, INK),
    "gaps": ("white", INK),
}
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e2e2e2",
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 110,
}


def main(results: Sequence[Path] | None = None, readme: Path = ROOT / "README.md") -> int:
    """Write a page and pictures beside every result file, and the README's sections.

    Args:
        results: the files, by default all of bench/results; those that hold no run are skipped.

    Raises:
        ValueError: if the README lacks a marker.
    """
    runs: dict[Path, Run] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.json")) if results is None else results:
        try:
            runs[path] = Run.read(path)
        except ValueError as error:
            print(f"skipped: {error}")
    text = put(readme.read_text(), "headline", headline_section(runs, readme.parent))
    text = put(text, "memory", memory_section(runs, readme.parent))
    for path, run in runs.items():
        pictures = draw(run, path.with_suffix(""))
        path.with_suffix(".md").write_text(page(run, path.stem, pictures))
    readme.write_text(text)
    return 0


def put(text: str, section: str, content: str) -> str:
    """The text with what stands between the section's markers replaced.

    Raises:
        ValueError: if a marker is missing.
    """
    begin, end = f"<!-- report: {section} -->\n", "<!-- /report -->"
    before, found, rest = text.partition(begin)
    old, closed, after = rest.partition(end)
    if not found or not closed or "<!-- report:" in old:
        raise ValueError(f"the README has no section from {begin.strip()} to {end}")
    return f"{before}{begin}{content}{end}{after}"


def telling(run: Run) -> list[Row]:
    """At most eight whole models to show first, whether fastbert looks good in them or not.

    For each model and step the lengths of real text, and for each step a batch without padding: in the dtype that is
    usual on this device, the longest sequences, the largest batch.
    """
    rows = [row for row in run.find("model") if row.case["model"] in MODELS and {OURS, SDPA} <= row.timings.keys()]

    def rank(row: Row) -> tuple[int, ...]:
        case = row.case
        real, usual = REAL[case["step"]].index(case["lengths"]), DTYPES[run.device].index(case["dtype"])
        return real, usual, -case["S"], -row.work.tokens, -row.work.flops

    groups = [
        *([row for row in rows if (row.case["model"], row.case["step"]) == key] for key in product(MODELS, REAL)),
        *([row for row in rows if (row.case["lengths"], row.case["step"]) == ("full", step)] for step in REAL),
    ]
    chosen: list[Row] = []
    for group in groups:
        chosen += sorted((row for row in group if row not in chosen), key=rank)[:1]
    order = list(MODELS)
    return sorted(chosen, key=lambda row: (order.index(row.case["model"]), row.case["step"]))


def headline_section(runs: dict[Path, Run], base: Path) -> str:
    """A picture, a table and where they come from: the latest run of a GPU, or else of a CPU."""
    shown = {path: run for path, run in runs.items() if telling(run)}
    if not shown:
        return ""
    path = max(shown, key=lambda path: (shown[path].device == "cuda", shown[path].started))
    run, link = shown[path], _link(path, base)
    lines = []
    for row in telling(run):
        others = SDPA, fastest_compiled(row)
        rates = [rate(row, name).removesuffix("tokens/s").strip() if name else "" for name in (*others, OURS)]
        gains = [f"**{speedup(row, name):.2f} x**" if name else "" for name in others]
        lines.append([MODELS[row.case["model"]], f"{row.case['step']}, {describe(row)}", *rates, *gains])
    header = ["model", "what", "transformers SDPA", "compiled", "fastbert", "against SDPA", "against compiled"]
    picture = f"![How many times as fast as transformers, on {run.name}]({link}/headline.png)"
    return f"{picture}\n\n{_table(header, lines)}\nTokens a second, padding not counted. {origin(run, link)}\n"


def memory_section(runs: dict[Path, Run], base: Path) -> str:
    """The memory table of the latest run that has one."""
    shown = {path: run for path, run in runs.items() if run.find("memory")}
    if not shown:
        return ""
    path = max(shown, key=lambda path: shown[path].started)
    return f"{memory_table(shown[path].find('memory'))}\n{origin(shown[path], _link(path, base))}\n"


def origin(run: Run, link: str) -> str:
    """Where figures come from, and what to be careful about."""
    line = f"{_where(run)}: `{run.command}`."
    if run.tests and run.tests["status"] != 0:
        line += f" **Not all tests passed: {run.tests['summary']}.**"
    if not run.complete:
        cut = [it["stage"] for it in run.stages if it["ended"] == "the time was over"]
        line += f" **The run was cut short{': ' if cut else ''}{', '.join(cut)}.**"
    if failed := sum(OURS in row.failures for row in run.rows):
        line += f" **fastbert has no time in {failed} of {len(run.rows)} cases.**"
    return f"{line} [All tables and pictures]({link}.md), [every figure]({link}.json)."


def page(run: Run, stem: str, pictures: Sequence[str]) -> str:
    """All of a run as Markdown, with these pictures."""
    parts = [f"# {run.name}, {run.date}\n", origin(run, stem) + "\n"]
    if run.tests:
        parts.append("\n".join([f"Tests: {run.tests['summary']}\n", *(f"- `{test}`" for test in run.tests["failed"])]))
    parts += [f"![{name}]({stem}/{name}.png)\n" for name in pictures]
    facts = run.machine | run.versions | {"started": run.started}
    for when, clocks in run.clocks.items():
        facts |= {f"{name} {when}": value for name, value in (clocks or {}).items()}
    parts += ["## Machine\n", _table(["", ""], [[k, str(v)] for k, v in facts.items() if v is not None])]
    parts += ["## Figures\n", HOW_TO_READ]
    tables = {"memory": memory_table, "breakdown": breakdown_table}
    for bench in dict.fromkeys(row.bench for row in run.rows):
        rows = run.find(bench)
        body = tables[bench](rows) if bench in tables else timings_table(rows, Roof(run))
        more = "".join(f"- {line}\n" for line in beside(run, bench))
        parts += [f"### {bench}\n", body, more, failures_list(rows)]
    return "\n".join(part for part in parts if part)


def timings_table(rows: Sequence[Row], roof: Roof) -> str:
    """A line a case, a column a provider, fastbert's first; nothing where nothing was timed."""
    same, keys = _split_cases(rows)
    names = list(dict.fromkeys(name for row in rows for name in (*row.timings, *row.failures)))
    if not names:
        return ""
    names.sort(key=lambda name: (name != OURS, not name.startswith(OURS)))
    lines = []
    for row in rows:
        share = roof.share(row, names[0]) if names[0] in row.timings and row.bench != "roof" else None
        reached = rate(row, names[0]) if names[0] in row.timings else ""
        if reached and row.work.sequences:
            reached += f"<br>{row.work.sequences / row.timings[names[0]].median:.3g} sequences/s"
        cells = [_cell(row, name) for name in names]
        lines.append([*_values(row, keys), reached, "" if share is None else f"{share:.0%}", *cells])
    return same + _table([*keys, f"{names[0]} reaches", "of ceiling", *names], lines)


def memory_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        stock, fast = (row.values[name] for name in (SDPA, OURS))
        lines.append([*_values(row, list(row.case)), f"{stock:.0f}", f"{fast:.0f}", f"{fast / stock:.2f}"])
    return _table([*rows[0].case, f"{SDPA}, {rows[0].unit}", OURS, "ratio"], lines)


def breakdown_table(rows: Sequence[Row]) -> str:
    same, keys = _split_cases(rows)
    parts = list(dict.fromkeys(part for row in rows for part in row.values))
    lines = []
    for row in rows:
        total = sum(row.values.values())
        cells = (f"{duration(s)}, {s / total:.0%}" if (s := row.values.get(part)) else "" for part in parts)
        lines.append([*_values(row, keys), duration(total), *cells])
    return same + _table([*keys, "whole step", *parts], lines)


def failures_list(rows: Sequence[Row]) -> str:
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row.failures.items():
            cases.setdefault((name, why), []).append(row.label)
    lines = [
        f"- {name} has no time in {len(labels)} of {len(rows)} cases: `{why}` ({'; '.join(labels[:3])}"
        f"{'; ...' if len(labels) > 3 else ''})\n"
        for (name, why), labels in cases.items()
    ]
    return "".join(lines)


def describe(row: Row) -> str:
    """A model's batch."""
    case = row.case
    padded = f"{LENGTHS['full']}, S =" if case["lengths"] == "full" else f"{LENGTHS[case['lengths']]} to"
    return f"{padded} {case['S']}, batch {case['batch']}, {case['dtype']}"


def fastest(row: Row, names: Iterable[str]) -> str | None:
    return min(names, key=lambda name: row.timings[name].median, default=None)


def fastest_compiled(row: Row) -> str | None:
    """With static or with dynamic shapes."""
    return fastest(row, (name for name in row.timings if name.startswith(COMPILED)))


def _where(run: Run) -> str:
    versions = [f"{name} {run.versions[name]}" for name in ("torch", "triton", "transformers") if name in run.versions]
    return ", ".join([run.name, run.date, *versions, f"commit {run.commit}"])


def _link(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path.with_suffix(""), base)).as_posix()


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))


def _values(row: Row, keys: Sequence[str]) -> list[str]:
    return [str(row.case.get(key, "")) for key in keys]


def _split_cases(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What all cases have in common, as a sentence, and the names of the rest."""
    keys = list(dict.fromkeys(key for row in rows for key in row.case))
    rest = [key for key in keys if len({str(row.case.get(key)) for row in rows}) > 1]
    same = ", ".join(f"{key} {rows[0].case[key]}" for key in keys if key not in rest)
    return (f"All: {same}.\n\n" if same else ""), rest


def _cell(row: Row, name: str) -> str:
    if name not in row.timings:
        return "none, see below" if name in row.failures else ""
    timing = row.timings[name]
    lines = [f"**{duration(timing.median)}**", f"{duration(timing.low)} to {duration(timing.high)}"]
    ours = OURS + GRAPH if name.endswith(GRAPH) else OURS
    if not name.startswith(OURS) and ours in row.timings:
        lines.append(f"{timing.median / row.timings[ours].median:.2f} x")
    if timing.peak_bytes is not None:
        lines.append(f"{timing.peak_bytes / 1e6:.4g} MB")
    return "<br>".join(lines)


def draw(run: Run, folder: Path) -> list[str]:
    """Write a run's pictures, and remove those of a former run that this one has no data for."""
    with rc_context(STYLE):
        made = figures(run)
        for name, figure in made.items():
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(pixels := io.BytesIO())
            small = Image.open(pixels).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
            small.save(folder / f"{name}.png", optimize=True)
    for name in PICTURES.keys() - made.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    return list(made)


def figures(run: Run) -> dict[str, Figure]:
    """The pictures that a run has data for."""
    return {name: figure for name, make in PICTURES.items() if (figure := make(run)) is not None}


def headline(run: Run) -> Figure | None:
    """How many times as fast as transformers whole models are."""
    rows = telling(run)
    if not rows:
        return None
    figure, ((ax,),) = _figure(run, 7.6, 1.6 + 0.5 * len(rows))
    for y, row in enumerate(rows):
        compiled = fastest_compiled(row)
        for name, at, colour in ((OURS, -0.2 if compiled else 0.0, ACCENT), (compiled, 0.2, SKY)):
            if name:
                gain = row.timings[SDPA].median / row.timings[name].median
                _bar(ax, y + at, gain, colour, f"{gain:.2f} x", weight="bold" if name == OURS else "normal")
    labels = [f"{MODELS[row.case['model']]}, {row.case['step']}\n{describe(row)}" for row in rows]
    _finish_bars([ax], labels, room=1.15)
    ax.set_xlabel("tokens a second, relative to transformers SDPA (the line)")
    handles = [Patch(color=ACCENT, label=OURS), Patch(color=SKY, label=f"{SDPA}, torch.compile")]
    title = "How many times as fast as transformers (SDPA)\n" + textwrap.fill(f"on {run.name}, {run.date}", 72)
    _legend(figure, title, handles[: 1 + any(map(fastest_compiled, rows))])
    return figure


def tokens(run: Run) -> Figure | None:
    """Tokens a second of whole models without padding, against length and against batch."""
    rows = _usual([row for row in run.find("model", lengths="full") if row.timings], run)
    rows.sort(key=lambda row: row.case["batch"])
    panels: dict[tuple[str, tuple[str, int]], dict[int, Row]] = {}  # an S of 0: all, each with its largest batch
    for model, step in product(MODELS, REAL):
        of = [row for row in rows if (row.case["model"], row.case["step"]) == (model, step)]
        panels[model, (step, 0)] = {row.case["S"]: row for row in of}
        for S in {row.case["S"] for row in of}:
            panels[model, (step, S)] = {row.case["batch"]: row for row in of if row.case["S"] == S}
    panels = {(model, kind): of for (model, kind), of in panels.items() if len(of) > (2 if kind[1] else 1)}
    if not panels:
        return None
    models = [model for model in MODELS if any(key[0] == model for key in panels)]
    kinds = sorted({kind for _, kind in panels}, key=lambda kind: (kind[1], kind[0]))
    size = 1.6 + 3 * max(2, len(kinds)), 1.6 + 2.3 * len(models)
    figure, axes = _figure(run, *size, rows=len(models), columns=len(kinds))
    for (i, model), (j, (step, S)) in product(enumerate(models), enumerate(kinds)):
        of = panels.get((model, (step, S)), {})
        axes[i][j].set_visible(bool(of))
        axes[i][j].set_title(f"{MODELS[model]} {step}" + (f", S = {S}" if S else ", large batch"))
        if of:
            _draw_rates(axes[i][j], of, against_batch=bool(S))
    shown = [name for name in LINES if any(name in row.timings for of in panels.values() for row in of.values())]
    handles = [Line2D([], [], label=name, **_line(name)) for name in shown]
    _legend(figure, f"Tokens a second, without padding, {rows[0].case['dtype']}", handles, columns=len(kinds) + 1)
    return figure


def kernels(run: Run) -> dict[tuple[str, str], dict[str, Row]]:
    """By kernel and size, the passes: in this device's usual dtype, of the most tokens, the widest, with dropout."""
    rows = _usual([row for bench in KERNELS for row in run.find(bench) if OURS in row.timings], run)
    rows.sort(key=lambda row: [row.case.get(key, 0) for key in ("tokens", "heads", "head_dim", "dropout")])
    order = list(KERNELS)
    largest = {(row.bench, str(row.case.get("lengths", row.case.get("hidden"))), row.case["pass"]): row for row in rows}
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for bench, size, pass_ in sorted(largest, key=lambda it: (order.index(it[0]), it[1].isalpha(), it[1].zfill(9))):
        found.setdefault((bench, size), {})[pass_] = largest[bench, size, pass_]
    return found


def ceiling(run: Run) -> Figure | None:
    """Every kernel's share of the measured ceiling, fastbert's and that of the fastest other."""
    roof = Roof(run)
    found = {key: passes for key, passes in kernels(run).items() if any(map(roof.seconds, passes.values()))}
    if not found:
        return None
    figure, ((left, right),) = _figure(run, 9.2, 1.5 + 0.42 * len(found), columns=2, sharey=True, sharex=True)
    for y, passes in enumerate(found.values()):
        for pass_, row in passes.items():
            other = fastest(row, (name for name in row.timings if not name.startswith(OURS)))
            ours = " with its forward" if pass_ == "both" else ""
            for name, at, colour, note in ((OURS, -0.2, ACCENT, ours), (other, 0.2, PALE, f" {other}")):
                share = roof.share(row, name) if name else None
                if share is not None:
                    ax = left if pass_ == "forward" else right
                    _bar(ax, y + at, share, colour, f"{share:.0%}{note}", fontsize=7.5)
    labels = []
    for (bench, size), passes in found.items():
        size = LENGTHS.get(size, f"length {size}" if bench == "attention" else f"hidden {size}")
        dropout = ", dropout" if any(row.case.get("dropout") for row in passes.values()) else ""
        labels.append(f"{KERNELS[bench][0]}, {size}{dropout}")
    _finish_bars([left, right], labels, room=1.4)
    for ax, what in ((left, "forward"), (right, "backward")):
        ax.set(title=what, xlabel="share of what a copy and products reach (the line)")
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    handles = [Patch(color=ACCENT, label=OURS), Patch(color=PALE, label="the fastest other, by name")]
    _legend(figure, f"Share of the measured ceiling, {_dtype(found)}", handles)
    return figure


def roofline(run: Run) -> Figure | None:
    """fastbert's kernels under the measured copy and the fastest measured product, both axes logarithmic."""
    found, roof = kernels(run), Roof(run)
    rows = [(size, row) for (_, size), passes in found.items() for row in passes.values()]
    rows = [(size, row) for size, row in rows if row.work.bytes or row.work.products]
    peak = roof.product(_dtype(found))
    if not rows or peak is None or roof.copy is None:
        return None
    figure, ((ax,),) = _figure(run, 9.2, 6.2)
    ridge = peak / roof.copy
    points: list[tuple[float, float, str]] = []
    beside = count()
    for size, row in rows:
        # Without FLOPs there is no place along the slope: beside each other, each at its height below it.
        x = _intensity(row) or ridge / 100 * 1.4 ** next(beside)
        y = (row.work.flops or x * row.work.bytes) / row.timings[OURS].median
        marker, colour = "^" if row.case["pass"] == "forward" else "v", KERNELS[row.bench][1]
        ax.plot(x, y, marker, color=colour, markerfacecolor=colour if row.work.flops else "white")
        points.append((x, y, LENGTHS.get(size, size).removesuffix(" lengths")))
    left, right = ridge / 200, 4 * max(ridge, *(x for x, *_ in points))
    ax.plot([left, ridge, right], [left * roof.copy, peak, peak], color=INK)
    large, copy = EngFormatter("FLOP/s", 0)(peak), EngFormatter("B/s", 1)(roof.copy)
    for text, part in ((f"plain product, {large}", 1), (f"copy, {copy}", 8)):
        ax.annotate(text, (ridge / part, peak / part), (-8, 4), textcoords="offset points", ha="right")
    heights = [y for _, y, _ in points]
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(heights) / 2, 2 * max(peak, *heights)))
    ax.set_xlabel("FLOP for each byte that has to move (hollow: not counted, only the distance to the line counts)")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    ax.yaxis.set_major_formatter(EngFormatter("FLOP/s"))
    ax.grid()
    present = {row.bench for _, row in rows}
    marks = [(*KERNELS[bench], "o") for bench in KERNELS if bench in present]
    marks += [("forward", INK, "^"), ("backward, or both", INK, "v")]
    handles = [Line2D([], [], color=colour, marker=marker, ls="", label=name) for name, colour, marker in marks]
    _legend(figure, f"fastbert's kernels under the measured roof, {_dtype(found)}", handles, columns=4)
    _label(ax, points)
    return figure


def breakdown(run: Run) -> Figure | None:
    """Where the time of a step goes, for every provider."""
    cases: dict[str, list[Row]] = {}
    for row in run.find("breakdown"):
        title = f"{MODELS.get(row.case['model'], row.case['model'])}, {row.case['step']}, {describe(row)}"
        cases.setdefault(title, []).append(row)
    if not cases:
        return None
    height = 1.6 + sum(0.6 + 0.33 * len(rows) for rows in cases.values())
    ratios = [len(rows) for rows in cases.values()]
    figure, axes = _figure(run, 9.2, height, rows=len(cases), height_ratios=ratios)
    for (ax,), (title, rows) in zip(axes, cases.items(), strict=True):
        longest = max(sum(row.values.values()) for row in rows)
        for y, row in enumerate(rows):
            start, total = 0.0, sum(row.values.values())
            for part, (colour, ink) in PARTS.items():
                seconds = row.values.get(part, 0.0)
                ax.barh(y, seconds, 0.8, start, **_look(part))
                if seconds > 0.05 * longest:
                    behind = {"facecolor": colour, "edgecolor": "none", "pad": 1}
                    share = f"{seconds / total:.0%}"
                    ax.text(start + seconds / 2, y, share, ha="center", va="center", color=ink, bbox=behind)
                start += seconds
            ax.text(total, y, f" {duration(total)}", va="center", weight="bold")
        ax.set_yticks(range(len(rows)), [row.case["provider"] for row in rows])
        ax.set(title=title, xlim=(0, 1.12 * longest), ylim=(len(rows) - 0.5, -0.5))
        ax.xaxis.set_major_formatter(lambda seconds, _: f"{seconds * 1e3:g}")
    axes[-1][0].set_xlabel("ms a step, and each part's share of the step")
    shown = [part for part in PARTS if any(row.values.get(part) for rows in cases.values() for row in rows)]
    handles = [Patch(label=part, **_look(part)) for part in shown]
    _legend(figure, "Where the time of a step goes", handles, columns=5)
    return figure


PICTURES: dict[str, Callable[[Run], Figure | None]] = {
    make.__name__: make for make in (headline, tokens, ceiling, roofline, breakdown)
}


def _figure(
    run: Run, width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, Any]:
    """A figure that says at its foot what was measured, and its axes."""
    figure = Figure((width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.supxlabel(textwrap.fill(_where(run), int(15 * width)), x=0.01, ha="left", color=GREY, fontsize=7.5)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _legend(figure: Figure, title: str, handles: Sequence[Artist], columns: int = 2) -> None:
    """The figure's head: title and legend in one, so that neither covers the other."""
    legend = figure.legend(handles=handles, title=title, loc="outside upper left", ncols=columns, alignment="left")
    legend.get_title().set(weight="bold", size=11)


def _bar(ax: Axes, y: float, value: float, colour: str, text: str, **font: Any) -> None:
    ax.barh(y, value, 0.38, color=colour)
    over_the_line = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    ax.annotate(text, (value, y), (3, 0), textcoords="offset points", va="center", bbox=over_the_line, **font)


def _finish_bars(axes: Sequence[Axes], labels: Sequence[str], room: float) -> None:
    """Names for bars, a line at 1, and room for the texts: how long an axis is, relative to the longest bar."""
    for ax in axes:
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_yticks(range(len(labels)), labels)
        ax.set(xlim=(0, room * max(ax.dataLim.x1 for ax in axes)), ylim=(len(labels) - 0.4, -0.6))


def _draw_rates(ax: Axes, rows: dict[int, Row], *, against_batch: bool) -> None:
    """A line a provider."""
    rows = dict(sorted(rows.items()))
    for name in LINES:
        points = {x: row.work.tokens / row.timings[name].median for x, row in rows.items() if name in row.timings}
        ax.plot(list(points), list(points.values()), **_line(name))
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(rows), [str(x) for x in rows], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    if against_batch:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(EngFormatter())
    ax.set(xlabel="sequences in a batch" if against_batch else "tokens in a sequence", ylabel="tokens/s")
    ax.grid()


def _line(name: str) -> dict[str, Any]:
    colour, marker, style = LINES[name]
    return {"color": colour, "marker": marker, "linestyle": style, "markersize": 5}


def _look(part: str) -> dict[str, Any]:
    hatch = "////" if part == "gaps" else None
    return {"facecolor": PARTS[part][0], "edgecolor": INK, "linewidth": 0.4, "hatch": hatch}


def _label(ax: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """A text for every point, as near as it covers nothing."""
    ax.figure.draw_without_rendering()
    drawn = (line.get_transform().transform_path(line.get_path()).interpolated(100) for line in ax.lines)
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for path in drawn for x, y in path.vertices]
    taken += [text.get_window_extent() for text in ax.texts]
    line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3}
    look = {"textcoords": "offset points", "va": "center", "fontsize": 7.5, "arrowprops": line}
    for x, y, text in points:
        for distance, angle in product((9, 14, 20, 28, 38, 50), range(0, 360, 30)):
            right, up = distance * math.cos(math.radians(angle)), distance * math.sin(math.radians(angle))
            side = "left" if right > 1 else "right" if right < -1 else "center"
            label = ax.annotate(text, (x, y), (right, up), ha=side, **look)
            label.update_positions(ax.figure.canvas.get_renderer())
            box = Text.get_window_extent(label)  # without the line
            if not box.count_overlaps(taken):
                taken.append(box)
                break
            label.remove()


def _usual(rows: Sequence[Row], run: Run) -> list[Row]:
    """The rows in one dtype, the most usual one on this device."""
    found = {row.case["dtype"] for row in rows}
    dtype = next((dtype for dtype in DTYPES[run.device] if dtype in found), None)
    return [row for row in rows if row.case["dtype"] == dtype]


def _dtype(found: dict[tuple[str, str], dict[str, Row]]) -> str:
    return next((str(row.case["dtype"]) for passes in found.values() for row in passes.values()), "")


def _intensity(row: Row) -> float:
    """FLOPs for each byte that has to move: the work's own bytes, or its products', each matrix once."""
    itemsize = 4 if row.case["dtype"] == "float32" else 2
    return row.work.flops / (
        row.work.bytes or sum(itemsize * (M * K + K * N + M * N) for _, M, K, N in row.work.products)
    )
