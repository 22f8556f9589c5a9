"""A fixed seed and poisoned allocations for every test, and the device under test."""

import gc
import os
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic

if os.environ.get("TRITON_INTERPRET") == "1":
    new_numpy = Version(np.__version__) >= Version("2.4")
    if new_numpy and Version(metadata.version("triton")) < Version("3.7"):
        pytest.exit("Triton 3.6's interpreter needs NumPy below 2.4", returncode=1)
    from tests.interpreter import hasten

    hasten()

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


_SPOILT: list[str] = []  # tests after which nothing works on the GPU in this process


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "gpu" in report.keywords and not hasattr(report, "node"):  # of xdist: not in its main process
        try:
            torch.cuda.synchronize()
            torch.rand(1, device="cuda")
        except Exception:
            _SPOILT.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """After an illegal access, or a graph that was not captured, all tests would fail: xdist starts another process."""
    if _SPOILT and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
    if _SPOILT:
        pytest.exit(f"nothing works on the GPU any more after {_SPOILT[0]}", returncode=1)


def pytest_collection_finish() -> None:
    """Trainer collects garbage before each run: a second through all that torch and transformers have imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads of tiny models wait for each other longer than they work where the cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command line: exit status, stdout and stderr of some arguments."""
    from tests.command import runner

    return runner(capsys, monkeypatch)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_allocations() -> Iterator[None]:
    """Fill torch.empty with NaN, so that an element an operator forgets to write fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def vocabulary_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocab.txt of letters and a few words."""
    from tests.stores import write_vocabulary

    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")
