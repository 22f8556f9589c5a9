"""What `make tune` compiles ahead is what it will ask for, in that order, and is found on disk."""

import dataclasses
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")

import torch
import triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import ahead, codegen, launch_cases, tune
from bench.ahead import Ahead, Launch
from fastbert.kernels import _launch, layer_norm

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
HOPPER = codegen.CHIPS["sm_90"].chip


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    return list(ahead.launches(HOPPER, smallest=False))


def asked() -> list[tune.Question]:
    with mock.patch.object(_launch, "chip", return_value=HOPPER):
        return tune.questions("meta", False)


def test_the_questions_are_those_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with mock.patch.object(_launch, "chip", return_value=HOPPER):
        on_gpu = tune.questions("cuda", False)
    assert [(it.case, list(it.candidates)) for it in asked()] == [(it.case, list(it.candidates)) for it in on_gpu]


def test_each_candidates_tiles_are_compiled_in_their_order(launches: list[Launch]) -> None:
    """Of the first question about attention, and of all products; each launch once."""
    assert len(launches) == len({repr(launch) for launch in launches}) > 100
    assert {launch.module.rpartition(".")[2] for launch in launches} >= {"attention", "layer_norm", "_product"}
    first = next(question for question in asked() if question.case["what"] == "attention fwd")
    wanted = [candidate.replacement("fwd") for candidate in first.candidates.values()]
    seen = [blocks(launch) for launch in launches if launch.kernel == "_attention_fwd_kernel"]
    assert seen[: len(wanted)] == list(dict.fromkeys(wanted))
    products = {tiles(launch) for launch in launches if launch.kernel == "_product_tma_kernel"}
    assert products == {(it.M, it.N, it.K, it.num_warps, it.num_stages) for it in tune.product_tiles(HOPPER)}


def constant(launch: Launch, name: str) -> Any:
    return launch.constants[(list(launch.signature).index(name),)]


def blocks(launch: Launch) -> _launch.Blocks:
    options = launch.options
    sizes = (constant(launch, name) for name in ("BLOCK_M", "BLOCK_N"))
    return _launch.Blocks(*sizes, options["num_warps"], options["num_stages"], options["maxnreg"])


def tiles(launch: Launch) -> tuple[int, ...]:
    sizes = (constant(launch, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    return (*sizes, launch.options["num_warps"], launch.options["num_stages"])


def test_the_process_that_times_finds_it_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own launch code, asked again, takes it from the cache; after a change of a constant it compiles."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    question = next(it for it in asked() if it.case["what"] == "layer_norm forward")
    two = dict(list(question.candidates.items())[:2])
    monkeypatch.setattr(tune, "questions", lambda device, smallest: [dataclasses.replace(question, candidates=two)])
    found = list(ahead.launches(HOPPER, smallest=False))
    kernels = {launch.kernel for launch in found}
    assert kernels == {"_layer_norm_fwd_kernel"}
    assert found[0].compile(HOPPER) is None

    hits = run_as_on_a_gpu(question, monkeypatch)
    assert hits == [True, False]  # the second one was not compiled ahead


def run_as_on_a_gpu(question: tune.Question, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each candidate's kernel came from the disk. The launcher runs on tensors with memory; nothing is run."""
    hits: list[bool] = []
    run = JITFunction.run

    def only_compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    gpu = SimpleNamespace(
        get_current_device=lambda: "gpu",
        get_current_stream=lambda _: 0,
        get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32),
    )
    M, N = question.case["tokens"], question.case["hidden"]
    x, residual = torch.empty(2, M, N, dtype=torch.bfloat16).unbind()
    x_bias, weight, bias = torch.empty(3, N, dtype=torch.bfloat16).unbind()
    launch = launch_cases._launcher("layer_norm_fwd")
    with (
        triton.knobs.compilation.scope(),
        mock.patch.object(_launch, "chip", return_value=HOPPER),
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(JITFunction, "run", only_compiled),
    ):
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
        for candidate in list(question.candidates.values())[:2]:
            with mock.patch.object(layer_norm, question.attribute, candidate.replacement):
                launch(x, x_bias, residual, weight, bias, 1e-12, 0.1, torch.tensor(5), 3)
    return hits


def test_a_launch_that_cannot_be_compiled_is_no_reason_to_stop(launches: list[Launch]) -> None:
    broken = launches[0]._replace(options=launches[0].options | {"num_warps": 3})
    why = broken.compile(HOPPER)
    assert why is not None
    assert "num_warps" in why


@pytest.mark.parametrize(
    ("text", "said", "failed"),
    [
        ("print('20 of 40 kernels compiled ahead'); print('40 of 40 kernels')", "40 of 40 kernels", False),
        ("print('20 of 40 kernels compiled ahead'); raise SystemExit(3)", "20 of 40", True),
        ("raise SystemExit(3)", "no kernel compiled ahead; then it failed with status 3", True),
    ],
)
def test_what_it_came_to(text: str, said: str, failed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MODULE", ("-c", text))
    with Ahead("cpu", smallest=True) as it:
        pass
    assert it.said().startswith(said)
    assert it.failed == failed


def test_on_a_gpu_it_is_stopped_when_nothing_more_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MODULE", ("-c", "import time; print('1 kernel', flush=True); time.sleep(1000)"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "chip", lambda device: HOPPER)
    start = time.monotonic()
    with Ahead("cuda", smallest=False) as it:
        assert len(it._arguments) == 3  # all of them
        time.sleep(2.0)
    assert time.monotonic() - start < 30
    assert not it.failed
