"""What a machine may lack: a test that needs it skips and says so, and all others run."""

import importlib.util
from typing import Any
from unittest import mock

import pytest


def needs(*modules: str) -> pytest.MarkDecorator:
    """For a test or a class. A whole file says `pytest.importorskip`."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:
    st = mock.MagicMock()

    def given(*_strategies: Any, **_named: Any) -> pytest.MarkDecorator:
        return needs("hypothesis")

    def settings(**_options: Any) -> Any:
        return lambda test: test


__all__ = ["given", "needs", "settings", "st"]
