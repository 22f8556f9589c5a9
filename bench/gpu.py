"""`make gpu`: everything that only a GPU can show, in one go, the most important first.

For a machine where nothing can be fetched, from a bare checkout, and for a limited time: first the tests, then this
machine's ceilings, kernels and models that we have goals for, then all the rest, until the time is over. Results are
written as they are made, so that a run that is cut short leaves what it has:

    tests.txt    what pytest said          bench.json   every figure; `make report` makes pictures of it
    bench.txt    what the benches said
"""

import importlib.util
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.record import Run
from bench.table import terminal_table

ROOT = Path(__file__).parents[1]
TESTS_SHARE = 0.35  # of the time, at most
LAST_SECONDS = 5.0  # to write and print


@dataclass(frozen=True)
class Stage:
    """A call of pytest.

    Attributes:
        output: the file in which what it says is kept.
        seconds: after which it is stopped.
    """

    arguments: tuple[str, ...]
    output: Path
    seconds: float


def main(*, device: str, results: Path, budget: float, smallest: bool) -> int:
    """Run it all.

    Args:
        results: folder for the files.  budget: seconds.
        smallest: only the smallest cases, to see that everything works.

    Returns:
        0 where all tests passed and all benches agreed.
    """
    end = time.monotonic() + budget
    results.mkdir(parents=True, exist_ok=True)
    figures = results / "bench.json"
    figures.unlink(missing_ok=True)
    tests = ["tests/test_flops.py"] if device == "cpu" else ["tests", "-m", "gpu"]
    if importlib.util.find_spec("xdist"):  # they spend their time compiling
        tests += ["-n", "8"]
    stage = Stage((*tests, "-q", "--tb=short", "-rfE", "--color=no"), results / "tests.txt", TESTS_SHARE * budget)
    tested = _run(stage)
    outcome = _outcome(stage.output.read_text(), tested)
    print(f"tests: {outcome['summary']}", *outcome["failed"], sep="\n  ", flush=True)

    left = end - time.monotonic() - LAST_SECONDS
    options = ["--benchmark", "--device", device, "--results", str(figures), "--budget", f"{0.9 * left:.0f}"]
    if smallest:
        options.append("--smallest")
    benched = _run(Stage(("bench", *options, "-q", "--tb=short", "--color=no"), results / "bench.txt", left))

    if not figures.exists():
        print((results / "bench.txt").read_text()[-3000:])
        return 1
    run = Run.read(figures)
    run.tests = outcome
    run.write(figures)
    print(terminal_table(run))
    print(f"tests: {outcome['summary']}; {len(run.rows)} rows in {figures}{'' if run.complete else ', cut short'}")
    return int(tested != 0 or benched not in (0, None))


def _run(stage: Stage) -> int | None:
    """pytest's exit status, None where its time was over."""
    command = [sys.executable, "-m", "pytest", *stage.arguments, "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    with stage.output.open("w") as output:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=stage.seconds
            )
        except subprocess.TimeoutExpired:
            return None
    return done.returncode


def _outcome(output: str, status: int | None) -> dict[str, object]:
    """What the tests came to, in pytest's own words."""
    lines = output.strip().splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    summary = lines[-1].strip("= ") if lines else "nothing was said"
    if status is None:
        summary = f"cut short after {len(lines)} lines"
    return {"status": status, "failed": failed, "summary": summary}
