"""Which of a run's rows are shown first, and in which words: the same in pictures and in tables."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

from bench.record import OURS, PRECISIONS, Row, Run, split

SDPA = "transformers SDPA"
COMPILED = "transformers SDPA, compiled"
STOCK = "sentence-transformers"
PATCHED = f"{STOCK}, patched"
MODELS = {"MiniLM": "MiniLM-L6", "base": "BERT-base", "large": "BERT-large"}
LENGTHS = {"full": "no padding", "wikipedia": "Wikipedia lengths", "squad": "SQuAD lengths"}
KERNELS = {
    "attention": "attention",
    "layer_norm": "LayerNorm",
    "embedding": "embedding",
    "ffn": "linear + GELU",
    "feed_forward": "feed-forward",
    "cross_entropy": "cross-entropy",
}
TASKS = {
    "queries": "short queries",
    "sentences": "sentences",
    "passages": "passages, to 256",
    "pairs": "pairs, to 384",
    "unpadded": "no padding, 512",
    "unsorted": "mixed, not sorted",
    "query": "one query",
    "rerank": "rerank passages",
}
_REAL = {"inference": ("squad", "wikipedia", "full"), "training": ("wikipedia", "squad", "full")}
_DTYPES = {
    "cuda": ("bfloat16", "float16", "autocast", "float32"),
    "cpu": ("float32", "bfloat16", "float16", "autocast"),
}


class Gain(NamedTuple):
    """How many times as fast one is as another: of the medians, and how far their spreads allow it to be off."""

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, row: Row, name: str, over: str) -> "Gain":
        ours, theirs = row.timings[name], row.timings[over]
        return cls(theirs.median / ours.median, theirs.low / ours.high, theirs.high / ours.low)

    @property
    def slower(self) -> bool:
        return self.ratio < 1

    def __str__(self) -> str:
        """What is printed below 1 is below 1, too."""
        return f"{min(self.ratio, 0.99) if self.slower else self.ratio:.2f} x"


def telling(run: Run) -> list[Row]:
    """At most eight whole models to show first, whether fastbert looks good in them or not.

    For each model and step the lengths of real text, and for each step a batch without padding: in the dtype that is
    usual on this device, the longest sequences, the largest batch.
    """
    rows = [row for row in run.find("model") if row.case["model"] in MODELS and {OURS, SDPA} <= row.timings.keys()]

    def rank(row: Row) -> tuple[int, ...]:
        case = row.case
        real, usual = _REAL[case["step"]].index(case["lengths"]), _DTYPES[run.device].index(case["dtype"])
        return real, usual, -case["S"], -row.work.tokens, -row.work.flops

    groups = [
        *([row for row in rows if (row.case["model"], row.case["step"]) == key] for key in product(MODELS, _REAL)),
        *([row for row in rows if (row.case["lengths"], row.case["step"]) == ("full", step)] for step in _REAL),
    ]
    chosen: list[Row] = []
    for group in groups:
        chosen += sorted((row for row in group if row not in chosen), key=rank)[:1]
    order = list(MODELS)
    return sorted(chosen, key=lambda row: (order.index(row.case["model"]), row.case["step"]))


def kernels(run: Run) -> dict[tuple[str, str], dict[str, Row]]:
    """By kernel and size, the passes: in this device's usual dtype, of the most tokens, the widest, with dropout."""
    rows = [row for bench in KERNELS for row in run.find(bench) if OURS in row.timings]
    found = {row.case["dtype"] for row in rows}
    usual = next((dtype for dtype in _DTYPES[run.device] if dtype in found), None)
    rows = [row for row in rows if row.case["dtype"] == usual]
    rows.sort(key=lambda row: [row.case.get(key, 0) for key in ("tokens", "heads", "head_dim", "dropout")])
    order = list(KERNELS)
    largest = {(row.bench, str(row.case.get("lengths", row.case.get("hidden"))), row.case["pass"]): row for row in rows}
    by_size: dict[tuple[str, str], dict[str, Row]] = {}
    for bench, size, pass_ in sorted(largest, key=lambda it: (order.index(it[0]), it[1].isalpha(), it[1].zfill(9))):
        by_size.setdefault((bench, size), {})[pass_] = largest[bench, size, pass_]
    return by_size


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


def engines(run: Run) -> list[Row]:
    """Inference from strings on, that sentence-transformers has a time for."""
    rows = [row for row in run.find("inference", **{"from": "strings"}) if STOCK in row.timings]
    models, tasks = list(MODELS), list(TASKS)
    known = [row for row in rows if row.case["model"] in models]
    return sorted(known, key=lambda row: (models.index(row.case["model"]), tasks.index(row.case["task"])))


def precisions(rows: Iterable[Row]) -> list[str]:
    """Those in which something was timed."""
    found = {split(name, row.case["dtype"])[1] for row in rows for name in row.timings}
    return [precision for precision in PRECISIONS if precision in found]


def sides(row: Row, precision: str) -> tuple[str | None, str | None]:
    """The fastest of fastbert's in a precision, and of the others in which nothing is fastbert's."""
    names = [name for name in row.timings if split(name, row.case["dtype"])[1] == precision]
    ours = [name for name in names if name.startswith(OURS)]
    return fastest(row, ours), fastest(row, (name for name in names if name not in (*ours, PATCHED)))


def how_many(row: Row) -> str:
    """What an engine was given."""
    return "1 text" if row.case["texts"] == 1 else f"{row.case['texts']} texts"


def library(name: str) -> str:
    """An engine's, without its precision; what only sentence-transformers has goes by its variant."""
    return split(name, "")[0].removeprefix(f"{STOCK}, ")


def behind(rows: Sequence[Row]) -> str:
    """A word on where another engine is faster than fastbert in the same precision; nothing where none is."""
    found, compared = [], 0
    for row in rows:
        for precision in precisions([row]):
            ours, other = sides(row, precision)
            if not ours or not other:
                continue
            compared += 1
            if (gain := Gain.of(row, ours, other)).slower:
                what = f"{MODELS[row.case['model']]}, {TASKS[row.case['task']]}, {precision}"
                found.append(f"{what}: {gain} of {library(other)}")
    return f"Another is faster in {len(found)} of {compared}: {'; '.join(found)}." if found else ""


def where(run: Run) -> str:
    versions = [f"{name} {run.versions[name]}" for name in ("torch", "triton", "transformers") if name in run.versions]
    return ", ".join([run.name, run.date, *versions, f"commit {run.commit}"])


def losses(rows: Sequence[Row]) -> str:
    """A word on the rows in which fastbert is slower than transformers; nothing where it never is."""
    slower = [(row, gain) for row in rows if (gain := Gain.of(row, OURS, SDPA)).slower]
    if not slower:
        return ""
    text = "Below 1 x fastbert is slower"
    if all(row.case["lengths"] == "full" for row, _ in slower):
        text += ": without padding there is nothing to leave out"
    if all(gain.high > 1 for _, gain in slower):
        text += ". There the spread reaches above 1 x: this run does not settle it"
    return text + "."
