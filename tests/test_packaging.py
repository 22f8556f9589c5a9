"""What is built and how it is described: sources, packages, the README on a package index, and what is said without."""

import os
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fastbert import cli, errors
from fastbert.data import masking
from fastbert.errors import InputError
from tests.stores import FABLES

ROOT = Path(__file__).parents[1]
SETUP = runpy.run_path(str(ROOT / "setup.py"))
REPOSITORY = "https://example.org/us/it"
BLOB, RAW = f"{REPOSITORY}/blob/HEAD", f"{REPOSITORY}/raw/HEAD"


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("markdown", "expected"),
    [
        ("[a](docs/a.md) [b](docs/b.md#part)", f"[a]({BLOB}/docs/a.md) [b]({BLOB}/docs/b.md#part)"),
        ("![x](x/y.png)", f"![x]({RAW}/x/y.png)"),
        ("[![x](x.svg)](LICENSE)", f"[![x]({RAW}/x.svg)]({BLOB}/LICENSE)"),
        ('<source media="(a: b)" srcset="x.svg">', f'<source media="(a: b)" srcset="{RAW}/x.svg">'),
        ('<img alt="x" src="x.svg">', f'<img alt="x" src="{RAW}/x.svg">'),
        ('<a href="docs/a.md">', f'<a href="{BLOB}/docs/a.md">'),
    ],
)
def test_relative_links_become_absolute(markdown: str, expected: str) -> None:
    assert SETUP["absolute_links"](markdown, REPOSITORY) == expected


@pytest.mark.parametrize(
    "markdown",
    [
        "[a](https://example.org/a) [b](#part) [c](mailto:a@b.c) [d](/root) ![e](http://example.org/e.png)",
        "```python\nmodel[name](path)\n```",
        "`x[i](y)`",
        "a (b) [c] d",
    ],
)
def test_all_else_stays(markdown: str) -> None:
    assert SETUP["absolute_links"](markdown, REPOSITORY) == markdown


def test_what_the_readme_links_to_is_there(project: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    readme, repository = SETUP["readme"](), project["project"]["urls"]["Repository"]
    ours = re.findall(rf"{re.escape(repository)}/(?:blob|raw)/HEAD/([^)\"\s#]+)", readme)
    assert len(ours) >= 5
    assert [path for path in ours if not (ROOT / path).exists()] == []


def test_every_folder_is_packaged(project: dict[str, Any]) -> None:
    folders = {"fastbert", "fastbert.kernels"}  # a link, which a walk does not follow
    for folder, _, files in os.walk(ROOT / "fastbert"):
        if files and not folder.endswith("__pycache__"):
            folders.add(str(Path(folder).relative_to(ROOT)).replace("/", "."))
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_without_the_extension_masking_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_C", None)
    with pytest.raises(InputError, match=r"masking needs fastbert's C\+\+ extension.*get a C\+\+ compiler"):
        masking.Masker(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("command", [f"prepare {FABLES} -o {{}} --train-vocab 600", "pretrain --data . -o {}"])
def test_windows_is_told_what_it_lacks(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "sys", SimpleNamespace(platform="win32"))
    with pytest.raises(InputError, match="needs Linux or macOS"):
        CliRunner().invoke(cli.app, command.format(tmp_path / "out").split(), catch_exceptions=False)
    assert not list(tmp_path.iterdir())
