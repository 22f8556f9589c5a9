"""python -m fastbert.families: which families and classes there are, as a table for the README.

With --stub: what `fastbert/models.pyi` must say, so that editors and type checkers know the classes.
"""

import importlib
import sys

from transformers import PreTrainedModel

from fastbert.families import CLASSES, FAMILIES

_STUB = '"""Written by `python -m fastbert.families --stub`: the interfaces are transformers\' own."""\n'


def models() -> dict[str, list[str]]:
    """The classes that one can load, by family."""
    found: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for stock, fast in CLASSES.items():
        if issubclass(stock, PreTrainedModel):
            found[fast.__module__.rpartition(".")[2]].append(stock.__name__)
    return found


def table() -> str:
    """Markdown, a row a family, its heads without the family's name."""
    rows = ["| family | classes |", "| --- | --- |"]
    for family, names in models().items():
        about = (importlib.import_module(f"fastbert.families.{family}").__doc__ or "").partition("\n")[0]
        prefix = names[0].removesuffix("Model")
        heads = sorted(name.removeprefix(prefix) for name in names)
        rows.append(f"| {about.rstrip('.')} | `{prefix}`: {', '.join(heads)} |")
    return "\n".join(rows)


def stub() -> str:
    """A module that re-exports transformers' classes of the same names."""
    names = sorted(name for of in models().values() for name in of)
    return _STUB + "\n" + "\n".join(f"from transformers import {name} as {name}" for name in names) + "\n"


if __name__ == "__main__":
    print(stub() if sys.argv[1:] == ["--stub"] else table(), end="" if sys.argv[1:] else "\n")
