"""Time fastbert against what a user would run otherwise: first agree, then time, on the very tensors that are timed.

Both sides of a comparison run in turn within one test, so that whatever else the machine does hits both alike, and
the figure to quote is the ratio of their medians.
"""

import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

Step = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Row:
    """One comparison. Times in seconds: median, 20th and 80th percentile."""

    bench: str
    case: dict[str, Any]
    baseline: tuple[float, float, float]
    fastbert: tuple[float, float, float]

    @property
    def speedup(self) -> float:
        return self.baseline[0] / self.fastbert[0]


def compare(
    benchmark: BenchmarkFixture,
    case: Mapping[str, Any],
    baseline: Step,
    fast: Step,
    *,
    tolerance: float,
    seconds: float = 2.0,
) -> Row | None:
    """Check that both agree; then, with --benchmark, time them in turn.

    A fast wrong answer is never reported.

    Args:
        baseline, fast: return what must agree, or None.
        tolerance: largest difference, relative to the baseline's largest value.
        seconds: how long to go on at least; and at least five rounds, after one that is not counted.

    Raises:
        AssertionError: if they do not agree.
    """
    expected, actual = baseline(), fast()
    if expected is not None and actual is not None:
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error <= tolerance, f"{dict(case)}: fastbert is off by {error:.1e}, more than {tolerance:.1e}"
    if benchmark.disabled:
        benchmark(fast)
        return None
    baseline_times: list[float] = []

    def run_baseline() -> None:
        start = perf_counter()
        baseline()
        baseline_times.append(perf_counter() - start)

    run_baseline()
    start = perf_counter()
    fast()
    rounds = max(5, min(50, int(seconds / (baseline_times[0] + perf_counter() - start))))
    benchmark.pedantic(fast, setup=run_baseline, rounds=rounds, warmup_rounds=1)
    fast_times = benchmark.stats.stats.data
    row = Row(benchmark.name, dict(case), _quantiles(baseline_times[2:]), _quantiles(fast_times))
    benchmark.extra_info.update(case | {"baseline": row.baseline, "speedup": row.speedup})
    return row


def _quantiles(times: list[float]) -> tuple[float, float, float]:
    deciles = statistics.quantiles(times, n=10)
    return statistics.median(times), deciles[1], deciles[7]


def record(rows: list[Row]) -> dict[str, Any]:
    """Everything that a figure needs beside it: machine, versions, commit, date."""
    cpu = next(
        (line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": date.today().isoformat(),
        "machine": f"{cpu}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "rows": [asdict(row) | {"speedup": row.speedup} for row in rows],
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
