"""What people see of the results: the documents' tables, and for every run in bench/results a page with pictures.

All of it is made from result files (`bench/record.py`) and from nothing else; the same files give the same bytes.
"""

import html
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.finetuned import RUNS, runs_section
from bench.pictures import DARK, draw
from bench.record import OURS, Roof, Row, Run, split
from bench.shown import (
    MODELS,
    PATCHED,
    SDPA,
    STOCK,
    TASKS,
    Gain,
    behind,
    describe,
    engines,
    fastest_compiled,
    how_many,
    library,
    losses,
    precisions,
    sides,
    telling,
    where,
)
from bench.table import beside, duration, markdown, rate, texts_rate
from fastbert.families.__main__ import table

ROOT = Path(__file__).parents[1]
GRAPH = ", CUDA graph"
HOW_TO_READ = f"""In a cell: median; 20th to 80th percentile; how many times as fast fastbert is; memory at its peak.
Rates count useful work only: no padding, every byte once. 100 % of the ceiling is the least time that this work takes
at the speed of a plain copy and of plain matrix products, the best that the same run measured; for a whole model that
is its MFU, by PyTorch's and fastbert's FLOP formulas, against the fastest product.
A star: {Roof.EXCEEDED}
"""


def main(results: Sequence[Path] | None = None, root: Path = ROOT) -> int:
    """Write a page and pictures beside every result file, and the sections of the README and of docs/performance.md.

    Args:
        results: the files, by default all of bench/results; those that hold no run are skipped.
        root: the folder of the README.

    Raises:
        ValueError: if a document lacks a marker.
    """
    runs: dict[Path, Run] = {}
    for path in sorted((ROOT / "bench" / "results").glob("*.json")) if results is None else results:
        try:
            runs[path] = Run.read(path)
        except ValueError as error:
            print(f"skipped: {error}")
    readme, performance = root / "README.md", root / "docs" / "performance.md"
    finetuning = root / "docs" / "finetuning.md"
    texts = {path: path.read_text() for path in (readme, performance, finetuning)}
    for path, section, content in (
        (readme, "headline", headline_section(runs, readme.parent)),
        (readme, "inference", inference_section(runs, readme.parent)),
        (readme, "finetuning", finetuning_section(runs, readme.parent)),
        (readme, "families", table() + "\n"),
        (performance, "families", family_speeds_section(runs, performance.parent)),
        (finetuning, "runs", runs_section(ROOT / "bench" / "results" / RUNS)),
        (performance, "memory", memory_section(runs, performance.parent)),
    ):
        texts[path] = put(texts[path], section, content, path.name)
    for path, run in runs.items():
        pictures = draw(run, path.with_suffix(""))
        path.with_suffix(".md").write_text(page(run, path.stem, pictures))
    for path, text in texts.items():
        path.write_text(text)
    return 0


def put(text: str, section: str, content: str, name: str) -> str:
    """The text with what stands between the section's markers replaced.

    Raises:
        ValueError: if a marker is missing.
    """
    begin, end = f"<!-- report: {section} -->\n", "<!-- /report -->"
    before, found, rest = text.partition(begin)
    old, closed, after = rest.partition(end)
    if not found or not closed or "<!-- report:" in old:
        raise ValueError(f"{name} has no section from {begin.strip()} to {end}")
    return f"{before}{begin}{content}{end}{after}"


def headline_section(runs: dict[Path, Run], base: Path) -> str:
    """A picture, a table and where they come from: the latest run of a GPU, or else of a CPU."""
    path = _latest(runs, telling)
    if path is None:
        return ""
    run, link = runs[path], _link(path, base)
    lines = []
    for row in telling(run):
        others = SDPA, fastest_compiled(row)
        rates = [rate(row, name).removesuffix("tokens/s").strip() if name else "" for name in (*others, OURS)]
        gains = [_gain(Gain.of(row, OURS, name)) if name else "" for name in others]
        lines.append([MODELS[row.case["model"]], f"{row.case['step']}, {describe(row)}", *rates, *gains])
    header = ["model", "what", "transformers SDPA", "compiled", "fastbert", "against SDPA", "against compiled"]
    shows = picture(f"How many times as fast as transformers with SDPA, on {run.name}", f"{link}/headline")
    words = ["Tokens a second, padding not counted; in brackets what the spreads allow.", losses(telling(run))]
    return f"{shows}\n{markdown(header, lines)}\n{' '.join(filter(None, words))} {origin(run, link)}\n"


def inference_section(runs: dict[Path, Run], base: Path) -> str:
    """A picture, a table and what it costs in quality: the latest run of a GPU, or else of a CPU."""
    path = _latest(runs, engines)
    if path is None:
        return ""
    run, link, rows = runs[path], _link(path, base), engines(runs[path])
    kinds = precisions(rows)
    header = ["from strings on", STOCK, "patched"]
    for precision in kinds:
        header += [f"fastbert {precision}", f"best other {precision}"]
    lines = []
    for row in rows:
        what = f"{MODELS[row.case['model']]}, {TASKS[row.case['task']]}: {how_many(row)} of {row.case['source']}"
        cells = [what, _rates(row, STOCK), _times(row, PATCHED if PATCHED in row.timings else None)]
        for precision in kinds:
            ours, other = sides(row, precision)
            gain = _times(row, ours)
            won = bool(ours and other) and not Gain.of(row, str(ours), str(other)).slower
            cells.append(f"{f'**{gain}**' if won else gain}<br>{_rates(row, ours)}" if ours else "")
            cells.append(f"{_times(row, other)} {library(other)}" if other else "")
        lines.append(cells)
    for row in run.find("quality"):
        lines.append(_quality(row, kinds))
    shows = picture(
        f"How many times as fast as {STOCK} engines are from strings on, on {run.name}", f"{link}/inference"
    )
    words = [f"Times as fast as {STOCK} as it comes, {rows[0].case['dtype']}; padding does not count as tokens."]
    words += [behind(rows), _absent(rows), _peers(run), origin(run, link)]
    return f"{shows}\n{markdown(header, lines)}\n{' '.join(filter(None, words))}\n"


def finetuning_section(runs: dict[Path, Run], base: Path) -> str:
    """A table of trainings with their evaluation: the latest run of a GPU, or else of a CPU."""

    def rows_of(run: Run) -> list[Row]:
        return [row for row in run.find("finetuning") if OURS in row.timings]

    path = _latest(runs, rows_of)
    if path is None:
        return ""
    run, lines = runs[path], []
    rows = rows_of(run)
    others = sorted({name for row in rows for name in row.timings if name != OURS}, key=FINETUNING.index)
    for row in rows:
        case = row.case
        what = (
            f"{GLUE.get(case['task'], case['task'])}: {case['steps']} steps of {case['batch']}, then {case['judged']}"
            f" evaluated, up to {case['S']} tokens"
        )
        lines.append([what, rate(row, OURS), *(str(Gain.of(row, OURS, n)) if n in row.timings else "" for n in others)])
    header = ["training and evaluating", "fastbert", *(f"against {name}" for name in others)]
    words = f"{MODELS[rows[0].case['model']]}, {rows[0].case['dtype']}; tokens a second, padding not counted."
    return f"{markdown(header, lines)}\n{words} {origin(run, _link(path, base))}\n"


GLUE = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "squad": "SQuAD 1.1"}
FINETUNING = ["transformers, padded", "transformers, dynamic padding", "transformers, grouped by length"]
QUALITY = {"STS-B": "STS-B dev, Spearman", "SST-2": "SST-2 dev, accuracy of a linear probe"}
PEERS = STOCK, "onnxruntime", "openvino", "nncf", "ctranslate2"


def _quality(row: Row, kinds: Sequence[str]) -> list[str]:
    """A line of the table of inference."""
    dtype = row.case["dtype"]
    cells = [
        QUALITY.get(row.case["what"], row.case["what"]),
        f"{row.values[STOCK]:.2f} %" if STOCK in row.values else "",
        "",
    ]
    for precision in kinds:
        values = {split(name, dtype)[0]: x for name, x in row.values.items() if split(name, dtype)[1] == precision}
        cells.append(f"{values.pop(OURS):.2f} %" if OURS in values else "")
        cells.append(
            ", ".join(f"{name} {x:.2f} %" for name, x in values.items() if name != STOCK or precision != dtype)
        )
    return cells


def _absent(rows: Sequence[Row]) -> str:
    """Who has no time at all, and why."""
    timed = {name for row in rows for name in row.timings}
    whys = {name: why for row in rows for name, why in row.failures.items() if name not in timed}
    return f"Not timed: {'; '.join(f'{name} ({why})' for name, why in whys.items())}." if whys else ""


def _peers(run: Run) -> str:
    there = [f"{name} {run.versions[name]}" for name in PEERS if name in run.versions]
    return f"Against {', '.join(there)}." if there else ""


def _rates(row: Row, name: str) -> str:
    return f"{rate(row, name)}, {texts_rate(row, name)}"


def _times(row: Row, name: str | None) -> str:
    return f"{Gain.of(row, name, STOCK).ratio:.2f} x" if name else ""


def _latest(runs: Mapping[Path, Run], rows: Callable[[Run], Sequence[Row]]) -> Path | None:
    """The file of the latest run of a GPU that has such rows, or else of a CPU."""
    shown = [path for path, run in runs.items() if rows(run)]
    return max(shown, key=lambda path: (runs[path].device == "cuda", runs[path].started), default=None)


def family_speeds_section(runs: dict[Path, Run], base: Path) -> str:
    """How many times as fast each family is as transformers' SDPA: the latest run of a GPU, or else of a CPU."""

    def rows_of(run: Run) -> list[Row]:
        return [row for row in run.find("model") if " " in row.case["model"] and {OURS, SDPA} <= row.timings.keys()]

    path = _latest(runs, rows_of)
    if path is None:
        return ""
    run, lines = runs[path], []
    families = list(dict.fromkeys(row.case["model"] for row in rows_of(run)))
    kinds = [("inference", "wikipedia"), ("training", "wikipedia"), ("inference", "full"), ("training", "full")]
    for family in families:
        cells = []
        for step, lengths in kinds:
            found = run.find("model", model=family, step=step, lengths=lengths)
            cells.append("; ".join(str(Gain.of(row, OURS, SDPA)) for row in found if OURS in row.timings))
        lines.append([family.partition(" ")[2], *cells])
    header = [
        "family",
        *(f"{step}, {'half is padding' if real == 'wikipedia' else 'no padding'}" for step, real in kinds),
    ]
    size = MODELS[families[0].split()[0]]
    words = f"Times as fast as transformers with SDPA, in {size}'s size, masked LM in training, float32."
    return f"{markdown(header, lines)}\n{words} {origin(run, _link(path, base))}\n"


def memory_section(runs: dict[Path, Run], base: Path) -> str:
    """The memory table of the latest run that has one."""
    shown = {path: run for path, run in runs.items() if run.find("memory")}
    if not shown:
        return ""
    path = max(shown, key=lambda path: shown[path].started)
    return f"{memory_table(shown[path].find('memory'))}\n{origin(shown[path], _link(path, base))}\n"


def origin(run: Run, link: str) -> str:
    """Where figures come from, and what to be careful about."""
    line = f"{where(run)}: `{run.command}`."
    if run.tests and run.tests["status"] != 0:
        line += f" **Not all tests passed: {run.tests['summary']}.**"
    if not run.complete:
        cut = [it["stage"] for it in run.stages if it["ended"] == "the time was over"]
        line += f" **The run was cut short{': ' if cut else ''}{', '.join(cut)}.**"
    if failed := sum(OURS in row.failures for row in run.rows):
        line += f" **fastbert has no time in {failed} of {len(run.rows)} cases.**"
    return f"{line} [All tables and pictures]({link}.md), [every figure]({link}.json)."


def picture(shows: str, path: str) -> str:
    """An SVG for light and for dark pages; `path` without its ending."""
    return f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{path}{DARK}.svg">
  <img alt="{html.escape(shows)}" src="{path}.svg">
</picture>
"""


def page(run: Run, stem: str, pictures: Mapping[str, str]) -> str:
    """All of a run as Markdown, with these pictures: what each shows, by its name."""
    parts = [f"# {run.name}, {run.date}\n", origin(run, stem) + "\n"]
    if run.tests:
        parts.append("\n".join([f"Tests: {run.tests['summary']}\n", *(f"- `{test}`" for test in run.tests["failed"])]))
    parts += [picture(shows, f"{stem}/{name}") for name, shows in pictures.items()]
    facts = run.machine | run.versions | {"started": run.started}
    for when, clocks in run.clocks.items():
        facts |= {f"{name} {when}": value for name, value in (clocks or {}).items()}
    parts += ["## Machine\n", markdown(["", ""], [[k, str(v)] for k, v in facts.items() if v is not None])]
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
        share = roof.percent(row, names[0]) if names[0] in row.timings and row.bench != "roof" else ""
        reached = rate(row, names[0]) if names[0] in row.timings else ""
        if reached and row.work.sequences:
            reached += f"<br>{row.work.sequences / row.timings[names[0]].median:.3g} sequences/s"
        cells = [_cell(row, name) for name in names]
        lines.append([*_values(row, keys), reached, share, *cells])
    return same + markdown([*keys, f"{names[0]} reaches", "of ceiling", *names], lines)


def memory_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        stock, fast = (row.values[name] for name in (SDPA, OURS))
        lines.append([*_values(row, list(row.case)), f"{stock:.0f}", f"{fast:.0f}", f"{fast / stock:.2f}"])
    return markdown([*rows[0].case, f"{SDPA}, {rows[0].unit}", OURS, "ratio"], lines)


def breakdown_table(rows: Sequence[Row]) -> str:
    same, keys = _split_cases(rows)
    parts = list(dict.fromkeys(part for row in rows for part in row.values))
    lines = []
    for row in rows:
        total = sum(row.values.values())
        cells = (f"{duration(s)}, {s / total:.0%}" if (s := row.values.get(part)) else "" for part in parts)
        lines.append([*_values(row, keys), duration(total), *cells])
    return same + markdown([*keys, "whole step", *parts], lines)


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


def _gain(gain: Gain) -> str:
    span = f"({gain.low:.2f} to {gain.high:.2f})"
    return f"{gain}, slower {span}" if gain.slower else f"**{gain}** {span}"


def _link(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path.with_suffix(""), base)).as_posix()


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
