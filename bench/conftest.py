"""`pytest bench` checks that the implementations agree, on the smallest cases; `pytest bench --benchmark` measures."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.harness import Row, record

_ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmark", action="store_true", help="measure, instead of one small case of each bench")
    parser.addoption("--results", default=".out/bench.json", help="where --benchmark writes its figures")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        config.option.benchmark_disable = True


@pytest.fixture
def results() -> Callable[[Row | None], None]:
    """Keep a row for the results file."""
    return lambda row: None if row is None else _ROWS.append(row)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A bench lists its cases in CASES, the smallest first."""
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.CASES
        cases = cases if metafunc.config.getoption("--benchmark") else metafunc.module.SMALLEST
        metafunc.parametrize("case", cases, ids=lambda case: " ".join(str(value) for value in case.values()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _ROWS:
        path = Path(session.config.getoption("--results"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(_ROWS), indent=1) + "\n")
