"""Agree, then time: every bench goes through here, on the very tensors that are timed.

A provider is one way of computing something: fastbert's, PyTorch's, another library's. All providers of a case get
equal inputs; one that is wrong is reported and not timed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import clock
from bench.attempts import Attempts, NotApplicableError
from bench.record import OURS, Row, Timing, Work

Step = clock.Step
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}  # of the largest value that is expected
OTHERS = 8  # times as much: PyTorch adds up a bias's gradient in bfloat16 on a CPU, and is off by 0.15


class Inputs(NamedTuple):
    """What a function is called with.

    Attributes:
        leaves: tensors that get gradients.  rest: what comes after them.
    """

    leaves: tuple[Tensor, ...]
    rest: tuple[Any, ...] = ()


def _as_it_is(t: Tensor) -> Tensor:
    return t


@dataclass(frozen=True)
class Provider:
    """One way of computing an operator.

    Attributes:
        function: of the leaves and the rest to one tensor.
        prepare: a leaf, or the output's gradient, in the layout that the function wants; not timed.
        finish: back again, what it returns or a gradient of a leaf; not timed.
        graph: whether to try it in a CUDA graph.
    """

    function: Callable[..., Tensor]
    prepare: Callable[[Tensor], Tensor] = _as_it_is
    finish: Callable[[Tensor], Tensor] = _as_it_is
    graph: bool = True


class Ready(NamedTuple):
    """A provider with its inputs.

    Attributes:
        steps: what to time; one for each set of inputs on a GPU, of which a CPU uses the first.
        wrong: how its results differ from what was expected, or None.
        graph: whether to capture the steps in a CUDA graph, if they can be.
        only: whether without a graph there is nothing to time.
        work: the row's, where only a provider can tell.
        host: whether a step ends with its result on the host, so that the host's clock is right on a GPU, too.
    """

    steps: list[Step]
    wrong: str | None = None
    graph: bool = False
    only: bool = False
    work: Work | None = None
    host: bool = False


class Figures(NamedTuple):
    """What a provider measured by itself: seconds, by the host's clock unless they are of a graph, or other values."""

    times: Sequence[float] = ()
    values: Mapping[str, float] = {}
    how: str = "clock"


class Bench:
    """What a bench is given: it checks, measures where --benchmark is on, and keeps the row.

    Args:
        measure: whether to time, or only to check.  compiles: whether torch.compile is among the providers.
        timer: the host's clock, in seconds.
        seconds: how long a provider of a case is timed.
        turns: rounds of all providers by the host's clock, at least.
    """

    def __init__(
        self,
        benchmark: BenchmarkFixture | None,
        attempts: Attempts,
        *,
        device: str,
        measure: bool,
        compiles: bool,
        timer: Callable[[], float],
        seconds: float,
        turns: int = clock.ROUNDS[0],
    ) -> None:
        self.device = device
        self.measure = measure
        self.compiles = compiles
        self._benchmark, self._attempts = benchmark, attempts
        self._timer, self.seconds, self._turns = timer, seconds, turns
        self._row: Row | None = None

    def operator(
        self,
        bench: str,
        case: Mapping[str, Any],
        providers: Mapping[str, Provider],
        inputs: Callable[[], Inputs],
        work: Work,
        *,
        exact: Callable[..., Tensor],
        check: Mapping[str, Provider] | None = None,
    ) -> Row:
        """One pass of an operator: case["pass"] is "forward", without gradients, "backward", alone, or "both".

        Args:
            inputs: a fresh set of random inputs, on the bench's device and in case["dtype"].
            exact: the same function in plain PyTorch; called with the leaves in a wider dtype.
            check: the providers to compare with `exact`, where those that are timed drop at random.
        """
        pass_, dtype = case["pass"], case["dtype"]

        @cache
        def tensors() -> tuple[list[Inputs], Tensor, tuple[Tensor, ...]]:
            """Inputs, the output's gradient, and what is expected; made when the first provider asks for them."""
            torch.manual_seed(0)
            first = inputs()
            wide = torch.float64 if dtype == "float32" else torch.float32
            upcast = Inputs(tuple(t.to(wide) for t in first.leaves), first.rest)
            with torch.no_grad():
                y = exact(*upcast.leaves, *upcast.rest)
            dy = torch.randn_like(y).to(first.leaves[0].dtype) if y.ndim else torch.ones_like(y)
            expected = _finished(Provider(exact), upcast, dy.to(wide), pass_)
            more: list[Inputs] = []
            if self.measure and self.device == "cuda":
                a_set = sum(t.nbytes for t in (*first.leaves, *first.rest) if isinstance(t, Tensor))
                more = [inputs() for _ in range(clock.sets_of_inputs(a_set + dy.nbytes) - 1)]
            return [first, *more], dy, expected

        def ready(name: str) -> Ready:
            provider = providers[name]
            them, dy, expected = tensors()
            results = _finished((check or providers)[name], them[0], dy, pass_)
            why = disagreement(results, expected, TOLERANCE[dtype] * (1 if name == OURS else OTHERS))
            return Ready([_step(provider, it, dy, pass_) for it in them], why, provider.graph)

        return self.steps(bench, case, {name: partial(ready, name) for name in providers}, work)

    def steps(
        self, bench: str, case: Mapping[str, Any], providers: Mapping[str, Callable[[], Ready]], work: Work
    ) -> Row:
        """Steps of any kind. Each provider is made ready when its turn comes.

        Raises:
            Exception: fastbert's own, and a failure of the test where a provider is wrong; after the others were
                timed and the row was kept.
        """
        row = self._attempts.row(bench, case, work)
        steps: dict[str, Step] = {}
        times: dict[str, list[float]] = {}

        def do(name: str, make: Callable[[], Ready]) -> str | None:
            ready = make()
            if ready.work is not None:
                row.work = ready.work
            if ready.wrong is not None:
                return f"wrong: {ready.wrong}"
            if self.measure and self.device == "cuda" and not ready.host:
                times[name] = self._on_gpu(row, name, ready)
            else:
                if not ready.host:  # whose check was on that very step
                    ready.steps[0]()
                steps[name] = ready.steps[0]
            return None

        own_error = self._each(row, {name: partial(do, name, make) for name, make in providers.items()})
        if self.measure and steps:
            timings, by_clock = clock.cpu_timings(steps, self._timer, self.seconds, self._turns)
            times |= by_clock
            row.timings.update(timings)
            self._attempts.write(row)
        self._tell_pytest_benchmark(row, times)
        return self._judged(row, own_error)

    def figures(
        self, bench: str, case: Mapping[str, Any], providers: Mapping[str, Callable[[], Figures]], unit: str = ""
    ) -> Row:
        """What providers measure by themselves, where there is more to it than timing a step.

        Raises:
            Exception: likewise.
        """
        row = self._attempts.row(bench, case, unit=unit)

        def do(name: str, make: Callable[[], Figures]) -> None:
            found = make()
            if found.times:
                row.timings[name] = Timing.of(found.times, found.how)
            row.values.update(found.values)

        return self._judged(row, self._each(row, {name: partial(do, name, make) for name, make in providers.items()}))

    def captured(self, name: str, step: Step) -> Step:
        """A provider's step as a CUDA graph, within `figures`; on a CPU the step."""
        if self.device == "cpu" or self._row is None:
            return step
        if why := self._attempts.refused(self._row.bench, name):
            raise NotApplicableError(f"cannot be captured: {why}")
        with self._attempts.capture(self._row, name, only=True):
            replay = clock.captured([step])
            replay()
            torch.cuda.synchronize()
        return replay

    def _each(self, row: Row, providers: Mapping[str, Callable[[], str | None]]) -> Exception | None:
        """fastbert's own error."""
        self._row = row
        errors = {name: self._attempts.make(row, name, do) for name, do in providers.items()}
        return errors.get(OURS)

    def _judged(self, row: Row, own_error: Exception | None) -> Row:
        if own_error is not None:
            raise own_error
        wrong = {name: why for name, why in row.failures.items() if why.startswith("wrong: ")}
        assert not wrong, f"{row.label}: {wrong}"
        return row

    def _on_gpu(self, row: Row, name: str, ready: Ready) -> list[float]:
        """Puts the timing into the row."""
        steps, events, attempts = ready.steps, clock.CudaClock(), self._attempts
        refused = attempts.refused(row.bench, name) if ready.graph else None
        if ready.only and refused:
            raise NotApplicableError(f"cannot be captured: {refused}")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[0]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before

        def run() -> None:
            for step in steps:
                step()

        def timed(run: Step, how: str) -> list[float]:
            times = events.times(run, self.seconds, len(steps))
            row.timings[name] = Timing.of(times, how, peak)
            return times

        if not ready.graph or refused:
            return timed(run, "events")
        if not ready.only and not attempts.met(row.bench, name):
            timed(run, "events")  # what it has if its capture fails
        with attempts.capture(row, name, only=ready.only):
            return timed(clock.captured(steps), "graph")

    def _tell_pytest_benchmark(self, row: Row, times: Mapping[str, list[float]]) -> None:
        """fastbert's times, or the only provider's, as its own; the others' medians beside them."""
        benchmark = self._benchmark
        name = OURS if OURS in times else next(iter(times), None)
        if benchmark is None or (self.measure and name is None):
            return
        if name is None:
            benchmark.pedantic(lambda: None)  # disabled: it was not forgotten
            return
        benchmark.group = row.bench
        replay.load(times[name])
        benchmark.extra_info.update(row.case, provider=name)
        benchmark.extra_info.update({other: timing.median for other, timing in row.timings.items()})
        benchmark.pedantic(replay.step, rounds=len(times[name]))


replay = clock.Replay()


def disagreement(results: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> str | None:
    """How results differ from what was expected, or None if by no more than a share of its largest value."""
    shapes, wanted = ([tuple(t.shape) for t in them] for them in (results, expected))
    if shapes != wanted:
        return f"results are {shapes}, not {wanted}"
    error = largest_error(results, expected)
    if error <= tolerance:
        return None
    return f"off by {error:.1e} of the largest value, more than {tolerance:.1e}"


def largest_error(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of all tensors the largest difference, each relative to the largest value that was expected of it."""
    errors = [0.0]
    for a, b in zip(results, expected, strict=True):
        if b.numel():
            error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)
            errors.append(float(error.nan_to_num(nan=float("inf"))))
    return max(errors)


def _own(provider: Provider, inputs: Inputs, grad: bool) -> tuple[Tensor, ...]:
    return tuple(provider.prepare(t.detach()).detach().requires_grad_(grad) for t in inputs.leaves)


def _step(provider: Provider, inputs: Inputs, dy: Tensor, pass_: str) -> Step:
    leaves = _own(provider, inputs, pass_ != "forward")
    own_dy = provider.prepare(dy) if dy.ndim else dy

    def forward() -> Tensor:
        return provider.function(*leaves, *inputs.rest)

    def gradients(y: Tensor, keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, own_dy.to(y.dtype), retain_graph=keep)

    if pass_ == "forward":
        return torch.no_grad()(forward)
    if pass_ == "both":
        return lambda: gradients(forward(), keep=False)
    y = forward()
    return lambda: gradients(y, keep=True)


def _finished(provider: Provider, inputs: Inputs, dy: Tensor, pass_: str) -> tuple[Tensor, ...]:
    found = _step(provider, inputs, dy, pass_)()
    return tuple(provider.finish(t) for t in (found if isinstance(found, tuple) else (found,)))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile, afresh, whose backward can run more than once."""
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]
    return torch.compile(function, **options)
