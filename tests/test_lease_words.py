"""`make gpu`: what it measures and tests, what it says of it, and with what status it ends."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import bench_attention, bench_model, bench_roof, commit, extension, gpu
from bench.attempts import STOPPED, TIME_OVER
from bench.gpu import STAGES, Stage
from bench.record import OURS
from bench.shapes import MODELS
from tests import conftest
from tests.fake_lease import Call, World, forever, make_world, row, run_of


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return make_world(monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (None, 0),
        ((OURS, "OutOfMemoryError: 80 GiB"), 1),
        ((f"{OURS}, CUDA graph", "cannot be captured: RuntimeError"), 1),
        ((OURS, STOPPED), 1),
        ((OURS, TIME_OVER), 0),
        (("transformers eager", "OutOfMemoryError: 80 GiB"), 0),
        (("SDPA cuDNN", STOPPED), 0),
        (("rival", "wrong: off by 1"), 1),
    ],
)
def test_the_status_is_about_fastbert_and_what_is_wrong(
    failure: tuple[str, str] | None, status: int, world: World, tmp_path: Path
) -> None:
    def measures(call: Call) -> tuple[float, int]:
        call.write(lambda run: run.rows.append(row(*failure) if failure else row()))
        return 1.0, 0

    world.does["roof"] = measures
    assert run_of(tmp_path, Stage("roof", 540))[0] == status


def test_a_bench_that_fails_beside_its_providers_counts(world: World, tmp_path: Path) -> None:
    world.does["roof"] = lambda call: (1.0, 1)
    status, run = run_of(tmp_path, Stage("roof", 540))
    assert (status, run.stages[0]["ended"], run.complete) == (1, "failed", True)


def test_a_bench_says_what_it_needs(world: World, tmp_path: Path) -> None:
    world.says["pretraining"] = (
        "SKIPPED [4] bench/bench_pretraining.py:79: needs the C++ extension, which is not built\n"
        f"SKIPPED [1] bench/conftest.py:146: {TIME_OVER}\n"
        "SKIPPED [1] bench/bench_input.py:70: got empty parameter set for (case)\n"
    )
    _, run = run_of(tmp_path, Stage("pretraining", 540, "all"))
    assert run.stages[0]["said"] == "0 figures, needs the C++ extension, which is not built"
    assert run.stages[0]["ended"] == "the time was over"


def test_a_row_without_time_makes_the_stage_a_cut_one(world: World, tmp_path: Path) -> None:
    def cut(call: Call) -> tuple[float, int]:
        call.write(lambda run: run.rows.append(row("late", TIME_OVER)))
        return 1.0, 0

    world.does["roof"] = cut
    _, run = run_of(tmp_path, Stage("roof", 540), Stage("model", 540))
    assert [it["ended"] for it in run.stages] == ["the time was over", "done"]


class TestTests:
    OUTPUT = """\
bringing up nodes...
14 workers [464 items]
[gw0] [  0%] PASSED tests/test_gpu.py::test_a
[gw1] [  1%] FAILED tests/test_gpu.py::test_b
[gw1] [  2%] PASSED tests/test_gpu.py::test_c[PASSED or ERROR]
tests/test_gpu.py::test_d ERROR                                   [  3%]
[gw1] [  4%] SKIPPED tests/test_gpu.py::test_e
"""

    def test_in_its_own_words(self) -> None:
        output = f"{self.OUTPUT}FAILED tests/test_gpu.py::test_b - assert\n=== 1 failed, 3 passed in 2.0s ===\n"
        assert gpu._outcome(output, gpu.End(1)) == {
            "status": 1,
            "failed": ["FAILED tests/test_gpu.py::test_b - assert"],
            "summary": "1 failed, 3 passed in 2.0s",
        }

    def test_counted_where_they_were_stopped(self) -> None:
        outcome = gpu._outcome(self.OUTPUT, gpu.End(None, "why"))
        assert outcome["summary"] == "stopped, why, 2 of 464 passed, 1 failed, 1 errors"
        assert [line.split("::")[1].split()[0] for line in outcome["failed"]] == ["test_b", "test_d"]
        assert gpu._outcome("", gpu.End(None, "why"))["summary"] == "stopped, why, 0 passed, 0 failed, 0 errors"

    def test_of_several_stages_are_put_together(self, world: World, tmp_path: Path, capsys: Any) -> None:
        said = iter(["3 passed in 1.0s\n", "FAILED tests/test_x.py::test_y - assert\n1 failed in 2.0s\n"])
        ends = iter([(1.0, 0), (1.0, 1)])

        def tests(call: Call) -> tuple[float, int]:
            return next(ends)

        world.does["tests"] = tests
        world.says = type("", (dict,), {"get": lambda self, name, default: next(said)})()
        status, run = run_of(tmp_path, STAGES[0], STAGES[-1])
        assert run.tests == {
            "status": 1,
            "failed": ["FAILED tests/test_x.py::test_y - assert"],
            "summary": "3 passed in 1.0s; last tests: 1 failed in 2.0s",
        }
        assert status == 1
        printed = capsys.readouterr().out
        assert "FAILED tests/test_x.py::test_y - assert" in printed
        assert "extension, True, 0.0" in printed

    def test_are_interrupted_before_they_are_killed(self, world: World, tmp_path: Path) -> None:
        world.does["tests"] = forever
        world.says["tests"] = self.OUTPUT
        world.news = True
        status, run = run_of(tmp_path, STAGES[0], Stage("roof", 540))
        assert world.interrupted == 1
        assert run.tests is not None
        assert run.tests["summary"].startswith("stopped, the time was over, 2 of 464 passed")
        assert status == 1  # some failed before
        assert world.names() == ["tests", "roof"]

    def test_as_many_processes_as_processors_but_two(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
        for there in (True, False):
            monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name, _there=there: _there or None)
            run_of(tmp_path, STAGES[0])
        with_xdist, without = (arguments for _, arguments in world.calls)
        assert with_xdist[with_xdist.index("-n") + 1] == "14"
        assert "-n" not in without


@pytest.mark.parametrize(("name", "loud"), [(commit.UNKNOWN, True), ("abc1234", False)])
def test_it_is_loud_where_nobody_knows_the_commit(
    name: str, loud: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("bench.record.commit", lambda: name)
    run_of(tmp_path, Stage("roof", 540))
    printed = capsys.readouterr()
    assert ("NOBODY WILL KNOW" in printed.err) == ("NOBODY WILL KNOW" in printed.out) == loud


def test_what_is_said_stays_small_enough_to_be_fetched(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "MOST_BYTES", 100)
    world.says["roof"] = "x" * 1000 + "the end"
    run_of(tmp_path, Stage("roof", 540))
    assert (tmp_path / "gpu/bench.txt").read_text() == "x" * 93 + "the end"


class TestASpoiltGpu:
    """In tests: what fails on a GPU, and leaves nothing that works there."""

    @pytest.fixture
    def exits(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        statuses: list[int] = []
        monkeypatch.setattr(conftest, "_SPOILT", [])
        monkeypatch.setattr(conftest.os, "_exit", statuses.append)
        monkeypatch.setattr(conftest.pytest, "exit", lambda why, returncode: statuses.append(-returncode))
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
        return statuses

    @pytest.mark.parametrize(
        ("failed", "keywords", "works", "elsewhere", "expected"),
        [
            (True, ("gpu",), False, False, [-1, 1]),
            (True, ("gpu",), True, False, []),
            (False, ("gpu",), False, False, []),
            (True, ("cpu",), False, False, []),
            (True, ("gpu",), False, True, []),  # xdist's main process hears of it, too
        ],
    )
    def test_ends_the_process(
        self,
        failed: bool,
        keywords: tuple[str, ...],
        works: bool,
        elsewhere: bool,
        expected: list[int],
        exits: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def check(*_: Any, **__: Any) -> None:
            if not works:
                raise RuntimeError("an illegal memory access was encountered")

        gpu_of_tests = SimpleNamespace(cuda=SimpleNamespace(synchronize=check), rand=check)
        monkeypatch.setattr(conftest, "torch", gpu_of_tests)
        report: Any = SimpleNamespace(
            failed=failed, keywords=keywords, nodeid="test_x", **({"node": 1} if elsewhere else {})
        )
        conftest.pytest_runtest_logreport(report)
        conftest.pytest_runtest_logfinish()
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
        conftest.pytest_runtest_logfinish()
        assert exits[: len(expected)] == expected
        assert bool(exits) == bool(expected)


class TestExtension:
    def test_that_is_here_is_not_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda _: True)
        it = extension.Extension(build=True)
        assert [it.wait(0.0), it.wait(0.0)] == ["fastbert._C: is here", None]

    @pytest.mark.parametrize(
        ("program", "said"),
        [
            ("print('compiling')", r"fastbert\._C: built in \d+ s"),
            ("import sys; print('g++: error: no such\\nand more'); sys.exit(1)", r".*NOT BUILT: g\+\+: error: no such"),
            ("import sys; print('g++ is not here'); sys.exit(1)", r".*NOT BUILT: g\+\+ is not here"),
            ("import sys; sys.exit(3)", r"fastbert\._C: NOT BUILT: status 3"),
        ],
    )
    def test_a_build_that_fails_only_says_so(self, program: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(extension, "COMMAND", (sys.executable, "-c", program))
        it = extension.Extension(build=True)
        assert re.fullmatch(said, it.wait(60.0) or "")
        assert it.wait(60.0) is None

    def test_nobody_waits_for_it_longer_than_that(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(extension, "COMMAND", (sys.executable, "-c", "import time; time.sleep(1000)"))
        it = extension.Extension(build=True)
        assert it.wait(0.2) is None
        assert it._process is not None
        it.stop()
        assert it._process.returncode == -9

    def test_it_is_built_from_what_is_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without pyproject.toml, and into this tree."""
        program = "import os; print(*sorted(os.listdir()), os.path.realpath('fastbert')); raise SystemExit(1)"
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda _: None)
        monkeypatch.setattr(extension, "COMMAND", (sys.executable, "-c", program))
        root = extension.ROOT / "fastbert"
        assert extension.Extension(build=True).wait(60.0) == f"fastbert._C: NOT BUILT: csrc fastbert setup.py {root}"

    def test_in_a_rehearsal_nothing_is_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension.importlib.util, "find_spec", lambda _: None)
        assert "not built in a rehearsal" in (extension.Extension(build=False).wait(0.0) or "")


class TestGoals:
    def test_attention_with_dropout_and_without_in_both_passes(self) -> None:
        goals = bench_attention.GOALS["cuda"]
        for case in goals:
            assert {**case, "dropout": 0.1 - case["dropout"]} in goals
        assert {case["pass"] for case in goals} == {"forward", "backward"}

    def test_plain_products_of_all_passes_at_berts_sizes(self) -> None:
        products = [case for case in bench_roof.GOALS["cuda"] if case["what"] == "product"]
        seen = {(it["in"], it["out"], it["pass"]) for it in products if it["tokens"] == 16384}
        layers = [(768, 2304), (768, 768), (768, 3072), (3072, 768), (1024, 3072), (1024, 1024)]
        for K, N in [*layers, (1024, 4096), (4096, 1024)]:
            assert {(K, N, pass_) for pass_ in ("forward", "dgrad", "wgrad")} <= seen
        heads = {(it["in"], it["out"], it.get("pitch"), it["pass"]) for it in products if it["tokens"] == 9830}
        for pass_ in ("forward", "dgrad", "wgrad"):
            for K in (768, 1024):
                assert {(K, 30522, None, pass_), (K, 30522, 30528, pass_), (K, 30528, None, pass_)} <= heads
        assert [case["what"] for case in bench_roof.GOALS["cuda"][:2]] == ["copy", "product"]

    @pytest.mark.parametrize("compiles", [False, True])
    def test_what_may_not_fit_is_no_goal(self, compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(bench_model, "make_batch", lambda case, device: {})
        bench: Any = SimpleNamespace(device="cuda", compiles=compiles)
        for case in bench_model.GOALS["cuda"]:
            names = set(bench_model._providers(case, bench, bench_model.Work()))
            assert {OURS, "transformers SDPA", "transformers SDPA, cuDNN"} <= names
            assert case["model"] in MODELS
            assert ("transformers eager" in names) == (compiles or case["model"] != "large")
            assert ("reference" in names) == compiles
            assert ("transformers SDPA, compiled" in names) == compiles
