"""Every command of README, docs and CONTRIBUTING is one that there is, with options that it has."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

typer = pytest.importorskip("typer", reason="needs typer")

from bench.__main__ import app as bench_app  # noqa: E402
from fastbert.cli import app  # noqa: E402

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LAUNCHER = re.compile(r"^torchrun .*?-m fastbert |^python -m fastbert ")


def _lines(page: Path) -> Iterator[str]:
    """Of blocks of bash, without comments; a command that goes on in the next line is one."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.sub(r"(^|\s)#.*", "", line).split("&&"):
                yield part.split(" | ", 1)[-1].strip() if " | fastbert " in part else part.strip()


def _commands(prefix: str) -> list[tuple[str, str]]:
    found = [(page.name, _LAUNCHER.sub("fastbert ", line)) for page in PAGES for line in _lines(page)]
    return [(page, line) for page, line in found if line.startswith(f"{prefix} ")]


def _alternatives(line: str) -> list[list[str]]:
    """Of `fastbert a | b MODEL`: a command each."""
    words = shlex.split(line)[1:]
    names = [words[0]]
    while words[1:2] == ["|"]:
        names.append(words[2])
        words = words[2:]
    return [[name, *words[1:]] for name in names]


def _check(command: object, arguments: list[str]) -> None:
    """Parses, converts and checks; calls nothing."""
    name, *rest = arguments
    known = command.commands  # type: ignore[attr-defined]
    assert name in known, f"there is no command {name}"
    if rest:
        known[name].make_context(name, rest)


@pytest.mark.parametrize(("page", "line"), _commands("fastbert"))
def test_commands_of_fastbert(page: str, line: str) -> None:
    for arguments in _alternatives(line):
        _check(typer.main.get_command(app), arguments)


@pytest.mark.parametrize(("page", "line"), _commands("python -m bench"))
def test_commands_of_the_bench(page: str, line: str) -> None:
    _check(typer.main.get_command(bench_app), shlex.split(line)[3:])


@pytest.mark.parametrize(("page", "line"), _commands("make"))
def test_targets_of_make(page: str, line: str) -> None:
    target = line.split()[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_there_are_many() -> None:
    """So that a page which is written otherwise does not pass unseen."""
    assert len(_commands("fastbert")) > 50
    assert len(_commands("make")) > 5
