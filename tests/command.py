"""The command line in this process, as users meet it."""

import io
import sys
from collections.abc import Callable

import pytest

from fastbert import cli

Run = Callable[..., tuple[int, str, str]]


def runner(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`fastbert` with these arguments: exit status, stdout, stderr."""

    def run(*arguments: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = 0 if end.code is None else int(end.code)
        return (status, *capsys.readouterr())

    return run


def is_one_line(stderr: str) -> bool:
    return stderr.startswith("fastbert: ") and stderr.count("\n") == 1
