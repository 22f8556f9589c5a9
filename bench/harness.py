"""Agree, then time: every bench goes through here, on the very tensors that are timed.

A provider is one way of computing something: fastbert's, PyTorch's, another library's. All providers of a case get
equal inputs; one that is wrong is reported and not timed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench import clock
from bench.record import OURS, Recorder, Row, Timing, Work

Step = clock.Step
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}  # of the largest value that is expected
OTHERS = 8  # times as much: PyTorch adds up a bias's gradient in bfloat16 on a CPU, and is off by 0.15


class NotApplicableError(Exception):
    """A provider cannot do this case; the message says why."""


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
        graph: whether it can be captured in a CUDA graph.
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
        graph: whether to capture the steps in a CUDA graph.
    """

    steps: list[Step]
    wrong: str | None = None
    graph: bool = False


class Bench:
    """What a bench is given: it checks, measures where --benchmark is on, and keeps the row.

    Args:
        measure: whether to time, or only to check.  compiles: whether torch.compile is among the providers.
        timer: the host's clock, in seconds.
        seconds: how long a provider of a case is timed.
    """

    def __init__(
        self,
        benchmark: BenchmarkFixture | None,
        recorder: Recorder | None,
        *,
        device: str,
        measure: bool,
        compiles: bool,
        timer: Callable[[], float],
        budget: clock.Budget,
        seconds: float,
    ) -> None:
        self.device = device
        self.measure = measure
        self.compiles = compiles
        self._benchmark, self._recorder = benchmark, recorder
        self._timer, self._budget, self._seconds = timer, budget, seconds

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

        def ready(name: str) -> Ready:
            provider = providers[name]
            results = _finished((check or providers)[name], first, dy, pass_)
            why = disagreement(results, expected, TOLERANCE[dtype] * (1 if name == OURS else OTHERS))
            return Ready([_step(provider, them, dy, pass_) for them in (first, *more)], why, provider.graph)

        return self.steps(bench, case, {name: partial(ready, name) for name in providers}, work)

    def steps(
        self, bench: str, case: Mapping[str, Any], providers: Mapping[str, Callable[[], Ready]], work: Work
    ) -> Row:
        """Steps of any kind. Each provider is made ready when its turn comes.

        Raises:
            Exception: fastbert's own, and a failure of the test where a provider is wrong; after the others were
                timed and the row was kept.
        """
        steps: dict[str, list[Step]] = {}
        timings: dict[str, Timing] = {}
        times: dict[str, list[float]] = {}
        failures: dict[str, str] = {}
        own_error: Exception | None = None
        for name, make in providers.items():
            if self._budget.left() <= 0:
                failures[name] = "not measured: the time was over"
                continue
            ready: Ready | None = None  # before the next one takes its memory
            try:
                ready = make()
                if ready.wrong is not None:
                    failures[name] = f"wrong: {ready.wrong}"
                elif self.measure and self.device == "cuda":
                    timings[name], times[name] = self._on_gpu(ready)
                else:
                    ready.steps[0]()
                    steps[name] = ready.steps
            except NotApplicableError as error:
                failures[name] = str(error)
            except Exception as error:  # another library, at a size that it was not made for, is no reason to stop
                failures[name] = f"{type(error).__name__}: {_first_line(error)}"
                own_error = error if name == OURS else own_error
        if self.measure and steps:
            first = {name: them[0] for name, them in steps.items()}
            timings, times = clock.cpu_timings(first, self._timer, self._seconds)
        row = Row(bench, dict(case), work, timings, failures)
        if self.measure:
            self.keep(row)
        self._tell_pytest_benchmark(row, times)
        if own_error is not None:
            raise own_error
        wrong = {name: why for name, why in failures.items() if why.startswith("wrong: ")}
        assert not wrong, f"{row.label}: {wrong}"
        return row

    def keep(self, row: Row) -> Row:
        """A row that was made elsewhere."""
        if self._recorder is not None:
            self._recorder.add(row)
        return row

    def _on_gpu(self, ready: Ready) -> tuple[Timing, list[float]]:
        steps, events = ready.steps, clock.CudaClock()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps[0]()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        if ready.graph:
            times, how = events.times(clock.captured(steps), self._seconds, len(steps)), "graph"
        else:

            def run() -> None:
                for step in steps:
                    step()

            times, how = events.times(run, self._seconds, len(steps)), "events"
        return Timing.of(times, how, peak), times

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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
