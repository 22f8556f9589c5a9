"""Processes for pytest, one a bench file, that have their imports behind them when they are asked.

A server imports what benches need and then waits for a line of JSON on its standard input: what pytest is called with,
and the file for what it says. It answers with the exit status. On a GPU it serves once: what was allocated, compiled
and perhaps spoilt goes with it, and the next server imports meanwhile. On a CPU it forks for each call, which is
quicker; CUDA does not survive a fork.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
READY = b"ready"
# no bench, nor a conftest: pytest rewrites those as it imports them
IMPORTS = (
    "pytest",
    "pytest_benchmark.plugin",
    "triton",
    "transformers.models.bert.modeling_bert",
    "fastbert.patching",
    "fastbert.functional",
    "bench.harness",
)


class Server:
    """One of these processes, the leader of its group.

    Attributes:
        ready: whether its imports were seen to be done.
    """

    def __init__(self, *, fork: bool, imports: Sequence[str] = IMPORTS) -> None:
        command = [sys.executable, "-m", "bench.process", "fork" if fork else "once", *imports]
        self._process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # or select would not see what was read ahead
            preexec_fn=os.setpgrp,
        )
        self.ready = False

    def call(self, arguments: Sequence[str], output: Path, variables: Mapping[str, str] | None = None) -> None:
        """pytest, in another process. What it says is added to a file; `variables` are for its environment."""
        request = {"arguments": list(arguments), "output": str(output), "variables": dict(variables or {})}
        with contextlib.suppress(BrokenPipeError):  # its status will tell
            _pipe(self._process.stdin).write(json.dumps(request).encode() + b"\n")
            _pipe(self._process.stdin).flush()

    def status(self, seconds: float) -> int | None:
        """pytest's exit status, or that of the process where it died; None if there is none within some time."""
        answers = _pipe(self._process.stdout)
        if not select.select([answers], [], [], seconds)[0]:
            return None
        line = answers.readline()
        if line.strip() == READY:
            self.ready = True
            return None
        return int(line) if line else self._process.wait()

    def interrupt(self) -> None:
        """As Ctrl-C would: pytest ends with a summary of what it has."""
        self._signal(signal.SIGINT)

    def stop(self) -> None:
        """With all that it started."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class Servers:
    """Hands out a server that waits, and sees to it that the next one will be ready."""

    def __init__(self, *, fork: bool, imports: Sequence[str] = IMPORTS) -> None:
        self._fork, self._imports = fork, imports
        self._waiting: Server | None = self._new()

    def _new(self) -> Server:
        return Server(fork=self._fork, imports=self._imports)

    def take(self) -> Server:
        server, self._waiting = self._waiting or self._new(), None
        return server

    def prepare(self) -> None:
        """Another one, where the one that was taken serves but once."""
        if self._waiting is None and not self._fork:
            self._waiting = self._new()

    def give_back(self, server: Server) -> None:
        """After a call that came to its end: one that forks can serve again."""
        if self._fork and self._waiting is None:
            self._waiting = server
        else:
            server.stop()

    def stop(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None


def environment() -> dict[str, str]:
    """Of a process that runs what is in this tree, and says at once what it has to say."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}


def serve(fork: bool, imports: Sequence[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for pytest
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in imports:
        with contextlib.suppress(ImportError):  # whoever needs it will say so
            importlib.import_module(name)
    print(READY.decode(), file=answers, flush=True)
    gc.freeze()  # what is there stays: every collection before a timing would look at it
    for line in sys.stdin:
        request = json.loads(line)
        if not fork:
            status = _run(request)
        elif process := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        else:
            os._exit(_run(request))
        print(status, file=answers, flush=True)
        if not fork:
            os._exit(status)


def _run(request: dict[str, Any]) -> int:
    import pytest

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(request["variables"])
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        return int(pytest.main(request["arguments"]))
    except KeyboardInterrupt:
        return int(pytest.ExitCode.INTERRUPTED)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


if __name__ == "__main__":
    serve(sys.argv[1] == "fork", sys.argv[2:])
