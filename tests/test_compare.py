"""The comparison of runs."""

from pathlib import Path
from typing import Any

import pytest

from bench.compare import compare, differences
from bench.compare import main as compare_main
from bench.record import OURS, Row, Run, Timing, Work
from tests.invented import CPU, SDPA, empty_run, timing


def op_row(n: Any = 1, failures: dict[str, str] | None = None, **timings: Timing) -> Row:
    return Row("op", {"n": n}, Work(), timings, failures or {})


@pytest.mark.parametrize(
    ("after", "ratio"),
    [
        (Timing(1.5, 1.4, 1.6, 9, "clock"), 1.5),
        (Timing(0.5, 0.4, 0.6, 9, "clock"), 0.5),
        (Timing(1.5, 1.05, 1.6, 9, "clock"), None),  # the intervals meet
        (Timing(0.5, 0.4, 0.95, 9, "clock"), None),
    ],
)
def test_only_what_moved_beyond_its_spread_is_a_change(after: Timing, ratio: float | None) -> None:
    before = empty_run(rows=[op_row(fastbert=Timing(1.0, 0.9, 1.1, 9, "clock"))])
    changes = compare(before, empty_run(rows=[op_row(fastbert=after)]))
    assert [change.ratio for change in changes] == ([] if ratio is None else [ratio])


def test_little_is_no_change_however_small_its_spread() -> None:
    before = empty_run(rows=[op_row(fastbert=timing(1.0, 0.0), rival=timing(1.0, 0.0))])
    after = empty_run(rows=[op_row(fastbert=timing(1.019, 0.0), rival=timing(1.021, 0.0))])
    assert [change.provider for change in compare(before, after)] == ["rival"]


def test_the_largest_change_comes_first() -> None:
    seconds = {"a": 1.5, "b": 0.25, "c": 3.0}
    before = empty_run(rows=[op_row(**dict.fromkeys(seconds, timing(1.0)))])
    after = empty_run(rows=[op_row(**{name: timing(s) for name, s in seconds.items()})])
    assert [change.provider for change in compare(before, after)] == ["b", "c", "a"]


def run_compare(tmp_path: Path, before: Run, after: Run) -> int:
    before.write(tmp_path / "before.json")
    after.write(tmp_path / "after.json")
    return compare_main(tmp_path / "before.json", tmp_path / "after.json")


def test_a_comparison_is_read_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = empty_run(rows=[op_row("[b]", fastbert=timing(1.0), rival=timing(1.0), gone=timing(1.0)), op_row(2)])
    row = op_row(
        "[b]", fastbert=timing(2.0), rival=timing(0.5), failures={"gone": "RuntimeError: [x]", "new": "absent"}
    )
    assert run_compare(tmp_path, before, empty_run(rows=[row, op_row(3)])) == 1
    text = capsys.readouterr().out
    assert f"before  {CPU}, 2 threads, 2030-01-02T03:04:05+00:00, commit abc1234" in text
    assert text.index("fastbert: slower or larger") < text.index("others: faster or smaller")
    (line,) = [line for line in text.splitlines() if "│ fastbert │" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["op [b]", "fastbert", "1 s (980 ms to 1.02 s)", "2 s (1.96 s to 2.04 s)", "+100.0%"]
    assert "-50.0%" in text
    assert "fails now: gone, op [b]: RuntimeError: [x]" in text
    assert "new" not in text
    assert "only before: 1 cases\n  op 2\n" in text
    assert "only after: 1 cases\n  op 3\n" in text
    assert "NOT ALIKE" not in text


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (op_row(fastbert=timing(1.0), rival=timing(1.0)), 0),
        (op_row(fastbert=timing(0.5), rival=timing(2.0)), 0),
        (op_row(fastbert=timing(1.5), rival=timing(1.0)), 1),
        (op_row(rival=timing(1.0), failures={OURS: "wrong: off"}), 1),
        (op_row(rival=timing(1.0), failures={OURS: "not measured: the time was over"}), 0),
        (op_row(fastbert=timing(1.0), failures={"rival": "wrong: off"}), 0),
    ],
)
def test_the_exit_status_is_about_fastbert(row: Row, status: int, tmp_path: Path) -> None:
    before = empty_run(rows=[op_row(fastbert=timing(1.0), rival=timing(1.0))])
    assert run_compare(tmp_path, before, empty_run(rows=[row])) == status


def test_more_memory_is_a_change_for_the_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (
        empty_run(rows=[Row("memory", {"hidden": 768}, values={SDPA: 200.0, OURS: kept})]) for kept in (100.0, 110.0)
    )
    assert run_compare(tmp_path, before, after) == 1
    assert "110 B" in capsys.readouterr().out
    assert run_compare(tmp_path, after, before) == 0


def test_other_machines_versions_and_clocks_are_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(sm: str, temperature: str, **changes: Any) -> Run:
        clocks = {"clocks.sm": sm, "clocks.mem": "[N/A]", "temperature.gpu": temperature}
        return empty_run("cuda", clocks={"before": None, "after": clocks}, **changes)

    before = run("1980 MHz", "40")
    assert differences(before, run("1965 MHz", "70")) == []
    other = run("1200 MHz", "40", complete=False)
    other.machine["gpu"] = "OTHER GPU"
    other.versions = {**before.versions, "torch": "2.14.0"}
    assert differences(before, other) == [
        "machine: gpu was INVENTED GPU, is OTHER GPU",
        "versions: torch was 2.13.0, is 2.14.0",
        "clocks.sm: was 1980 MHz, is 1200 MHz",
        "2030-01-02T03:04:05+00:00 was cut short",
    ]
    assert run_compare(tmp_path, before, other) == 0
    assert capsys.readouterr().out.count("NOT ALIKE") == 4
