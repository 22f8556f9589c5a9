"""What moved from one run to another beyond the spread of both."""

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.record import OURS, Row, Run, Timing
from bench.table import duration

LEAST = 0.02  # of the median: less is no news, however small the spread
CLOCKS = 0.05  # by how much clocks may differ


@dataclass(frozen=True)
class Change:
    """A case of a provider whose time, or memory, is another one.

    Attributes:
        ratio: after to before; more than 1 is worse.
        text: both, with their unit.
    """

    row: Row
    provider: str
    ratio: float
    text: tuple[str, str]

    @property
    def ours(self) -> bool:
        return self.provider.startswith(OURS)


def compare(before: Run, after: Run) -> list[Change]:
    """What moved, the largest change first.

    A time moved where the intervals from the 20th to the 80th percentile do not meet, and the median by more than
    LEAST. Counted bytes have no spread. A breakdown's parts are of one profile, whose spread nobody knows: left out.
    """
    changes = []
    for old, new in _pairs(before, after):
        for name in old.timings.keys() & new.timings.keys():
            a, b = old.timings[name], new.timings[name]
            if a.high < b.low or b.high < a.low:
                changes.append(Change(new, name, b.median / a.median, (_text(a), _text(b))))
        if new.bench == "memory":
            for name in old.values.keys() & new.values.keys():
                x, y = old.values[name], new.values[name]
                changes.append(Change(new, name, y / x, (f"{x:.0f} B", f"{y:.0f} B")))
    moved = [change for change in changes if abs(change.ratio - 1) > LEAST]
    return sorted(moved, key=lambda change: (-abs(math.log(change.ratio)), change.row.label, change.provider))


def newly_failing(before: Run, after: Run) -> list[tuple[Row, str]]:
    """Cases and providers that had a time and now have a reason for none, other than that the time was over."""
    return [
        (new, name)
        for old, new in _pairs(before, after)
        for name, why in new.failures.items()
        if name in old.timings and not why.startswith("not measured")
    ]


def differences(before: Run, after: Run) -> list[str]:
    """Why the two runs may not be comparable: machines, versions, clocks, one that was cut short."""
    found = []
    for what in ("machine", "versions"):
        a, b = getattr(before, what), getattr(after, what)
        keys = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        found += [f"{what}: {key} was {a.get(key)}, is {b.get(key)}" for key in sorted(keys)]
    old, new = (_clocks(run) for run in (before, after))
    for name in sorted(old.keys() & new.keys()):
        if abs(new[name] - old[name]) > CLOCKS * old[name]:
            found.append(f"{name}: was {old[name]:g} MHz, is {new[name]:g} MHz")
    found += [f"{run.started} was cut short" for run in (before, after) if not run.complete]
    return found


def main(before: Path, after: Path) -> int:
    """Print what moved.

    Returns:
        1 where something of fastbert's is slower, takes more memory, or fails as it did not before; else 0.

    Raises:
        ValueError: if a file holds no run.
    """
    a, b = Run.read(before), Run.read(after)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    for name, run in (("before", a), ("after", b)):
        console.print(f"{name:7} {run.name}, {run.started}, commit {run.commit}", markup=False)
    for difference in differences(a, b):
        console.print(f"[bold red]NOT ALIKE[/] {escape(difference)}")
    changes, failing = compare(a, b), newly_failing(a, b)
    for ours in (True, False):
        for word, worse in (("slower or larger", True), ("faster or smaller", False)):
            them = [change for change in changes if change.ours == ours and (change.ratio > 1) == worse]
            if them:
                console.print(_table(f"{OURS if ours else 'others'}: {word}", them))
    if not changes:
        console.print("nothing moved beyond its spread")
    for row, name in failing:
        console.print(f"fails now: {name}, {row.label}: {row.failures[name]}", markup=False)
    for word, one, other in (("before", a, b), ("after", b, a)):
        only = sorted(
            {_key(row): row.label for row in one.rows if _key(row) not in set(map(_key, other.rows))}.values()
        )
        if only:
            console.print(f"only {word}: {len(only)} cases", *only, sep="\n  ", markup=False)
    worse = any(change.ours and change.ratio > 1 for change in changes)
    return int(worse or any(name.startswith(OURS) for _, name in failing))


def _table(title: str, changes: Iterable[Change]) -> Table:
    table = Table("case", "provider", "before", "after", "change", title=title, title_justify="left")
    for change in changes:
        cells = (change.row.label, change.provider, *change.text, f"{change.ratio - 1:+.1%}")
        table.add_row(*map(escape, cells))
    return table


def _pairs(before: Run, after: Run) -> list[tuple[Row, Row]]:
    old = {_key(row): row for row in before.rows}
    return [(old[_key(row)], row) for row in after.rows if _key(row) in old]


def _key(row: Row) -> str:
    return json.dumps([row.bench, row.case], sort_keys=True)


def _text(timing: Timing) -> str:
    return f"{duration(timing.median)} ({duration(timing.low)} to {duration(timing.high)})"


def _clocks(run: Run) -> dict[str, float]:
    """MHz, as they were last seen."""
    clocks = run.clocks.get("after") or run.clocks.get("before") or {}
    return {name: float(value.split()[0]) for name, value in clocks.items() if value.endswith(" MHz")}
