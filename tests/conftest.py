"""A fixed seed and poisoned allocations for every test, and the device under test."""

import os
from collections.abc import Iterator
from importlib import metadata

import numpy as np
import pytest
import torch
from packaging.version import Version

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic

if os.environ.get("TRITON_INTERPRET") == "1" and Version(np.__version__) >= Version("2.4"):
    if Version(metadata.version("triton")) < Version("3.7"):
        pytest.exit("Triton 3.6's interpreter needs NumPy below 2.4", returncode=1)

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


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
