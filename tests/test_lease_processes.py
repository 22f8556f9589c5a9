"""`make gpu` with real processes, on a GPU that is not there: what spoils them, kills them, and makes them wait."""

import time
from pathlib import Path

import pytest

from bench import gpu
from bench.attempts import STOPPED
from bench.gpu import Stage
from bench.process import Server, Servers
from bench.record import LOST, OURS, Run

CONFTEST = """
from bench.conftest import *
from tests.fake_cuda import FakeCuda

CUDA = FakeCuda().install()
"""
BENCH = """
import os
import signal
import time
from pathlib import Path

from conftest import CUDA

from bench.harness import NotApplicableError, Ready
from bench.record import OURS, Work

KINDS = "capture", "illegal", "hang", "dies", "early", "absent", "fine"
GOALS = {"cuda": [{"kind": kind} for kind in KINDS]}
CASES = {"cuda": [{"kind": "no goal"}]}


def refuses():
    if CUDA.capturing:
        raise RuntimeError("not permitted when stream is capturing")


def spoils():
    CUDA.spoilt = "an illegal memory access was encountered"
    raise RuntimeError(CUDA.spoilt)


def is_absent():
    raise NotApplicableError("is not installed")


RIVALS = {
    "capture": refuses,
    "illegal": spoils,
    "hang": lambda: time.sleep(1000),
    "dies": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "early": lambda: None,
    "absent": is_absent,
    "fine": lambda: None,
}


def test_toy(case, bench):
    with open(Path(__file__).with_name("begun.txt"), "a") as begun:
        print(case["kind"], file=begun)
    if case["kind"] == "early":
        os.kill(os.getpid(), signal.SIGKILL)
    steps = {OURS: lambda: None, "rival": RIVALS[case["kind"]], "last": lambda: None}
    providers = {name: lambda step=step: Ready([step], graph=True) for name, step in steps.items()}
    bench.steps("toy", case, providers, Work())
"""


def test_whatever_becomes_of_a_process_all_else_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "bench_toy.py").write_text(BENCH)
    here = Run.here
    monkeypatch.setattr(Run, "here", lambda device, command=(): here("cpu", command))
    monkeypatch.setattr("bench.record._clocks", lambda device: None)
    monkeypatch.setattr(gpu, "BENCHES", tmp_path)
    monkeypatch.setattr(gpu, "SILENCE", {"goals": 6.0})
    imports = "pytest_benchmark.plugin", "bench.harness"
    monkeypatch.setattr(gpu, "Servers", lambda fork: Servers(fork=True, imports=imports))  # nothing here is CUDA's
    monkeypatch.setenv("COMMIT", "abc1234")
    stages = [Stage("toy", 540), Stage("missing", 540)]
    status = gpu.main(device="cuda", results=tmp_path / "gpu", budget=600.0, smallest=False, stages=stages)
    run = Run.read(tmp_path / "gpu/bench.json")
    said = (tmp_path / "gpu/bench.txt").read_text()

    rows = {it.case["kind"]: it for it in run.rows}
    assert list(rows) == ["capture", "illegal", "hang", "dies", "absent", "fine"], said
    for kind, row in rows.items():
        assert row.timings[OURS].how == row.timings["last"].how == "graph", kind
    assert rows["capture"].timings["rival"].how == "events"
    assert rows["illegal"].failures == {"rival": "RuntimeError: an illegal memory access was encountered"}
    assert rows["hang"].failures == rows["dies"].failures == {"rival": STOPPED}
    assert rows["absent"].failures == {"rival": "is not installed"}
    assert rows["fine"].timings["rival"].how == "events"  # of a kind that could not be captured
    assert run.uncaptured == {"toy: rival": "RuntimeError: not permitted when stream is capturing"}
    (lost,) = run.nodes
    assert lost.endswith("bench_toy.py::test_toy[goal early]")
    assert run.nodes[lost] == LOST

    begun = (tmp_path / "begun.txt").read_text().split()
    twice = ["capture", "illegal", "hang", "dies"]  # and then never again
    assert begun == [*(kind for kind in twice for _ in range(2)), "early", "absent", "fine"]

    toy, missing = run.stages
    assert toy["ended"] == "done"
    assert "5 processes ended before their time" in toy["said"]
    assert missing["ended"] == "broken"
    assert (status, run.complete) == (1, False)
    assert sorted(path.name for path in (tmp_path / "gpu").iterdir()) == ["bench.json", "bench.txt"]
    assert f"{lost}: its process ended" in capsys.readouterr().out


QUICK = """
import os

def test_quick():
    assert os.environ["TOY"] == "a"
    assert os.getpgrp() == os.getpid()
"""
SLOW = """
import time

def test_quick():
    pass

def test_slow():
    print("it is slow", flush=True)
    time.sleep(1000)
"""


def wait(server: Server, seconds: float = 120.0) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = server.status(0.1)
        if status is not None:
            return status
    return None


def test_a_server_that_serves_once(tmp_path: Path) -> None:
    """What it says is added to a file; interrupted it gives a summary; then it is gone, and another one was ready."""
    output, toy = tmp_path / "said.txt", tmp_path / "test_toy.py"
    output.write_text("before\n")
    toy.write_text(QUICK)
    servers = Servers(fork=False, imports=("pytest",))
    try:
        first = servers.take()
        servers.prepare()
        first.call([str(toy), "-q", "-p", "no:cacheprovider"], output, {"TOY": "a"})
        assert wait(first) == 0
        assert first.ready
        assert wait(first) == 0  # the process, too, ended with pytest's status
        toy.write_text(SLOW)
        second = servers.take()
        second.call([str(toy), "-v", "-s", "-p", "no:cacheprovider"], output)
        end = time.monotonic() + 120
        while "it is slow\n" not in output.read_text():
            assert second.status(0.1) is None
            assert time.monotonic() < end
        second.interrupt()
        assert wait(second) == 2
        second.stop()
    finally:
        servers.stop()
    said = output.read_text()
    assert said.startswith("before\n")
    assert said.count("1 passed") == 2
    assert "KeyboardInterrupt" in said
