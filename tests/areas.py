"""All that concerns one area: `make check AREA=attention`.

    python -m tests.areas attention

An area is how names of files begin: tests/test_attention.py and bench/bench_attention.py. Where none begins so, it is a
module or a folder of ours, and its tests are those that import it (`product`, `data`, `families`). Tests of kernels run
twice, at the same time: as they are, and in Triton's interpreter.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = sorted([*ROOT.glob("tests/test_*.py"), *ROOT.glob("bench/bench_*.py")])
SOURCES = [*ROOT.glob("fastbert/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("bench/*.py")]


def files_of(area: str) -> list[Path]:
    return [path for path in TESTS if _stem(path).startswith(area)] or importing(area)


def importing(area: str) -> list[Path]:
    return [path for path in TESTS if area in _imported(path)]


def areas() -> list[str]:
    """Every name that has tests; not each beginning of one."""
    parts = {part.strip("_") for path in SOURCES for part in path.relative_to(ROOT).with_suffix("").parts}
    modules = {name for name in parts if not name.startswith(("bench_", "fastbert", "main"))}
    return sorted({_stem(path) for path in TESTS} | {name for name in modules if importing(name)})


def _stem(path: Path) -> str:
    return path.stem.partition("_")[2]


def _imported(path: Path) -> set[str]:
    """The names in what a file imports of ours, without underscores in front."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        names |= {
            part.strip("_") for name in found if name.startswith(("fastbert", "bench")) for part in name.split(".")
        }
    return names


def main() -> int:
    area = sys.argv[1] if len(sys.argv) == 2 else ""
    files = files_of(area) if area else []
    if not files:
        print(f"{'no area ' + area if area else 'which AREA?'}; there are: {', '.join(areas())}", file=sys.stderr)
        return 2
    start = time.monotonic()
    paths = [str(path.relative_to(ROOT)) for path in files]
    print(f"{area}: {' '.join(paths)}", flush=True)
    kernels = [str(path.relative_to(ROOT)) for path in files if "mark.kernel" in path.read_text()]
    alone = [] if kernels or importlib.util.find_spec("xdist") is None else ["-n", "2", "--dist", "worksteal"]
    calls = [(paths + alone, "0")] + ([(["-m", "kernel and not plain", *kernels], "1")] if kernels else [])
    running = [_pytest(arguments, interpret, last=n > 0) for n, (arguments, interpret) in enumerate(calls)]
    status = 0
    for process in running:
        said = process.communicate()[0]
        if said:
            print(f"\nin Triton's interpreter:\n{said}", end="")
        status = status or process.returncode
    print(f"{area}: {'ok' if status == 0 else 'FAILED'}, {time.monotonic() - start:.0f} s")
    return status


def _pytest(arguments: list[str], interpret: str, last: bool) -> "subprocess.Popen[str]":
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE if last else None)


if __name__ == "__main__":
    sys.exit(main())
