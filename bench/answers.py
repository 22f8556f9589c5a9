"""`make tune`: puts the questions of `bench/tune.py` to this GPU.

Each candidate is compared with `fastbert.reference`, on the very tensors that are timed, and those that are right are
timed, at last in turn. One is proposed only where it is faster than the current one beyond the spread of both.

For a machine where nothing can be fetched, and for a limited time. A process of its own does the work: one that hangs
or dies costs a candidate, and the next process goes on behind it. Others compile meanwhile what it will ask for
(`bench/ahead.py`). Whole at every moment are

    tune.json   times of every candidate, or why it has none
    tune.md     the lines to paste, by the place where they belong, and a short table, which is what the screen shows
"""

import contextlib
import os
import subprocess
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench import clock, commit
from bench.ahead import Ahead
from bench.attempts import STOPPED, reason
from bench.gpu import NOBODY_KNOWS
from bench.harness import TOLERANCE, disagreement
from bench.process import ROOT, environment
from bench.record import Recorder, Row, Run, Timing
from bench.table import duration, rate
from bench.tune import Candidate, Question, Ready, questions

SECONDS, TURNS = 0.15, 3  # that a candidate is timed, alone and again in turn with the others
STUCK_SECONDS = 75.0  # without news from the process
STOP_SECONDS = 6.0  # for the candidate that it is at when its time is over
LAST_SECONDS = 2.0  # to print
NO_FIT = "does not fit: "


class WrongError(Exception):
    """A candidate computes something else."""


def ask(question: Question, recorder: Recorder, *, device: str, budget: clock.Budget) -> None:
    """Try its candidates, one after the other, and keep what each came to; then time those that are right in turn.

    What failed before, in a process that died of it perhaps, is not tried again.
    """
    row = _row(recorder.run, question) or Row("tune", question.case, question.work)
    timings, failures = row.timings, row.failures
    if question.candidates.keys() <= timings.keys() | failures.keys():
        return
    try:
        torch.manual_seed(0)
        ready = question.ready()
    except Exception as error:
        failures |= dict.fromkeys(question.candidates, _reason(error))
        recorder.add(row)
        _survive(device)
        return
    steps: dict[str, clock.Step] = {}
    for name, candidate in question.candidates.items():
        if name in failures:
            continue
        if budget.left() <= 0:
            return
        timings.pop(name, None)
        failures[name] = STOPPED
        recorder.add(row)
        try:
            step = _right(question, candidate, ready, device)
            timings |= _timed({name: step}, device)
            steps[name] = step
            del failures[name]
        except Exception as error:
            failures[name] = _reason(error)
        recorder.add(row)
        print(f"{row.label}: {name}: {failures.get(name) or duration(timings[name].median)}", flush=True)
        _survive(device)
    if len(steps) > 1 and budget.left() > 0:
        timings |= _timed(steps, device)
        recorder.add(row)


def _right(question: Question, candidate: Candidate, ready: Ready, device: str) -> clock.Step:
    """What is to be timed of a candidate.

    Raises:
        WrongError: if it does not compute what is expected.
    """

    def step() -> tuple[Tensor, ...]:
        with mock.patch.object(question.module, question.attribute, candidate.replacement):
            return ready.step()

    why = disagreement(step(), ready.expected, TOLERANCE[question.case["dtype"]])
    if why is not None:
        raise WrongError(why)
    return clock.captured([step]) if device == "cuda" else step


def _timed(steps: Mapping[str, clock.Step], device: str) -> dict[str, Timing]:
    """In turn, so that whatever else the machine does, or its clocks, hits all alike."""
    if device == "cpu":  # to see that it works: interpreted kernels are not worth a second round
        once = steps if len(steps) == 1 else {}
        return {name: Timing.of([timeit.timeit(step, number=1)], "clock") for name, step in once.items()}
    events = clock.CudaClock()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, replay in steps.items():
            times[name] += events.times(replay, SECONDS / TURNS)
    return {name: Timing.of(taken, "graph") for name, taken in times.items()}


def _reason(error: Exception) -> str:
    if isinstance(error, WrongError):
        return f"wrong: {error}"
    if isinstance(error, OutOfResources):
        return f"{NO_FIT}{error.name}, {error.required} of {error.limit}"
    return reason(error)


def _survive(device: str) -> None:
    """Where nothing works any more the process ends here, and the next one goes on."""
    if device == "cuda":
        clock.check()


def _row(run: Run, question: Question) -> Row | None:
    return next((row for row in run.rows if row.case == question.case), None)


def right_ones(row: Row) -> dict[str, Timing]:
    """The fastest first."""
    names = [name for name in row.timings if name not in row.failures]
    return {name: row.timings[name] for name in sorted(names, key=lambda name: row.timings[name].median)}


def winner(row: Row, current: str) -> str | None:
    """The fastest of those that beat the current one beyond the spread of both; of all, where that one failed."""
    right = right_ones(row)
    if current in right:
        right = {name: timing for name, timing in right.items() if timing.high < right[current].low}
    return next(iter(right), None)


def page(asked: Sequence[Question], run: Run) -> str:
    """The lines to paste, by place; then a line a question, with its current candidate and the fastest."""
    paste: dict[str, str] = defaultdict(str)
    head = f"{run.name}, {run.date}, {run.commit}", "current", "", "fastest", "", "reached", "faster by", "", "failed"
    lines: list[tuple[str, ...]] = [head]
    for question in asked:
        row = _row(run, question)
        if row is None:
            continue
        right, current, label = right_ones(row), question.current, row.label.removeprefix("tune ")
        won = winner(row, current)
        best = won or next(iter(right), "")
        now = duration(right[current].median) if current in right else "failed"
        then = duration(right[best].median) if best else ""
        faster = f"{right[current].median / right[best].median - 1:.1%}" if current in right else ""
        verdict = "take it" if won else "stays" if best == current else "within the spread" if best else ""
        failed = str(len(row.failures) or "")
        lines.append((label, current, now, best, then, rate(row, best) if best else "", faster, verdict, failed))
        if won:
            line = f"{question.candidates[won].line}  # {run.name}, {run.date}"
            paste[question.place] += f"# {label}: {faster or 'instead of what fails,'} {current}\n{line}\n"
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    places = [f"\n{place}\n\n```python\n{them}```" for place, them in paste.items()]
    title = "Faster than what is there, beyond the spread" if run.device == "cuda" else "A rehearsal: no times to go by"
    return "\n".join([f"# {title}", *places, "\n```", *table, "```\n"])


class Pages(Recorder):
    """A run that is written as it grows, with a page for people."""

    def __init__(self, run: Run, path: Path, asked: Sequence[Question]) -> None:
        super().__init__(run, path)
        self._asked_for = asked

    def add(self, row: Row) -> None:
        super().add(row)
        draft = self.path.with_name("tune.md.part")
        draft.write_text(page(self._asked_for, self.run))
        os.replace(draft, self.path.with_name("tune.md"))


def work(*, device: str, figures: Path, until: float, smallest: bool) -> None:
    """Answer, in this process, what the run in `figures` leaves open; until a time of `time.time`."""
    budget = clock.Budget(until - time.time(), time.monotonic)
    asked = questions(device, smallest)
    recorder = Pages(Run.read(figures), figures, asked)
    # a graph is captured on a stream of its own
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
        for question in asked:
            if budget.left() <= 0:
                return
            ask(question, recorder, device=device, budget=budget)
            if device == "cuda":
                torch.cuda.empty_cache()
    if budget.left() > 0:
        recorder.finish()


def main(*, device: str, results: Path, budget: float, smallest: bool) -> int:
    """Answer all questions; on a CPU in Triton's interpreter.

    Args:
        results: folder for the files.  budget: seconds.
        smallest: only tiny cases, to see that everything works.

    Returns:
        0 where everything worked that was tried and fits the GPU.
    """
    limit = clock.Budget(budget - LAST_SECONDS, time.monotonic)
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    figures, words = results / "tune.json", results / "tune.md"
    words.unlink(missing_ok=True)
    run = Run.here(device, sys.argv)
    unknown = [NOBODY_KNOWS] if device == "cuda" and run.commit == commit.UNKNOWN else []
    print(*unknown, end="", flush=True)
    run.write(figures)
    status: int | None = None
    with Ahead(device, smallest) as ahead:
        while limit.left() > 0:
            before = figures.read_bytes()
            status = _work(device, figures, limit.left(), smallest)
            if status == 0 or figures.read_bytes() == before:
                break
    run = Run.read(figures)
    harmless = (NO_FIT,) if limit.left() > 0 else (NO_FIT, STOPPED)
    failures = [(row.label, name, why) for row in run.rows for name, why in row.failures.items()]
    bad = [": ".join(it) for it in failures if not it[2].startswith(harmless)]
    print(*bad, words.read_text() if words.exists() else "no question was answered", sep="\n")
    print(*unknown, ahead.said(), sep="\n")
    print(f"{len(run.rows)} questions in {figures}{'' if run.complete else ', cut short'}")
    return int(bool(bad) or not run.rows or bool(status) or (device == "cpu" and ahead.failed))


def _work(device: str, figures: Path, seconds: float, smallest: bool) -> int | None:
    """The exit status of a process that does the work, None where it was stopped."""
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    started, end = time.time(), time.monotonic() + seconds
    arguments = device, str(figures), f"{started + seconds - STOP_SECONDS:.1f}", *(["smallest"] if smallest else [])
    process = subprocess.Popen([sys.executable, "-m", "bench.answers", *arguments], cwd=ROOT, env=variables)
    try:
        while time.monotonic() < end and time.time() - max(started, figures.stat().st_mtime) < STUCK_SECONDS:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.2)
        return None
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    device, figures, until, *rest = sys.argv[1:]
    work(device=device, figures=Path(figures), until=float(until), smallest=bool(rest))
