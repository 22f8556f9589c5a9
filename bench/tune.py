"""`make tune`: which tiles, rows and programs the kernels should take on this GPU, the most important question first.

A question is about one answer that a launcher looks up. Candidates are tried in its place: each is compared with
`fastbert.reference`, on the very tensors that are timed, and those that are right are timed, at last in turn. One is
proposed only where it is faster than the current one beyond the spread of both.

For a machine where nothing can be fetched, and for a limited time. A process of its own does the work: one that hangs
or dies costs a candidate, and the next process goes on behind it. Whole at every moment are

    tune.json   times of every candidate, or why it has none
    tune.md     the lines to paste, by the place where they belong, and a short table, which is what the screen shows
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench import clock
from bench.harness import TOLERANCE, disagreement
from bench.record import Recorder, Row, Run, Timing, Work
from bench.shapes import VOCABULARY, tokens_of
from bench.table import duration, rate
from fastbert import functional, reference
from fastbert.kernels import _attention_tiles, _launch, _product, attention, embedding, ffn, layer_norm
from fastbert.kernels._launch import Blocks
from fastbert.kernels._product import Product, Tiles, size_class

ROOT = Path(__file__).parents[1]
TOKENS = 65536
SECONDS, TURNS = 0.15, 3  # that a candidate is timed, alone and again in turn with the others
STUCK_SECONDS = 75.0  # without news from the process
STOP_SECONDS = 6.0  # for the candidate that it is at when its time is over
LAST_SECONDS = 2.0  # to print
STOPPED = "its process was stopped"
NO_FIT = "does not fit: "

# Tiles by what drives the tensor cores, by pass and the largest head_dim, the likeliest winner first; `bench.codegen`
# finds no fault with any. With 128 x 128, or 4 warps, a thread spends fewer instructions on a score; 64 x 64, or 128
# registers, leave room for more programs beside one another.
_TILES = {
    "wgmma": {
        ("fwd", 64): "128x128 w8 s2, 128x64 w4 s2, 64x64 w4 s3, 128x128 w8 s3, 64x128 w4 s2, 128x64 w8 s3 r128,"
        " 128x64 w8 s2 r128, 64x64 w4 s3 r128, 256x64 w8 s3",
        ("dq", 64): "128x128 w8 s1, 128x64 w8 s2, 64x64 w4 s2, 128x64 w8 s1 r128, 128x128 w8 s2, 64x128 w4 s2,"
        " 128x64 w8 s2 r128",
        ("dkdv", 64): "64x128 w8 s2, 64x64 w4 s2, 32x128 w8 s2, 64x128 w8 s3, 64x128 w8 s1",
        ("one_block", 64): "64x64 w4 s1, 128x128 w8 s1",  # 64: what is longer takes two passes
        ("fwd", 128): "128x128 w8 s1, 128x128 w8 s2, 64x64 w4 s2, 128x64 w8 s3",
        ("dq", 128): "128x64 w8 s1, 128x64 w8 s2, 64x64 w4 s1",
        ("dkdv", 128): "32x128 w8 s2, 32x128 w8 s1",
    },
    "tcgen05": {
        ("fwd", 64): "128x128 w8 s2, 128x64 w8 s3, 128x64 w4 s2",
        ("dq", 64): "128x64 w8 s1, 128x128 w8 s1, 64x64 w4 s2",
        ("dkdv", 64): "64x64 w4 s2, 128x64 w8 s2, 64x128 w8 s1",
        ("fwd", 128): "128x64 w8 s3",
        ("dq", 128): "128x64 w8 s1, 64x64 w4 s1",
        ("dkdv", 128): "32x128 w8 s2, 64x64 w8 s1",
    },
    "mma": {
        ("fwd", 64): "128x64 w4 s2, 64x64 w4 s2, 128x32 w4 s3, 64x32 w4 s3",
        ("dq", 64): "64x32 w4 s3, 64x64 w4 s1, 128x32 w8 s2",
        ("dkdv", 64): "32x64 w4 s1",
        ("fwd", 128): "64x64 w4 s2, 128x32 w8 s2",
    },
}


def attention_tiles(chip: _launch.Chip, pass_: str, head_dim: int) -> list[Blocks]:
    """What is tried on a chip, beside what it takes now."""
    names = _TILES[chip.tensor_cores].get((pass_, head_dim), "")
    return [Blocks(*map(int, re.findall(r"\d+", name))) for name in names.split(",") if name]


# By what is looked up and features: rows of a program, or programs on a multiprocessor; and warps of a program
_PAIRS: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {
    ("rows_and_warps", 768): ((1, 1), (4, 1), (4, 2), (2, 2), (8, 4)),
    ("rows_and_warps", 1024): ((1, 1), (4, 2), (4, 1), (2, 2), (4, 4), (8, 4)),
    ("programs_and_warps", 768): ((6, 2), (4, 2), (4, 4)),
    ("programs_and_warps", 1024): ((6, 2), (8, 1), (5, 4), (4, 8)),
    ("_programs_and_warps", 768): ((6, 2), (8, 1), (5, 4)),
    ("_programs_and_warps", 1024): ((4, 4), (4, 8)),
}
_CHUNKS = 64, 16, 128
_FORMS = ("none", True), ("none", False)  # GELU and whether its input is kept: training, inference
_PLAIN_PRODUCTS = (1024, 3072), (768, 2304), (4096, 1024), (3072, 768), (1024, 1024), (768, 768)  # K and N
# Tiles of products, likewise: through TMA, and with pointers, by compute capability
_PRODUCT_TILES: dict[tuple[int, int], tuple[Tiles, ...]] = {
    (9, 0): (
        Tiles(128, 128, 64, 4, 3, programs=2, PARTS=2),
        Tiles(128, 256, 64, 8, 4, PARTS=2),
        Tiles(128, 256, 64, 8, 3, PARTS=2),
        Tiles(128, 256, 64, 8, 4, PARTS=2, GROUP_M=16),
        Tiles(128, 128, 64, 8, 3, programs=2, PARTS=2),
        Tiles(256, 128, 64, 8, 3, PARTS=2),
        Tiles(128, 64, 64, 4, 4, programs=2),
    ),
    (8, 0): (
        Tiles(128, 128, 64, 8, 3),
        Tiles(128, 128, 32, 8, 4),
        Tiles(128, 64, 32, 4, 4),
    ),
}


def product_tiles(chip: _launch.Chip) -> tuple[Tiles, ...]:
    """What is tried on a chip: those of the newest one that is no newer."""
    known = [capability for capability in _PRODUCT_TILES if capability <= chip.capability]
    return _PRODUCT_TILES[max(known)] if known else ()


class Candidate(NamedTuple):
    """What stands in the place of the launcher's answer while it is tried, and the line that makes it the answer."""

    replacement: Any
    line: str


class Ready(NamedTuple):
    """What is timed, and what it has to return."""

    step: Callable[[], tuple[Tensor, ...]]
    expected: Sequence[Tensor]


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        module, attribute: what a launcher looks up.
        place: where a candidate's line belongs.
        candidates: by name, the current one first.
        ready: makes the tensors.
    """

    case: dict[str, Any]
    module: ModuleType
    attribute: str
    place: str
    candidates: dict[str, Candidate]
    ready: Callable[[], Ready]
    work: Work

    @property
    def current(self) -> str:
        return next(iter(self.candidates))


def questions(device: str, smallest: bool) -> list[Question]:
    """The most important first; on a CPU with a few tokens each.

    Args:
        smallest: with a few tokens on a GPU, too; only one question of a kind, one candidate beside the current one.
    """
    small = smallest or device == "cpu"
    attend, norm = partial(_attention, device, small), partial(_layer_norm, device, small)
    product, both = partial(_product_question, device, small), (0.0, 0.1)
    asked = [
        *(attend("fwd", "512", p) for p in both),
        *(attend("one_block", "128", p) for p in both),
        *(attend(pass_, "512", p) for p in both for pass_ in ("dq", "dkdv")),
        *(attend("fwd", "128", p) for p in both),
        *(product(M, N, 4 * N, form, keep) for M in (65536, 16384) for N in (768, 1024) for form, keep in _FORMS),
        *(norm(pass_, N, 0.1) for pass_ in ("forward", "backward") for N in (768, 1024)),
        *(_embedding(device, small, what, N) for N in (768, 1024) for what in ("forward", "programs", "chunk")),
        *(attend(pass_, "wikipedia", 0.1) for pass_ in ("fwd", "dq", "dkdv")),
        *(attend(pass_, "512", 0.1, dtype="float16") for pass_ in ("fwd", "dq", "dkdv")),
        *(attend("fwd", "128", p, head_dim=32) for p in both),
        attend("one_block", "128", 0.1, head_dim=32),
        *(product(M, *shape, None, False) for M in (65536, 16384) for shape in _PLAIN_PRODUCTS),
        *(norm("forward", N, 0.0) for N in (768, 1024)),
        attend("fwd", "squad", 0.0),
        *(attend(pass_, "512", 0.1, head_dim=128) for pass_ in ("fwd", "dq", "dkdv")),
    ]
    if not smallest:
        return asked
    kinds: dict[Any, Question] = {}
    for it in asked:
        two = dict(list(it.candidates.items())[:2])
        kinds.setdefault((it.case["what"], it.case["dropout"]), dataclasses.replace(it, candidates=two))
    return list(kinds.values())


def _attention(
    device: str, small: bool, pass_: str, lengths: str, dropout_p: float, dtype: str = "bfloat16", head_dim: int = 64
) -> Question:
    long = 129 if device == "cuda" else 65  # for two passes
    seqlens = [24 if lengths == "128" else long, 3] if small else tokens_of(lengths, TOKENS)
    T, H, longest = sum(seqlens), 1 if small else 1024 // head_dim, max(seqlens)
    width, chip, answer = max(64, head_dim), _launch.chip(_device(device)), _attention_tiles.blocks

    def ready() -> Ready:
        qkv = _random(T, 3, H, head_dim, device=device, dtype=dtype)
        cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)
        forward = qkv, None, None, cu_seqlens, longest, head_dim**-0.5, False, dropout_p, *_seed(dropout_p, device)
        if pass_ == "fwd":
            return _ready(attention.attention_fwd, reference.attention, forward)
        o, lse = attention.attention_fwd(*forward)
        do = _random(T, H, head_dim, device=device, dtype=dtype)
        return _ready(attention.attention_bwd, reference.attention_backward, (do, *forward[:3], o, lse, *forward[3:]))

    def candidate(blocks: Blocks) -> Candidate:
        numbers = ", ".join(map(str, blocks[:4])) + ("" if blocks.maxnreg is None else f", maxnreg={blocks.maxnreg}")
        return Candidate(
            lambda of, *rest: blocks if of == pass_ else answer(of, *rest), f'"{pass_}": _launch.Blocks({numbers}),'
        )

    case = {"what": f"attention {pass_}", "lengths": lengths, "dropout": dropout_p, "dtype": dtype}
    current = answer(pass_, head_dim, getattr(torch, dtype), longest, chip)
    tiles = current, *(it for it in attention_tiles(chip, pass_, width) if small or longest >= it.M)
    # of a backward both passes are timed, so that neither wins at the other's expense
    tensors, products = (4, 2) if pass_ == "fwd" else (8, 5)
    return Question(
        case | {"head_dim": head_dim, "heads": H, "tokens": T},
        _attention_tiles,
        "blocks",
        f"kernels/_attention_tiles.py: tiles of sm_{chip.capability[0]}{chip.capability[1]}, {width}",
        {_name(blocks): candidate(blocks) for blocks in tiles},
        ready,
        Work(bytes=tensors * T * H * head_dim * 2, flops=2 * products * H * head_dim * sum(n * n for n in seqlens)),
    )


def _layer_norm(device: str, small: bool, pass_: str, hidden: int, dropout_p: float) -> Question:
    M, N = (3, hidden // 16) if small else (TOKENS, hidden)
    attribute = "rows_and_warps" if pass_ == "forward" else "programs_and_warps"

    def ready() -> Ready:
        x, residual = _random(2, M, N, device=device).unbind()
        x_bias, weight, bias = _random(3, N, device=device).unbind()
        dropout = dropout_p, *_seed(dropout_p, device)
        forward = x, x_bias, residual, weight, bias, 1e-12, *dropout
        if pass_ == "forward":
            return _ready(layer_norm.layer_norm_fwd, reference.layer_norm, forward)
        _, mean, rstd = layer_norm.layer_norm_fwd(*forward)
        backward = _random(M, N, device=device), x, x_bias, residual, weight, mean, rstd, *dropout
        return _ready(layer_norm.layer_norm_bwd, reference.layer_norm_backward, backward)

    tensors = 3 if pass_ == "forward" else 5 if dropout_p else 4
    return Question(
        {"what": f"layer_norm {pass_}", "hidden": N, "dropout": dropout_p, "dtype": "bfloat16", "tokens": M},
        layer_norm,
        attribute,
        f"kernels/_norm.py: {attribute}, for layer_norm, by features",
        _pairs(layer_norm, attribute, N, _PAIRS[attribute, hidden], device),
        ready,
        Work(bytes=tensors * M * N * 2),
    )


def _embedding(device: str, small: bool, what: str, hidden: int) -> Question:
    T, N, vocabulary = (3, hidden // 16, 9) if small else (TOKENS, hidden, VOCABULARY)
    attribute = {"forward": "rows_and_warps", "programs": "_programs_and_warps", "chunk": "CHUNK"}[what]

    def ready() -> Ready:
        words, places = torch.randint(0, vocabulary, (T,), device=device), torch.arange(T, device=device)
        ids = words, places % 512, places // 256 % 2, None
        tables = *(_random(rows, N, device=device) for rows in (vocabulary, 512, 2)), None
        weight, bias = _random(2, N, device=device).unbind()
        dropout = 0.1, *_seed(0.1, device)
        forward = *ids, *tables, weight, bias, 0, 1e-12, *dropout
        if what == "forward":
            return _ready(embedding.embedding_fwd, reference.embedding, forward)
        _, mean, rstd = embedding.embedding_fwd(*forward)
        backward = _random(T, N, device=device), *ids, *tables, weight, mean, rstd, 0, *dropout
        return _ready(embedding.embedding_bwd, reference.embedding_backward, backward)

    if what == "chunk":
        candidates = {f"{n} tokens": Candidate(n, f"CHUNK = {n}") for n in (embedding.CHUNK, *_CHUNKS)}
    else:
        candidates = _pairs(embedding, attribute, N, _PAIRS[attribute, hidden], device)
    rows = 2 * T if what == "forward" else 2 * T + vocabulary
    return Question(
        {"what": f"embedding {what}", "hidden": N, "dropout": 0.1, "dtype": "bfloat16", "tokens": T},
        embedding,
        attribute,
        f"kernels/embedding.py: {attribute}" + ("" if what == "chunk" else ", for embedding, by features"),
        candidates,
        ready,
        Work(bytes=rows * N * 2),
    )


def _product_question(
    device: str, small: bool, tokens: int, inner: int, outer: int, activation: str | None, keep_pre: bool
) -> Question:
    """cuBLAS, with the GELU's kernel behind it, against the Triton product."""
    M, K, N = (3, inner // 16, outer // 16) if small else (tokens, inner, outer)
    chip = _launch.chip(_device(device))
    entry = Product(chip.capability, torch.bfloat16, activation, N, K, size_class(M))

    def ready() -> Ready:
        x, weight, bias = (_random(*shape, device=device) for shape in ((M, K), (N, K), (N,)))
        weight *= K**-0.5
        if activation is None:
            return _ready(lambda *given: (functional.linear(*given),), _plain_product, (x, weight, bias))
        return _ready(ffn.linear_gelu_fwd, reference.linear_gelu, (x, weight, bias, activation, keep_pre))

    def candidate(tiles: Tiles) -> Candidate:
        key = f"Product({chip.capability}, torch.bfloat16, {activation!r}, {N}, {K}, {entry.rows})"
        return Candidate({entry: tiles}, f"{key}: {tiles!r},")

    what = "linear" if activation is None else "linear_gelu, kept" if keep_pre else "linear_gelu"
    return Question(
        {"what": what, "tokens": M, "in": K, "out": N, "dtype": "bfloat16", "dropout": 0.0},
        _product,
        "TILES",
        "kernels/_product.py: TILES",
        {"cuBLAS": Candidate({}, ""), **{str(tiles): candidate(tiles) for tiles in product_tiles(chip)}},
        ready,
        Work(flops=2 * M * N * K, products=(("forward", M, K, N),)),
    )


def _plain_product(*given: Tensor) -> tuple[Tensor, ...]:
    return (reference.linear(*given),)


def _pairs(
    module: ModuleType, attribute: str, N: int, others: Sequence[tuple[int, int]], device: str
) -> dict[str, Candidate]:
    """Rows and warps, or programs and warps; the programs by multiprocessor."""
    chip, answer = _launch.chip(_device(device)), getattr(module, attribute)
    by_rows = attribute == "rows_and_warps"

    def programs(M: int, _N: int, chip: _launch.Chip, *_: int, pair: tuple[int, int]) -> tuple[int, int]:
        return max(1, min(M, chip.processors * pair[0])), pair[1]

    def candidate(pair: tuple[int, int]) -> Candidate:
        return Candidate((lambda _N: pair) if by_rows else partial(programs, pair=pair), f"{N}: {pair},")

    if by_rows:
        current = answer(N)
    else:
        sums = (4,) if module is embedding else ()  # two of LayerNorm, two token types
        most, warps = answer(1 << 30, N, chip, *sums)
        current = most // chip.processors, warps
    unit = "rows" if by_rows else "programs"
    return {f"{pair[0]} {unit} w{pair[1]}": candidate(pair) for pair in (current, *others)}


def _name(blocks: Blocks) -> str:
    return "{}x{} w{} s{}".format(*blocks[:4]) + ("" if blocks.maxnreg is None else f" r{blocks.maxnreg}")


def _device(device: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def _random(*shape: int, device: str, dtype: str = "bfloat16") -> Tensor:
    return torch.randn(shape, device=device).to(getattr(torch, dtype))


def _seed(dropout_p: float, device: str) -> tuple[Tensor | None, int]:
    """Seed and stream."""
    return torch.tensor(5, device=device) if dropout_p else None, 3


def _ready(operator: Callable[..., Any], specification: Callable[..., Any], arguments: Sequence[Any]) -> Ready:
    wide = (it.float() if isinstance(it, Tensor) and it.is_floating_point() else it for it in arguments)
    return Ready(torch.no_grad()(partial(operator, *arguments)), specification(*wide))


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
        return {name: Timing.of([timeit.timeit(step, number=1)], "clock") for name, step in steps.items()}
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
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _survive(device: str) -> None:
    """After an illegal access nothing works in a process any more: it ends here, and the next one goes on."""
    if device == "cuda":
        torch.cuda.synchronize()


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
    Run.here(device, sys.argv).write(figures)
    status: int | None = None
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
    print(f"{len(run.rows)} questions in {figures}{'' if run.complete else ', cut short'}")
    return int(bool(bad) or not run.rows or bool(status))


def _work(device: str, figures: Path, seconds: float, smallest: bool) -> int | None:
    """The exit status of a process that does the work, None where it was stopped."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    started, end = time.time(), time.monotonic() + seconds
    arguments = device, str(figures), f"{started + seconds - STOP_SECONDS:.1f}", *(["smallest"] if smallest else [])
    process = subprocess.Popen([sys.executable, "-m", "bench.tune", *arguments], cwd=ROOT, env=environment)
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
