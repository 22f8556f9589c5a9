"""python -m fastbert.families: which families and classes there are, as a table for the README.

With --stub: what `fastbert/models.pyi` must say, so that editors and type checkers know the classes.
"""

import importlib
import re
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
    """Markdown: the classes that all families have, and a row a family, with those that it has besides."""
    found = models()
    ends = {family: [_end(name, names[0]) for name in names] for family, names in found.items()}
    shared = set.intersection(*map(set, ends.values()))
    rows = []
    for family, names in found.items():
        about = (importlib.import_module(f"fastbert.families.{family}").__doc__ or "").partition("\n")[0]
        name = re.sub(r" \(.*?(https?://[^)]+)\)", r"](\1)", f"[{about.rstrip('.')}", count=1)
        besides = ", ".join(sorted(set(ends[family]) - shared))
        rows.append(f"| {name} | `{names[0].removesuffix('Model')}` | {besides} |")
    head = f"All have {', '.join(sorted(shared))}."
    return "\n".join([head, "", "| family | classes begin with | and besides |", "| --- | --- | --- |", *rows])


def _end(name: str, model: str) -> str:
    end = name.removeprefix(model.removesuffix("Model")).removeprefix("For")
    return "CausalLM" if end == "LMHeadModel" else end


def stub() -> str:
    """A module that re-exports transformers' classes of the same names."""
    names = sorted(name for of in models().values() for name in of)
    return _STUB + "\n" + "\n".join(f"from transformers import {name} as {name}" for name in names) + "\n"


if __name__ == "__main__":
    print(stub() if sys.argv[1:] == ["--stub"] else table(), end="" if sys.argv[1:] else "\n")
