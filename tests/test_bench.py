"""The harness of the benches, without a GPU: what is wrong is not timed, units, medians, budgets, files."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

from bench import clock, gpu
from bench.bench_breakdown import STEPS, idle, part_of, parts_of_kernels
from bench.harness import Bench, Inputs, NotApplicableError, Provider, Ready, disagreement
from bench.record import OURS, Recorder, Roof, Row, Run, Timing, Work, speedup
from bench.rivals import installed, math_attention, sdpa_backends
from bench.shapes import batch_of, tokens_of
from bench.table import duration, rate, terminal_table
from fastbert.packing import Packing

ROOT = Path(__file__).parents[1]
CASE = {"pass": "forward", "dtype": "float32"}


class FakeBenchmark:
    """What the harness uses of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.rounds: list[int] = []

    def pedantic(self, function: Callable[[], Any], rounds: int = 1) -> None:
        function()
        self.rounds.append(rounds)


def make_bench(path: Path, *, timer: Callable[[], float] = time.perf_counter, budget: float | None = None) -> Bench:
    recorder = Recorder(Run.here("cpu"), path)
    return Bench(
        FakeBenchmark(),  # type: ignore[arg-type]
        recorder,
        device="cpu",
        measure=True,
        compiles=False,
        timer=timer,
        budget=clock.Budget(budget, time.monotonic),
        seconds=0.0,
    )


def double(x: Tensor) -> Tensor:
    return 2 * x


def wrong_in_one_place(x: Tensor) -> Tensor:
    return torch.cat([2 * x.flatten()[:-1], 2.1 * x.flatten()[-1:]]).view_as(x)


def not_a_number(x: Tensor) -> Tensor:
    return 2 * x + torch.full_like(x, float("nan"))


def fails(x: Tensor) -> Tensor:
    raise RuntimeError("out of registers\nand a long story")


def not_here(x: Tensor) -> Tensor:
    raise NotApplicableError("is not installed")


def ones() -> Inputs:
    return Inputs((torch.ones(4, 5),))


def measure(bench: Bench, case: dict[str, Any] = CASE, **functions: Callable[[Tensor], Tensor]) -> Row:
    providers = {name: Provider(function) for name, function in functions.items()}
    return bench.operator("double", case, providers, ones, Work(bytes=160), exact=double)


@pytest.mark.parametrize("pass_", ["forward", "backward", "both"])
@pytest.mark.parametrize("wrong", [wrong_in_one_place, not_a_number])
def test_a_wrong_provider_is_reported_and_not_timed(wrong: Any, pass_: str, tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "run.json")
    if wrong is not_a_number and pass_ != "forward":
        wrong = partial(torch.pow, exponent=2.5)
    with pytest.raises(AssertionError, match="rival"):
        measure(bench, CASE | {"pass": pass_}, fastbert=double, rival=wrong, other=double)
    (row,) = Run.read(tmp_path / "run.json").rows
    assert set(row.timings) == {"fastbert", "other"}
    assert row.failures["rival"].startswith("wrong: off by")


def test_fastbert_when_wrong_is_not_timed_either(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="fastbert"):
        measure(make_bench(tmp_path / "run.json"), fastbert=wrong_in_one_place, rival=double)
    (row,) = Run.read(tmp_path / "run.json").rows
    assert set(row.timings) == {"rival"}


def test_another_librarys_failure_is_reported(tmp_path: Path) -> None:
    row = measure(make_bench(tmp_path / "run.json"), fastbert=double, broken=fails, absent=not_here)
    assert row.failures == {"broken": "RuntimeError: out of registers", "absent": "is not installed"}
    assert Run.read(tmp_path / "run.json").rows == [row]


def test_fastberts_own_failure_is_raised_after_the_others_were_timed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of registers"):
        measure(make_bench(tmp_path / "run.json"), fastbert=fails, rival=double)
    (row,) = Run.read(tmp_path / "run.json").rows
    assert set(row.timings) == {"rival"}


def test_where_providers_draw_their_twins_without_dropout_are_compared(tmp_path: Path) -> None:
    providers = {OURS: Provider(partial(torch.dropout, p=0.5, train=True))}
    arguments = ("drop", CASE, providers, ones, Work())
    bench = make_bench(tmp_path / "run.json")
    row = bench.operator(*arguments, exact=torch.clone, check={OURS: Provider(torch.clone)})
    assert OURS in row.timings
    with pytest.raises(AssertionError, match="wrong"):
        bench.operator(*arguments, exact=torch.clone, check={OURS: Provider(double)})


def test_layouts_are_converted_both_ways_outside_the_timed_step(tmp_path: Path) -> None:
    shapes = []

    def of_the_transpose(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return 2 * x

    for pass_ in ("forward", "backward"):
        providers = {OURS: Provider(of_the_transpose, prepare=torch.t, finish=torch.t)}
        make_bench(tmp_path / "run.json").operator(
            "double", CASE | {"pass": pass_}, providers, ones, Work(), exact=double
        )
    assert set(shapes) == {(5, 4)}


def test_disagreement_sees_every_tensor_and_shapes() -> None:
    a, b = torch.ones(3), torch.full((2,), 10.0)
    assert disagreement((a, b), (a, b), 0.0) is None
    assert disagreement((a, b + 0.9), (a, b), 0.1) is None
    assert "off by 1.1e-01" in str(disagreement((a, b + 1.1), (a, b), 0.1))
    assert "(2,)" in str(disagreement((a,), (b,), 0.1))
    assert disagreement((a,), (a, b), 0.1) is not None
    assert "off by inf" in str(disagreement((a * float("nan"),), (a,), 0.1))


def test_quantiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], "clock")
    assert (timing.median, timing.low, timing.high, timing.rounds) == (3.5, 2.0, 5.0, 6)
    assert Timing.of([7.0], "clock").high == 7.0
    with pytest.raises(ValueError, match="no times"):
        Timing.of([], "clock")


def test_a_cpu_is_timed_in_turn_by_the_clock_that_is_given() -> None:
    now, order = itertools.count(), []
    steps = {name: partial(order.append, name) for name in ("a", "b")}
    timings, times = clock.cpu_timings(steps, lambda: float(next(now)), seconds=10.0)
    assert order == ["a", "b"] * (clock.LEFT_BEHIND + 10)
    assert timings["a"] == Timing(1.0, 1.0, 1.0, 10, "clock")
    assert times["b"] == [1.0] * 10


@pytest.mark.parametrize(("step_seconds", "count"), [(1.0, clock.ROUNDS[0]), (0.05, 20), (0.0, clock.ROUNDS[1])])
def test_rounds(step_seconds: float, count: int) -> None:
    assert clock.rounds(step_seconds, 1.0) == count


def test_when_the_time_is_over_nothing_more_is_measured(tmp_path: Path) -> None:
    row = measure(make_bench(tmp_path / "run.json", budget=0.0), fastbert=double, rival=double)
    assert not row.timings
    assert row.failures == dict.fromkeys(("fastbert", "rival"), "not measured: the time was over")


def test_pytest_benchmark_gets_fastberts_times(tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "run.json")
    row = measure(bench, rival=double, fastbert=double)
    benchmark: Any = bench._benchmark
    assert benchmark.rounds == [row.timings[OURS].rounds]
    assert benchmark.extra_info["rival"] == row.timings["rival"].median


def test_replay_shows_the_times_it_was_given() -> None:
    replay = clock.Replay()
    replay.load([0.5, 0.25])
    seen = []
    for _ in range(2):
        start = replay()
        replay.step()
        seen.append(replay() - start)
    assert seen == [0.5, 0.25]


def row(bench: str, case: dict[str, Any], work: Work, **seconds: float) -> Row:
    timings = {name: Timing(s, 0.9 * s, 1.1 * s, 5, "clock") for name, s in seconds.items()}
    return Row(bench, case, work, timings)


ROOF = [
    row("roof", {"what": "copy", "bytes": 50}, Work(bytes=100), PyTorch=2.0),
    row("roof", {"what": "copy", "bytes": 500}, Work(bytes=1000), PyTorch=10.0),
    row(
        "roof",
        {"what": "product", "pass": "square", "tokens": 10, "in": 10, "out": 10, "dtype": "bfloat16"},
        Work(flops=2000, products=(("square", 10, 10, 10),)),
        PyTorch=1.0,
    ),
    row(
        "roof",
        {"what": "product", "pass": "forward", "tokens": 5, "in": 10, "out": 10, "dtype": "bfloat16"},
        Work(flops=1000, products=(("forward", 5, 10, 10),)),
        PyTorch=0.8,
    ),
]


def run_of(rows: list[Row]) -> Run:
    run = Run.here("cpu")
    run.rows = rows
    return run


def test_the_roof_is_the_larger_of_memory_and_arithmetic() -> None:
    roof = Roof(run_of(ROOF))
    bf16 = {"dtype": "bfloat16"}
    assert roof.copy == 100.0
    assert roof.product("bfloat16") == roof.product("autocast") == 2000.0
    assert roof.seconds(row("a", bf16, Work(bytes=300))) == 3.0
    assert roof.seconds(row("a", bf16, Work(bytes=300, flops=8000))) == 4.0
    assert roof.seconds(row("a", bf16, Work(flops=1000, products=(("forward", 5, 10, 10),)))) == 0.8
    assert roof.seconds(row("a", bf16, Work(flops=1000, products=(("dgrad", 5, 10, 10),)))) == 0.5  # not measured alone
    assert roof.seconds(row("a", {"dtype": "float32"}, Work(flops=1000))) is None
    assert Roof(run_of([])).seconds(row("a", bf16, Work(bytes=300))) is None
    it = row("a", bf16, Work(bytes=300, flops=1000), fastbert=4.0, rival=6.0)
    assert roof.share(it, OURS) == 0.75
    assert roof.utilisation(it, OURS) == 0.125
    assert speedup(it, "rival") == 1.5
    assert speedup(it, "absent") is None


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (Work(bytes=4_300_000_000), "2.15 GB/s"),
        (Work(bytes=4_300_000_000_000), "2150 GB/s"),
        (Work(flops=5_000), "2.5 kFLOP/s"),
        (Work(flops=800_000_000_000_000, bytes=1), "400 TFLOP/s"),
        (Work(tokens=1_500_000, flops=7), "750 k tokens/s"),
        (Work(), ""),
    ],
)
def test_units(work: Work, text: str) -> None:
    assert rate(row("a", {}, work, fastbert=2.0), OURS) == text


def test_durations() -> None:
    assert [duration(s) for s in (12.0, 0.0123, 4.5e-6)] == ["12 s", "12.3 ms", "4.5 us"]


def test_the_last_table_compares_with_the_best() -> None:
    rows = [*ROOF, row("op", {"n": 3, "dtype": "bfloat16"}, Work(bytes=300), fastbert=4.0, slow=9.0, best=6.0)]
    *_, line = terminal_table(run_of(rows)).splitlines()
    cells = [cell.strip() for cell in line.split("  ") if cell]
    assert cells == ["op 3 bfloat16", "4 s", "3.6 s - 4.4 s", "75 B/s", "75%", "1.50 x best"]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = run_of(
        [*ROOF, Row("breakdown", {"model": "base"}, values={"gaps": 0.5}, unit="s"), Row("a", {}, failures={"b": "c"})]
    )
    run.write(tmp_path / "deep" / "run.json")
    assert Run.read(tmp_path / "deep" / "run.json") == run
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]
    assert run.find("roof", what="copy") == ROOF[:2]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": [{"bench": "a"}]}', '{"rows": []}'])
def test_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="holds no run"):
        Run.read(tmp_path / "run.json")


def test_a_case_that_is_measured_again_takes_its_former_place(tmp_path: Path) -> None:
    recorder = Recorder(Run.here("cpu"), tmp_path / "run.json")
    for seconds, case in ((1.0, "a"), (2.0, "b"), (3.0, "a")):
        recorder.add(row("op", {"case": case}, Work(), fastbert=seconds))
    rows = Run.read(tmp_path / "run.json").rows
    assert [(it.case["case"], it.timings[OURS].median) for it in rows] == [("a", 3.0), ("b", 2.0)]


def test_length_mixes() -> None:
    for mix, S, share in (("wikipedia", 512, 0.5), ("squad", 384, 0.41)):
        lengths = batch_of(mix, 256, S)
        assert lengths == batch_of(mix, 256, S)
        assert 0 < min(lengths) <= max(lengths) <= S
        assert sum(lengths) / (256 * S) == pytest.approx(share, abs=0.01)
        assert sum(tokens_of(mix, 65536)) == pytest.approx(65536, rel=0.02)
    assert max(batch_of("wikipedia", 64, 128)) == 128
    assert batch_of("full", 3, 7) == [7, 7, 7]
    assert tokens_of("128", 16384) == [128] * 128


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("_attention_bwd_dkdv_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", "attention"),
        ("_layer_norm_fwd_kernel", "LayerNorm"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel", "LayerNorm"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)>", "GELU"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::_fused_adamw_", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimizer"),
        ("_embedding_bwd_runs_kernel", "embedding"),
        ("aten::copy_", "other"),
        ("aten::index_select", "other"),
    ],
)
def test_parts_of_a_step(name: str, part: str) -> None:
    assert part_of(name) == part


def test_gaps_are_where_nothing_runs() -> None:
    assert idle([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (2.0, 2.5)]) == 2.0
    assert idle([]) == 0.0


def test_parts_of_kernels_are_those_of_a_gpu_without_annotations() -> None:
    def event(name: str, start: float, end: float, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            name=name, time_range=Interval(start, end), device_type=device, is_user_annotation=annotation
        )

    parts = parts_of_kernels(
        [
            event("aten::mm", 0, 90, DeviceType.CPU),
            event("Optimizer.step#AdamW.step", 0, 90, DeviceType.CUDA, annotation=True),
            event("nvjet_hsh_128x256", 10, 40, DeviceType.CUDA),
            event("_attention_fwd_kernel", 46, 52, DeviceType.CUDA),
        ]
    )
    seconds = {part: s * STEPS for part, s in parts.items() if s}
    assert seconds == {
        "matrix products": pytest.approx(30e-6),
        "attention": pytest.approx(6e-6),
        "gaps": pytest.approx(6e-6),
    }


def test_backends_that_pytorch_is_asked_for() -> None:
    full, mixed = Packing.full(2, 8, "cpu"), Packing.from_lengths([8, 3])
    for packing in (full, mixed):
        providers = sdpa_backends(packing, 0.0, "cuda")
        assert list(providers) == ["SDPA flash", "SDPA efficient", "SDPA cuDNN"]
        flash = providers["SDPA flash"]
        q, k, v = torch.randn(3, packing.tokens, 2, 16)
        arguments = [flash.prepare(t) for t in (q, k, v)]
        if packing is mixed:
            with pytest.raises(NotApplicableError, match="mask"):
                flash.function(*arguments)
            continue
        expected = math_attention(*arguments, mask=None, dropout_p=0.0)
        torch.testing.assert_close(flash.function(*arguments), expected)
        torch.testing.assert_close(flash.finish(expected).unflatten(0, (2, 8)).transpose(1, 2), expected)


def test_what_is_not_installed_says_so() -> None:
    with pytest.raises(NotApplicableError, match=r"flash_attn\.nothing is not here"):
        installed("flash_attn", "nothing")
    assert installed("math", "sqrt")(4.0) == 2.0


def pytest_bench(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", *arguments, "--benchmark", "--smallest", "--device", "cpu", "-q"]
    return subprocess.Popen(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, **options
    )


def test_measuring_writes_our_file_and_pytest_benchmarks(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    process = pytest_bench(
        "bench/bench_roof.py",
        "bench/bench_memory.py",
        "--results",
        str(ours),
        "--benchmark-json",
        str(theirs),
        "-k",
        "launch or copy or memory",
    )
    output, _ = process.communicate()
    assert process.returncode == 0, output
    run = Run.read(ours)
    assert run.complete
    assert {row.bench for row in run.rows} == {"roof", "memory"}
    benchmarks = {it["name"]: it for it in json.loads(theirs.read_text())["benchmarks"]}
    assert len(benchmarks) == 2
    for it in run.find("roof"):
        (measured,) = [b for name, b in benchmarks.items() if it.case["what"] in name]
        assert measured["stats"]["median"] == pytest.approx(it.timings["PyTorch"].median, abs=1e-12)
        assert measured["stats"]["rounds"] == it.timings["PyTorch"].rounds
    assert f"{len(run.rows)} rows in {ours}" in output
    assert output.index("test_roof") < output.index("roof copy")  # our table comes last


def test_a_run_without_time_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    output, _ = pytest_bench("bench/bench_roof.py", "--results", str(path), "--budget", "0").communicate()
    run = Run.read(path)
    assert (run.rows, run.complete) == ([], False)
    assert "the time was over" in output


def test_a_run_that_is_killed_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    process = pytest_bench("bench", "--results", str(path))
    try:
        deadline = time.monotonic() + 120
        while not (path.exists() and Run.read(path).rows):  # reading it at any moment is part of the test
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    run = Run.read(path)
    assert run.rows[0].bench == "roof"  # the ceilings came first
    assert not run.complete


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[gpu.Stage]:
    """What `make gpu` would call, in the place of calling it; the benches write a run with one row."""
    called: list[gpu.Stage] = []

    def run(stage: gpu.Stage) -> int | None:
        called.append(stage)
        stage.output.write_text("FAILED tests/test_x.py::test_y - assert\n1 failed, 3 passed in 2.0s\n")
        if stage.arguments[0] == "bench":
            results = Path(stage.arguments[stage.arguments.index("--results") + 1])
            run_of([ROOF[0]]).write(results)
            return None  # cut short
        return 1

    monkeypatch.setattr(gpu, "_run", run)
    return called


def test_make_gpu_keeps_to_its_time_and_says_which_tests_failed(
    stages: list[gpu.Stage], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = gpu.main(device="cuda", results=tmp_path / "gpu", budget=100.0, smallest=False)
    tests, benches = stages
    assert tests.arguments[:3] == ("tests", "-m", "gpu")
    assert tests.seconds == 35.0
    assert 90.0 < benches.seconds <= 100.0 - gpu.LAST_SECONDS
    assert "--smallest" not in benches.arguments
    run = Run.read(tmp_path / "gpu" / "bench.json")
    assert run.tests == {
        "status": 1,
        "failed": ["FAILED tests/test_x.py::test_y - assert"],
        "summary": "1 failed, 3 passed in 2.0s",
    }
    assert status == 1
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("tests: 1 failed, 3 passed in 2.0s; 1 rows in ")
    assert last.endswith("cut short")


def test_a_stage_whose_time_is_over_is_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    assert gpu._run(gpu.Stage(("tests/test_bench.py",), tmp_path / "out.txt", 0.1)) is None
    assert time.monotonic() - start < 20


class FakeEvent:
    """A CUDA event on a clock that every recorded step moves on by a millisecond."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA's functions that the clock calls, and the order of what was done."""
    log: list[str] = []

    @contextlib.contextmanager
    def graph(_graph: Any, stream: Any) -> Iterator[None]:
        log.append("capture")
        yield

    class Graph:
        def replay(self) -> None:
            FakeEvent.now += 2.0
            log.append("replay")

    class Flush:
        def zero_(self) -> None:
            FakeEvent.now += 100.0
            log.append("flush")

    properties = SimpleNamespace(L2_cache_size=50 << 20)
    for name, value in {
        "Event": FakeEvent,
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda: None,
        "current_stream": lambda: None,
        "current_device": lambda: 0,
        "get_device_properties": lambda _: properties,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 1000,
        "max_memory_allocated": lambda: 4000,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        clock, "torch", SimpleNamespace(cuda=torch.cuda, int8=torch.int8, empty=lambda *_, **__: Flush())
    )
    return log


def test_a_gpu_is_timed_between_flushes_by_graph_replays(fake_gpu: list[str], tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "run.json")
    bench.device = "cuda"
    steps = [lambda: fake_gpu.append("first"), lambda: fake_gpu.append("second")]
    row = bench.steps("op", {}, {OURS: lambda: Ready(list(steps), graph=True)}, Work())
    assert row.timings[OURS] == Timing(1e-3, 1e-3, 1e-3, clock.ROUNDS[0], "graph", peak_bytes=3000)
    captured = fake_gpu.index("capture")
    assert fake_gpu[:captured] == ["first", *["first", "second"] * 2]
    assert fake_gpu[captured + 1 :] == [
        "first",
        "second",
        *["replay"] * clock.LEFT_BEHIND,
        *["flush", "replay"] * clock.ROUNDS[0],
    ]


def test_a_gpu_is_timed_by_events_where_nothing_can_be_captured(fake_gpu: list[str], tmp_path: Path) -> None:
    bench = make_bench(tmp_path / "run.json")
    bench.device = "cuda"

    def step() -> None:
        FakeEvent.now += 3.0

    row = bench.steps("op", {}, {OURS: lambda: Ready([step])}, Work())
    assert row.timings[OURS].how == "events"
    assert row.timings[OURS].median == pytest.approx(3e-3)
    assert "replay" not in fake_gpu


def test_inputs_go_round_beyond_the_cache(fake_gpu: list[str]) -> None:
    assert clock.sets_of_inputs(10 << 20) == 8  # at most
    assert clock.sets_of_inputs(60 << 20) == 3
    assert clock.sets_of_inputs(1 << 30) == 1
