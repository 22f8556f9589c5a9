"""Builds `fastbert._C` on a machine that has a compiler and no build of it, beside what else is done."""

import importlib.util
import subprocess
import sys
import time

from bench.process import ROOT, environment

SECONDS = 150.0  # that it may take
COMMAND = (sys.executable, "setup.py", "build_ext", "--inplace")


class Extension:
    """A build that may fail: then the tests and benches that need the extension say so.

    Args:
        build: whether to build where it is missing.
    """

    def __init__(self, build: bool) -> None:
        self._start = time.monotonic()
        self._process: subprocess.Popen[str] | None = None
        self._there = importlib.util.find_spec("fastbert._C") is not None
        if build and not self._there:
            self._process = subprocess.Popen(
                COMMAND, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )

    def wait(self) -> str:
        """Until it is there, or not; what became of it."""
        if self._process is None:
            return "fastbert._C: is here" if self._there else "fastbert._C: not here, and not built in a rehearsal"
        try:
            output, _ = self._process.communicate(timeout=max(0.0, self._start + SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.stop()
            return f"fastbert._C: NOT BUILT: not done after {SECONDS:.0f} s"
        if self._process.returncode != 0:
            lines = output.strip().splitlines() or [f"status {self._process.returncode}"]
            return f"fastbert._C: NOT BUILT: {lines[-1]}"
        return f"fastbert._C: built in {time.monotonic() - self._start:.0f} s"

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
