"""The harness of the benches, without a GPU: what is wrong is not timed, units, medians, budgets, files."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.autograd.profiler_util import Interval

from bench import clock
from bench.attempts import Attempts
from bench.bench_breakdown import STEPS, idle, part_of, parts_of_kernels
from bench.harness import Bench, Inputs, NotApplicableError, Provider, disagreement
from bench.record import OURS, Recorder, Row, Run, Timing, Work
from bench.rivals import installed, math_attention, sdpa_backends
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
    recorder, limit = Recorder(Run.here("cpu"), path), clock.Budget(budget, time.monotonic)
    return Bench(
        FakeBenchmark(),  # type: ignore[arg-type]
        Attempts(recorder, device="cpu", budget=limit, resume=False),
        device="cpu",
        measure=True,
        compiles=False,
        timer=timer,
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
        ("fastbert::layers", "all layers in one call"),
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
    ours = "TRITON_INTERPRET", "PYTEST_XDIST"  # pytest-benchmark measures nothing in a worker
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
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
        if it.case["what"] == "launch":
            assert measured["stats"]["median"] == pytest.approx(it.timings["PyTorch"].median, abs=1e-12)
            assert measured["stats"]["rounds"] == it.timings["PyTorch"].rounds
        else:  # measured once more, and the best counts
            assert it.timings["PyTorch"].median <= measured["stats"]["median"] + 1e-12
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
