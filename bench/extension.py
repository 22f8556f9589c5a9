"""Builds `fastbert._C` on a machine that has a compiler and no build of it, beside what else is done."""

import importlib.util
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.process import ROOT, environment

COMMAND = (sys.executable, "setup.py", "build_ext", "--inplace")
NEEDED = "setup.py", "csrc", "fastbert"


class Extension:
    """A build that may fail: then the tests and benches that need the extension say so.

    Args:
        build: whether to build where it is missing.
    """

    def __init__(self, build: bool) -> None:
        self._start = time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        self._there, self._said = _is_here(), ""
        if build and not self._there:
            self._folder = tempfile.TemporaryDirectory()
            for name in NEEDED:  # without pyproject.toml, which an older setuptools does not understand
                (Path(self._folder.name) / name).symlink_to(ROOT / name)
            self._process = subprocess.Popen(
                COMMAND,
                cwd=self._folder.name,
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def wait(self, seconds: float) -> str | None:
        """What became of it, if that is known after some time and was not said before."""
        if self._said:
            return None
        if self._process is None:
            self._said = "is here" if self._there else "not here, and not built in a rehearsal"
            return f"fastbert._C: {self._said}"
        try:
            output, _ = self._process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        if self._process.returncode != 0:
            lines = output.strip().splitlines() or [f"status {self._process.returncode}"]
            errors = [line for line in lines if "error" in line.lower()]
            self._said = f"NOT BUILT: {(errors or lines)[-1].strip()}"
        else:
            self._said = f"built in {time.monotonic() - self._start:.0f} s"
        return f"fastbert._C: {self._said}"

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def _is_here() -> bool:
    try:
        return importlib.util.find_spec("fastbert._C") is not None
    except ImportError:
        return False
