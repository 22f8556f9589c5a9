"""The shape of the repository is part of its contract."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

from fastbert import _library, functional, reference  # noqa: F401  functional registers every operator
from tests import faults

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("reference", "reference_encoder", "_C", "errors", "hub", "machine", "terminal"),
    ("_library",),
    ("kernels",),
    ("functional", "packing", "touched"),
    ("encoder", "prepared", "prepared_int8", "survey"),
    ("families",),
    ("models", "patching", "warmup", "data"),
    ("inference", "verify", "demo"),
    ("training", "tasks"),
    ("commands", "cli", "__main__"),
)
OPERATORS = sorted(_library.backends("cpu"))
STEMS = sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_"))


def _layer(module: str) -> int:
    """The layer of `fastbert.X...`; `fastbert` itself, the public names, lies below the command line only."""
    parts = module.split(".")
    if len(parts) == 1:
        return len(LAYERS) - 4
    return next(i for i, names in enumerate(LAYERS) if parts[1] in names)


def _imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {m for m in submodules if (ROOT / m.replace(".", "/")).exists() or _source(m).exists()}
            known |= {m for m in submodules if m == "fastbert._C"}
            found |= known if known else {node.module}
    return {module for module in found if module.split(".")[0] in ("fastbert", "bench", "tests", "conformance")}


def _source(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


SOURCES = sorted(p.relative_to(ROOT) for p in (ROOT / "fastbert").rglob("*.py") if p != ROOT / "fastbert/__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_only_downwards(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    for imported in _imports(ROOT / path):
        assert imported.startswith("fastbert"), f"{path} imports {imported}"
        assert _layer(imported) <= _layer(module), f"{path} imports {imported}, which lies above it"


def test_the_reference_needs_nothing_of_ours() -> None:
    assert not _imports(ROOT / "fastbert/reference.py")
    assert _imports(ROOT / "fastbert/reference_encoder.py") == {"fastbert.reference"}
    for name in ("reference", "reference_encoder"):
        assert "transformers" not in (ROOT / f"fastbert/{name}.py").read_text().split("import", 1)[1]


def test_kernels_is_a_plain_folder_behind_a_link() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's `kernels`"
    assert (ROOT / "fastbert/kernels").is_symlink()
    assert (ROOT / "fastbert/kernels").resolve() == ROOT / "kernels"


def test_there_are_operators() -> None:
    assert {f"{name}_{way}" for name in ("attention", "embedding", "layer_norm") for way in ("fwd", "bwd")} <= set(
        OPERATORS
    )
    assert len(STEMS) >= 5


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_and_reference_have_the_same_arguments(name: str) -> None:
    specification = getattr(reference, name.replace("_bwd", "_backward").removesuffix("_fwd"))
    schema = getattr(torch.ops.fastbert, name).default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(specification).parameters)


@pytest.mark.parametrize("stem", STEMS)
def test_every_operator_has_a_test_and_a_bench(stem: str) -> None:
    defined = [name for name in OPERATORS if f'"{name}(' in (ROOT / f"kernels/{stem}.py").read_text()]
    assert defined
    tests = (ROOT / f"tests/test_{stem}.py").read_text()
    for name in defined:
        assert name in tests, f"tests/test_{stem}.py does not test {name}"
    assert (ROOT / f"bench/bench_{stem}.py").exists()


def test_planted_faults_have_a_place_in_the_tree() -> None:
    stale = {fault["old"]: faults.why_stale(fault["file"], fault["old"]) for fault in faults.planted()}
    assert not {old: why for old, why in stale.items() if why}
