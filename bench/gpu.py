"""`make gpu`: everything that only a GPU can show, in one go, the most important first.

For a machine where nothing can be fetched, from a bare checkout, and for a limited time: the tests that matter most,
plain products, whole models, kernels against rivals, where a step's time goes, what launching costs; then all the rest,
until the time is over. A stage that takes longer than it may is stopped, so that none takes the time of a later one;
what it leaves is the next one's. Every bench file has a process of its own. One that dies, hangs, or cannot go on is
followed by another, which takes up the run where it stopped (`bench/attempts.py`). Whole at every moment are

    tests.txt    what pytest said          bench.json   every figure; `make report` makes pictures of it
    bench.txt    what the benches said
"""

import importlib.util
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import commit
from bench.attempts import CANNOT_GO_ON, STOPPED, TIME_OVER
from bench.extension import Extension
from bench.process import ROOT, Servers
from bench.record import BEGUN, LOST, OURS, Run
from bench.table import beside, terminal_table

BENCHES = Path("bench")
SECONDS = 540.0  # that the stages' ends are of; with another budget they change alike
LAST_SECONDS = 5.0  # to write and print
LEAST_SECONDS = 8.0  # in which a process can do something
STOP_SECONDS = 4.0  # for the provider that a bench is at when its time is over, or for a summary of the tests
SILENCE = {"goals": 75.0, "all": 120.0, "rest": 200.0, "tests": 90.0}  # without news; torch.compile takes its time
EXTENSION_SECONDS = {"roof": 10.0, "more tests": 60.0, "pretraining": 60.0}  # that are waited for it
MOST_BYTES = 8 << 20  # of what benches or tests say
TESTS = "gpu", "attention", "layer_norm", "embedding", "cross_entropy", "subset", "ffn"
LAST_TESTS = ("linear",)  # of a kernel that nobody calls until `make tune` has found it to be faster
DONE, FAILED, CUT, BROKEN = "done", "failed", "the time was over", "broken"
NOT_BEGUN = "not begun"
ENDS = {0: DONE, 1: FAILED, 5: DONE}  # by pytest's exit status; 5: there was nothing to do


@dataclass(frozen=True)
class Stage:
    """A bench file, or tests.

    Attributes:
        until: seconds from the start, of SECONDS, at which it is stopped.
        part: "goals", "rest" or "all" of a bench's cases; or "tests".
        tests: beginnings of their files' names; none for all that no other stage has.
    """

    name: str
    until: float
    part: str = "goals"
    tests: tuple[str, ...] = ()


_PRODUCTS = "linear", "linear_int8", "quantize"
_REST = "inference", "roof", "layer_norm", "ffn", "cross_entropy", "attention", "model"
STAGES = (
    Stage("tests", 120, "tests", TESTS),
    Stage("roof", 165),
    Stage("model", 335),
    Stage("attention", 390),
    Stage("inference", 430),
    Stage("layer_norm", 445),
    Stage("ffn", 460),
    Stage("cross_entropy", 475),
    Stage("breakdown", 503),
    Stage("host", 518),
    Stage("first_step", 540),
    # in what time is left
    Stage("more tests", 540, "tests"),
    *(
        Stage(name, 540, "all")
        for name in ("pretraining", "finetuning", "embedding", *_PRODUCTS, "input", "memory", "quality")
    ),
    *(Stage(name, 540, "rest") for name in _REST),
    Stage("last tests", 540, "tests", LAST_TESTS),
)


class End(NamedTuple):
    """How a call of pytest ended: with a status; or it was stopped, and why."""

    status: int | None
    why: str = ""


def main(*, device: str, results: Path, budget: float, smallest: bool, stages: Sequence[Stage] = STAGES) -> int:
    """Run it all.

    Args:
        results: folder for the files.  budget: seconds.
        smallest: only the smallest cases, to see that everything works.

    Returns:
        0 where all tests passed that were run, and fastbert did all that it was asked for; of the smallest cases, where
        they were all run.
    """
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    for name in ("bench.json", "bench.txt", "tests.txt"):
        (results / name).unlink(missing_ok=True)
    lease = Lease(device=device, results=results, budget=budget, smallest=smallest)
    run = Run.here(device, sys.argv)
    unknown = device == "cuda" and run.commit == commit.UNKNOWN
    if unknown:
        print(NOBODY_KNOWS, file=sys.stderr, flush=True)
    run.write(lease.figures)
    extension = Extension(build=device == "cuda")
    try:
        states = [lease.stage(stage, extension) for stage in stages]
    finally:
        lease.servers.stop()
        extension.stop()
    run = Run.read(lease.figures)
    run.finish()
    run.complete = set(states) <= {DONE, FAILED}
    run.nodes = {node: state for node, state in run.nodes.items() if state == LOST}
    run.write(lease.figures)
    for path in (lease.words, lease.tests):
        _shorten(path)
    own = [f"{row.label}: {name}: {why}" for row in run.rows for name, why in row.failures.items() if _bad(name, why)]
    lost = [f"{node}: its process ended, or said nothing, before a provider was tried" for node in run.nodes]
    tests = run.tests or {"status": None, "failed": [], "summary": "none"}
    more = [line for bench in dict.fromkeys(row.bench for row in run.rows) for line in beside(run, bench)]
    print(terminal_table(run), *more, *_lines(run.stages), sep="\n")
    print(*own, *lost, *tests["failed"], *([NOBODY_KNOWS] if unknown else []), sep="\n")
    print(f"tests: {tests['summary']}; {len(run.rows)} rows in {lease.figures}{'' if run.complete else ', cut short'}")
    return int(bool(own or lost or {FAILED, BROKEN} & set(states)) or (smallest and not run.complete))


NOBODY_KNOWS = """
*** NOBODY WILL KNOW WHAT WAS MEASURED: no COMMIT in the environment, no git, and no file .commit.
*** `make commit-file` writes it where git is: take it along. Or COMMIT=... make gpu.
"""


class Lease:
    """Some time on a machine, and what is made of it.

    Args:
        budget: seconds.
    """

    def __init__(self, *, device: str, results: Path, budget: float, smallest: bool) -> None:
        self._start, self._seconds = time.monotonic(), budget - LAST_SECONDS
        self._device, self._smallest = device, smallest
        self.figures, self.words, self.tests = (
            results / f"{name}" for name in ("bench.json", "bench.txt", "tests.txt")
        )
        self.servers = Servers(fork=device == "cpu")

    def stage(self, stage: Stage, extension: Extension) -> str:
        """Run it, print and keep how it ended."""
        if word := extension.wait(EXTENSION_SECONDS.get(stage.name, 0.0)):
            print(word, flush=True)
        before = time.monotonic() - self._start
        end = self._start + self._seconds * min(1.0, stage.until / SECONDS)
        if stage.part == "tests" and stage != STAGES[0] and self._device == "cpu":
            state, said = DONE, "only on a GPU"
        elif end - time.monotonic() < LEAST_SECONDS:
            state, said = CUT, NOT_BEGUN
        elif stage.part == "tests":
            state, said = self._test(stage, end)
        else:
            state, said = self._bench(stage, end)
        after = time.monotonic() - self._start
        name = f"{stage.name}, the rest" if stage.part == "rest" else stage.name
        run = Run.read(self.figures)
        run.stages.append(
            {"stage": name, "from": round(before, 1), "to": round(after, 1), "ended": state, "said": said}
        )
        run.write(self.figures)
        print(_line(run.stages[-1]), flush=True)
        return state

    def _bench(self, stage: Stage, end: float) -> tuple[str, str]:
        """Processes, one after the other, until one comes to its end."""
        rows, over, state = self._measured(), self._unmeasured(), CUT
        offset, ends = _size(self.words), 0
        while end - time.monotonic() > LEAST_SECONDS:
            blamed = self._blamed()
            seconds = end - time.monotonic() - STOP_SECONDS
            arguments = [
                *(str(BENCHES / f"bench_{stage.name}.py"), "--benchmark", "--resume", "--part", stage.part),
                *("--device", self._device, "--results", str(self.figures), "--budget", f"{seconds:.1f}"),
                *("-q", "--tb=short", *(["--smallest"] if self._smallest else [])),
            ]
            ended = self._call(arguments, self.words, stage, end, [self.figures])
            if ended.status in ENDS:
                state = ENDS[ended.status]
                break
            if ended.why == CUT:
                self._forgive()
                break
            ends += 1
            if not self._goes_on(blamed, ended):
                state = BROKEN
                break
        text = _from(self.words, offset)
        if state == DONE and (self._unmeasured() > over or TIME_OVER in text):
            state = CUT
        skipped = [why for why in re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.MULTILINE) if why != TIME_OVER]
        missing = [why for why in dict.fromkeys(skipped) if "empty parameter set" not in why]
        said = [f"{self._measured() - rows} figures", *missing]
        said += [f"{ends} processes ended before their time"] if ends else []
        said += ["see bench.txt"] if state in (FAILED, BROKEN) else []
        return state, ", ".join(said)

    def _test(self, stage: Stage, end: float) -> tuple[str, str]:
        files = _test_files(stage.tests) if self._device == "cuda" else ["tests/test_flops.py"]
        arguments = [*files, "-v", "--tb=short", "-rfE", *(["-m", "gpu"] if self._device == "cuda" else [])]
        if importlib.util.find_spec("xdist") and self._device == "cuda":  # they spend their time compiling
            arguments += ["-n", str(max(1, (os.cpu_count() or 1) - 2))]
        offset = _size(self.tests)
        ended = self._call(arguments, self.tests, stage, end - STOP_SECONDS, [self.tests])
        outcome = _outcome(_from(self.tests, offset), ended)
        said = str(outcome["summary"])
        run = Run.read(self.figures)
        if run.tests is not None:
            outcome = {
                "status": run.tests["status"] or outcome["status"],
                "failed": [*run.tests["failed"], *outcome["failed"]],
                "summary": f"{run.tests['summary']}; {stage.name}: {said}",
            }
        run.tests = outcome
        run.write(self.figures)
        state = CUT if ended.why == CUT else ENDS.get(ended.status, BROKEN)
        return (FAILED if state == CUT and outcome["failed"] else state), said

    def _call(self, arguments: Sequence[str], output: Path, stage: Stage, end: float, news: Sequence[Path]) -> End:
        """pytest, in a process of its own, until `end`, and as long as one of the files changes now and then."""
        tests = stage.part == "tests"
        arguments = [
            *arguments,
            "--color=no",
            "-p",
            "no:cacheprovider",
            *([] if tests else ["-p", "pytest_benchmark.plugin"]),
        ]
        variables = {"OMP_NUM_THREADS": "1"} if tests else {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # some take seconds
        server, begun, why = self.servers.take(), time.time(), ""
        server.call(arguments, output, variables)
        self.servers.prepare()
        while (status := server.status(0.1)) is None and not why:
            begun = begun if server.ready else time.time()
            changed = max(begun, *map(_changed, news))
            if time.monotonic() >= end:
                why = CUT
            elif time.time() - changed > SILENCE[stage.part]:
                why = f"no news for {SILENCE[stage.part]:.0f} s"
        if status is not None:
            self.servers.give_back(server)
            return End(status)
        if tests:
            server.interrupt()
            server.status(STOP_SECONDS)
        server.stop()
        return End(None, why)

    def _goes_on(self, blamed: set[str], ended: End) -> bool:
        """Whether another process would come further than one that died: there is something that it will not try."""
        if ended.status == CANNOT_GO_ON or self._blamed() - blamed:
            return True
        run = Run.read(self.figures)
        begun = [node for node, state in run.nodes.items() if state == BEGUN]
        run.nodes |= dict.fromkeys(begun, LOST)
        run.write(self.figures)
        return bool(begun)

    def _blamed(self) -> set[str]:
        """What processes were at as they ended."""
        run = Run.read(self.figures)
        stopped = {f"{row.label}: {name}" for row in run.rows for name, why in row.failures.items() if why == STOPPED}
        return stopped | run.uncaptured.keys()

    def _forgive(self) -> None:
        """What a process was at as its time was over is not to blame."""
        run = Run.read(self.figures)
        for row in run.rows:
            row.failures |= {name: TIME_OVER for name, why in row.failures.items() if why == STOPPED}
        run.uncaptured = {name: why for name, why in run.uncaptured.items() if why != STOPPED}
        run.nodes = {node: state for node, state in run.nodes.items() if state != BEGUN}
        run.write(self.figures)

    def _measured(self) -> int:
        return sum(len(row.timings) or bool(row.values) for row in Run.read(self.figures).rows)

    def _unmeasured(self) -> int:
        return sum(why == TIME_OVER for row in Run.read(self.figures).rows for why in row.failures.values())


def _test_files(beginnings: tuple[str, ...]) -> list[str]:
    """Files of tests whose names begin so, in that order; without beginnings, all that no stage has."""
    named = beginnings or (*TESTS, *LAST_TESTS)
    files = {name: sorted((ROOT / "tests").glob(f"test_{name}*.py")) for name in named}
    chosen = [path for paths in files.values() for path in paths]
    if not beginnings:
        chosen = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if path not in chosen]
    return [path.relative_to(ROOT).as_posix() for path in chosen]


def _outcome(output: str, ended: End) -> dict[str, Any]:
    """What the tests came to: in pytest's own words, or counted where it was stopped."""
    lines = output.strip().splitlines()
    failed = [line for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    summary = lines[-1].strip("= ") if lines else "nothing was said"
    if ended.status is None:
        progress = [line for line in lines if re.search(r"\[ *\d+%\]", line)]
        seen = [(found[0], line) for line in progress if (found := re.findall(r"\b(PASSED|FAILED|ERROR)\b", line))]
        counts = (sum(it == word for it, _ in seen) for word in ("PASSED", "FAILED", "ERROR"))
        items = re.findall(r"(\d+) items?\b", output)
        of_all = f" of {items[-1]}" if items else ""
        summary = f"stopped, {ended.why}, {{}}{of_all} passed, {{}} failed, {{}} errors".format(*counts)
        failed = failed or [line for word, line in seen if word != "PASSED"]
    return {"status": ended.status, "failed": failed, "summary": summary}


def _bad(name: str, why: str) -> bool:
    """Whether a failure is fastbert's, or a wrong result."""
    harmless = why in (TIME_OVER, "needs a GPU") or re.fullmatch(r"has no \w+|fastbert\.\w+ is not here", why)
    return (name.startswith(OURS) and not harmless) or why.startswith("wrong: ")


def _line(stage: Mapping[str, Any]) -> str:
    """Seconds from the start, and how it ended."""
    return f"{stage['from']:5.0f} s to {stage['to']:4.0f} s  {stage['stage']}: {stage['ended']}, {stage['said']}"


def _lines(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that were begun, and the names of the others."""
    others = ", ".join(stage["stage"] for stage in stages if stage["said"] == NOT_BEGUN)
    begun = [_line(stage) for stage in stages if stage["said"] != NOT_BEGUN]
    return [*begun, *([f"{NOT_BEGUN}: {others}"] if others else [])]


def _changed(path: Path) -> float:
    """When, by the wall clock."""
    return path.stat().st_mtime if path.exists() else 0.0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _from(path: Path, offset: int) -> str:
    """What a file has from some byte on."""
    return path.read_bytes()[offset:].decode(errors="replace") if path.exists() else ""


def _shorten(path: Path) -> None:
    """To its end, where it is too long to be fetched."""
    if _size(path) > MOST_BYTES:
        path.write_bytes(path.read_bytes()[-MOST_BYTES:])
