"""Figures for people: rates with their units, and the table that a run ends with."""

from collections.abc import Iterable, Sequence

from bench.record import OURS, Roof, Row, Run, split
from bench.shown import PATCHED


def rate(row: Row, provider: str) -> str:
    """What a provider reached: tokens, bytes or FLOPs a second, whichever the row's work is about."""
    seconds = row.timings[provider].median
    if row.work.tokens:
        return _scaled(row.work.tokens / seconds, ("tokens/s", "k tokens/s", "M tokens/s"))
    if row.work.flops:
        return _scaled(row.work.flops / seconds, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s"))
    if row.work.bytes:
        return _scaled(row.work.bytes / seconds, ("B/s", "kB/s", "MB/s", "GB/s"))
    return ""


def texts_rate(row: Row, provider: str) -> str:
    """Of inference, whose sequences are texts."""
    return _scaled(row.work.sequences / row.timings[provider].median, ("texts/s", "k texts/s"))


def duration(seconds: float) -> str:
    """Three digits, in s, ms or us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def terminal_table(run: Run) -> str:
    """A line a case: fastbert's time, what it reached, the share of the ceiling, how much faster than the best.

    Where fastbert computes in several precisions, a line for each, against the best in that.
    """
    roof = Roof(run)
    lines = [(f"{run.name}, {run.date}, {run.commit}", "median", "20-80 %", "reached", "ceiling", "against the best")]
    for row in run.rows:
        if not row.timings:
            continue
        names = [name for name in row.timings if name == OURS or name.startswith(f"{OURS} ")]
        lines += [_line(row, name, roof) for name in names or list(row.timings)[:1]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, *([f"* {Roof.EXCEEDED}"] if any(map(roof.exceeded, run.rows)) else [])])


def _line(row: Row, name: str, roof: Roof) -> tuple[str, ...]:
    timing, dtype = row.timings[name], row.case.get("dtype", "")
    precision = split(name, dtype)[1]
    rivals = [it for it in row.timings if not it.startswith((OURS, "reference")) and it != PATCHED]
    rivals = [it for it in rivals if split(it, dtype)[1] == precision] if name.startswith(OURS) else []
    best = min((row.timings[it].median, it) for it in rivals) if rivals else None
    return (
        row.label if precision == dtype else f"{row.label} {precision}",
        duration(timing.median),
        f"{duration(timing.low)} - {duration(timing.high)}",
        rate(row, name),
        roof.percent(row, name) if row.bench != "roof" else "",
        "" if best is None else f"{best[0] / timing.median:.2f} x {best[1]}",
    )


def beside(run: Run, bench: str) -> list[str]:
    """What a bench has beside times of steps: counts, seconds of one thing, what dropout costs attention."""
    lines = [
        f"{row.label}: " + ", ".join(f"{name} {_value(value, row.unit)}" for name, value in row.values.items())
        for row in run.find(bench)
        if row.values and bench not in ("memory", "breakdown")
    ]
    if bench == "attention":
        lines += [f"{row.label}: {ratio:.2f} x the time without dropout" for row, ratio in dropout_ratios(run)]
    return lines


def dropout_ratios(run: Run) -> list[tuple[Row, float]]:
    """How many times as long fastbert's attention takes with dropout as without."""
    found = []
    for row in run.find("attention"):
        if not row.case.get("dropout") or OURS not in row.timings:
            continue
        for other in run.find("attention", **{**row.case, "dropout": 0.0}):
            if OURS in other.timings:
                found.append((row, row.timings[OURS].median / other.timings[OURS].median))
    return found


def _value(value: float, unit: str) -> str:
    return duration(value) if unit == "s" else f"{value:g} {unit}".rstrip()


def _scaled(value: float, units: tuple[str, ...]) -> str:
    i = 0
    while value >= 1000 and i < len(units) - 1:
        value, i = value / 1000, i + 1
    return f"{value:.3g} {units[i]}" if value < 1000 else f"{value:.0f} {units[i]}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *lines))
