"""Result files: one JSON a run, whole at every moment, and what is computed from its rows.

A run is `machine`, `versions`, `commit`, `command`, `started`, `clocks` before and after, `tests` (of the GPU, where
they ran first), `stages` (of `make gpu`: what ran when, and how it ended), `complete` (whether it came to its end),
`uncaptured` (what cannot be captured in a CUDA graph, and why), `nodes` (tests that were begun, finished, or lost with
their process) and `rows`. A row is one case of one bench:

    bench     "roof", "attention", ..., "model", "breakdown", "memory"
    case      what was measured, as names and plain values
    work      the least that any implementation has to do: see `Work`
    timings   seconds of each provider: see `Timing`
    failures  why a provider has no timing: not installed, not applicable, or wrong
    values    for benches that do not time: bytes of each provider, seconds of each part
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench.commit import commit
from fastbert.terminal import counted

OURS = "fastbert"
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "flash-attn", "liger-kernel"),
    *("sentence-transformers", "tokenizers", "onnxruntime", "onnx", "openvino", "nncf", "ctranslate2"),
)
PRECISIONS = "fp32", "fp16", "bf16", "int8"
BEGUN, FINISHED, LOST = "begun", "finished", "lost"  # what became of a test, in `Run.nodes`
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
Product = tuple[str, int, int, int]  # pass (forward, dgrad, wgrad), tokens, features in, features out


@dataclass(frozen=True)
class Work:
    """What a step has to do at least; every provider of a case is credited with the same.

    Attributes:
        bytes: of memory traffic, each input read once, each output written once.
        flops: of useful arithmetic, two for a multiplication with its addition.
        products: the plain matrix products in it; their measured times are its ceiling.
        tokens, sequences: real ones, without padding.
    """

    bytes: int = 0
    flops: int = 0
    products: tuple[Product, ...] = ()
    tokens: int = 0
    sequences: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of one step: median, 20th and 80th percentile, over `rounds`.

    Attributes:
        how: "graph" (replays of a CUDA graph, between events), "events" (CUDA events), "clock" (of the host).
        peak_bytes: device memory that a step takes beyond what was there before it, where that was measured.
    """

    median: float
    low: float
    high: float
    rounds: int
    how: str
    peak_bytes: int | None = None

    @classmethod
    def of(cls, seconds: Sequence[float], how: str, peak_bytes: int | None = None) -> "Timing":
        """
        Raises:
            ValueError: if there are none.
        """
        if not seconds:
            raise ValueError("no times")
        low, high = (_quantile(seconds, q) for q in (0.2, 0.8))
        return cls(statistics.median(seconds), low, high, len(seconds), how, peak_bytes)


@dataclass
class Row:
    bench: str
    case: dict[str, Any]
    work: Work = Work()
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    unit: str = ""

    @property
    def label(self) -> str:
        return f"{self.bench} " + " ".join(str(value) for value in self.case.values())


@dataclass
class Run:
    """One run of the benches; `write` keeps it."""

    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    command: str
    started: str
    clocks: dict[str, dict[str, str] | None]
    tests: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False
    uncaptured: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def here(cls, device: str, command: Sequence[str] = ()) -> "Run":
        """An empty run on this machine, from now on."""
        return cls(
            machine=_machine(device),
            versions=_versions(),
            commit=commit(),
            command=shlex.join(command),
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            clocks={"before": _clocks(device), "after": None},
        )

    @property
    def device(self) -> str:
        return "cuda" if self.machine["gpu"] else "cpu"

    @property
    def name(self) -> str:
        """The machine, for people."""
        cpu = f"{self.machine['cpu']}, {counted(self.machine['threads'], 'thread')}"
        return self.machine["gpu"] or cpu

    @property
    def date(self) -> str:
        return self.started[:10]

    def write(self, path: Path) -> None:
        """Replace the file by a whole one, so that a run that is cut short leaves what it has."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".part")
        often_empty = "stages", "uncaptured", "nodes"
        shown = {k: v for k, v in vars(self).items() if k != "rows" and (v or k not in often_empty)}
        head = json.dumps(shown, indent=1)
        rows = ",\n".join("  " + json.dumps(_plain(row)) for row in self.rows)
        draft.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n ]\n}}\n')
        os.replace(draft, path)

    def finish(self) -> None:
        self.clocks["after"] = _clocks(self.device)
        self.complete = True

    @classmethod
    def read(cls, path: Path) -> "Run":
        """
        Raises:
            ValueError: if the file holds no run.
        """
        try:
            content = json.loads(path.read_text())
            rows = [_row(row) for row in content.pop("rows")]
            return cls(**content, rows=rows)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no run of the benches: {error}") from error

    def find(self, bench: str, **case: Any) -> list[Row]:
        """The rows of a bench whose case has these values."""
        return [row for row in self.rows if row.bench == bench and case.items() <= row.case.items()]


class Recorder:
    """A run that is written as it grows."""

    def __init__(self, run: Run, path: Path) -> None:
        self.run, self.path = run, path
        self._asked = time.monotonic()

    def add(self, row: Row) -> None:
        """Keep a row, in the place of one of the same case that was measured before."""
        same = [i for i, other in enumerate(self.run.rows) if (other.bench, other.case) == (row.bench, row.case)]
        if same:
            self.run.rows[same[0]] = row
        else:
            self.run.rows.append(row)
        if time.monotonic() - self._asked > 30:
            self.run.clocks["after"] = _clocks(self.run.device)
            self._asked = time.monotonic()
        self.run.write(self.path)

    def mark(self, node: str, state: str | None) -> None:
        """What becomes of a test; None: as if it had not been begun."""
        if state is None:
            self.run.nodes.pop(node, None)
        else:
            self.run.nodes[node] = state
        self.run.write(self.path)

    def finish(self) -> None:
        self.run.finish()
        self.run.write(self.path)


class Roof:
    """A run's measured ceilings. What was faster than one shows that it was measured too low, and is the ceiling."""

    EXCEEDED = "faster than its ceiling as measured: the fastest way that was measured counts as 100 %."

    def __init__(self, run: Run) -> None:
        rows = [row for row in run.find("roof") if row.timings]
        seconds = {id(row): next(iter(row.timings.values())).median for row in rows}
        copies = [row for row in rows if row.case["what"] == "copy"]
        products = [row for row in rows if row.case["what"] == "product"]
        self.copy = max((row.work.bytes / seconds[id(row)] for row in copies), default=None)
        self._products = {(row.case["dtype"], *row.work.products): seconds[id(row)] for row in products}
        self._rates: dict[str, float] = {}
        for row in products:
            dtype = row.case["dtype"]
            self._rates[dtype] = max(self._rates.get(dtype, 0.0), row.work.flops / seconds[id(row)])

    def product(self, dtype: str) -> float | None:
        """FLOP/s of the fastest plain product: the large square one, or one of BERT's. Autocast's are bfloat16's."""
        return self._rates.get("bfloat16" if dtype == "autocast" else dtype)

    def seconds(self, row: Row) -> float | None:
        """The least time that a row's work takes: by these ceilings, or as long as its fastest provider took.

        None where a ceiling is missing.
        """
        bound = self._bound(row)
        return None if bound is None else min([bound, *(timing.median for timing in row.timings.values())])

    def exceeded(self, row: Row) -> bool:
        """Whether a provider was faster than the ceilings allow."""
        bound, seconds = self._bound(row), self.seconds(row)
        return bound is not None and seconds is not None and seconds < bound

    def _bound(self, row: Row) -> float | None:
        """By the ceilings alone.

        By memory: its bytes at the speed of a copy. By arithmetic: its matrix products, each at the time it was
        measured at alone; where one was not, and for all other arithmetic, FLOPs at the speed of the fastest product.
        """
        times: list[float] = []
        work, dtype = row.work, row.case.get("dtype", "")
        if work.bytes:
            if self.copy is None:
                return None
            times.append(work.bytes / self.copy)
        if work.flops:
            alone = [self._products.get((dtype, product)) for product in work.products]
            known = [t for t in alone if t is not None]
            rate = self.product(dtype)
            if known and len(known) == len(alone):
                times.append(sum(known))
            elif rate is None:
                return None
            else:
                times.append(work.flops / rate)
        return max(times) if times else None

    def share(self, row: Row, provider: str) -> float | None:
        """Of the ceiling: 1 is what this machine was seen to reach."""
        seconds = self.seconds(row)
        return None if seconds is None else seconds / row.timings[provider].median

    def percent(self, row: Row, provider: str) -> str:
        """The share for people, with a star where the ceiling was exceeded; nothing where there is none."""
        share = self.share(row, provider)
        return "" if share is None else f"{share:.0%}{'*' if self.exceeded(row) else ''}"

    def utilisation(self, row: Row, provider: str) -> float | None:
        """Useful FLOP/s of a model over those of the fastest product: MFU against what was measured."""
        rate = self.product(row.case.get("dtype", ""))
        return None if rate is None else row.work.flops / row.timings[provider].median / rate


def split(name: str, dtype: str) -> tuple[str, str]:
    """A provider's name without its precision, and that: the case's dtype where the name says none."""
    library, _, last = name.rpartition(" ")
    return (library, last) if last in PRECISIONS else (name, dtype)


def speedup(row: Row, over: str) -> float | None:
    """How many times as fast fastbert is as another provider of the same case."""
    if OURS not in row.timings or over not in row.timings:
        return None
    return row.timings[over].median / row.timings[OURS].median


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    i = int(place)
    return ordered[i] + (place - i) * (ordered[min(i + 1, len(ordered) - 1)] - ordered[i])


def _plain(row: Row) -> dict[str, Any]:
    """Without what is empty."""
    content = asdict(row)
    content["work"] = {key: value for key, value in content["work"].items() if value}
    for timing in content["timings"].values():
        if timing["peak_bytes"] is None:
            del timing["peak_bytes"]
    return {key: value for key, value in content.items() if value}


def _row(content: dict[str, Any]) -> Row:
    work = content.pop("work", {})
    work["products"] = tuple(tuple(product) for product in work.get("products", ()))
    timings = {name: Timing(**timing) for name, timing in content.pop("timings", {}).items()}
    return Row(**{"case": {}, **content}, work=Work(**work), timings=timings)


def _machine(device: str) -> dict[str, Any]:
    machine: dict[str, Any] = {"cpu": _cpu(), "threads": torch.get_num_threads(), "gpu": None}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine |= {
            "gpu": properties.name,
            "capability": [properties.major, properties.minor],
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return machine


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
        versions["driver"] = (_nvidia_smi("driver_version") or ["unknown"])[0]
    return versions


def _clocks(device: str) -> dict[str, str] | None:
    """What the GPU reports of itself; None on a CPU, which reports nothing."""
    values = _nvidia_smi(",".join(_CLOCKS)) if device == "cuda" else None
    return dict(zip(_CLOCKS, values, strict=True)) if values else None


def _nvidia_smi(query: str) -> list[str] | None:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    done = _output(command)
    return [value.strip() for value in done.splitlines()[0].split(",")] if done else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
