"""What is written from the code, and may be out of date: the README's table of families, the stub of the classes."""

from pathlib import Path

import fastbert
from fastbert.families.__main__ import models, stub, table

ROOT = Path(__file__).parents[1]


def test_the_readme_has_the_families() -> None:
    section = (ROOT / "README.md").read_text().partition("<!-- report: families -->\n")[2]
    assert section.partition("<!-- /report -->")[0] == table() + "\n", "make report"


def test_the_stub_has_the_classes() -> None:
    path = ROOT / "fastbert" / "models.pyi"
    assert path.read_text() == stub(), "python -m fastbert.families --stub > fastbert/models.pyi"


def test_fastbert_exports_them() -> None:
    names = [name for of in models().values() for name in of]
    assert len(names) == len(set(names)) > 70
    for name in names:
        assert getattr(fastbert, name).__name__ == name
    assert set(names) < set(fastbert.__all__) <= set(dir(fastbert))
