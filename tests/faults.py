"""Prove that the tests bite: put one fault at a time into a copy of this tree, and see whether they catch it.

    python -m tests.faults [--only attention]

The faults stand in tests/faults*.toml, as [[fault]] tables: in `file` the text `old`, which must occur there exactly
once, becomes `new`; then `tests`, arguments of pytest, must fail, with the kernels interpreted. They must pass without
the fault, and fail for what it computes: a name that is not defined is no fault. Fails if one survives.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest has it there

ROOT = Path(__file__).parents[1]
SECONDS = 900  # a fault may make a loop endless
UNCOPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "results")
WRITTEN_WRONG = re.compile(r"\b(SyntaxError|IndentationError|NameError|ImportError)\b")


def run(tests: str, file: str = "", text: str = "") -> tuple[int, str]:
    """pytest's exit status and output, in a fresh copy of the tree where `file` has this text."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory).resolve() / "tree"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=UNCOPIED)
        if file:
            (copy / file).write_text(text)
        environment = os.environ | {"PYTHONPATH": str(copy), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

        def python(*arguments: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, *arguments]
            return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=SECONDS)

        imported = python("-c", "import importlib.util as u; print(u.find_spec('fastbert').origin)").stdout
        assert imported.strip() == str(copy / "fastbert/__init__.py"), f"the copy is not what is tested: {imported}"
        try:
            done = python("-m", "pytest", "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *shlex.split(tests))
        except subprocess.TimeoutExpired:
            return 1, f"not done after {SECONDS} s"
        return done.returncode, done.stdout + done.stderr


@cache
def passes(tests: str) -> bool:
    return run(tests)[0] == 0


def planted() -> list[dict[str, str]]:
    """All that stand in the lists."""
    files = sorted(ROOT.glob("tests/faults*.toml"))
    return [fault for path in files for fault in tomllib.loads(path.read_text())["fault"]]


def why_stale(file: str, old: str) -> str | None:
    """Why there is nothing to replace, or None."""
    path = ROOT / file
    times = path.read_text().count(old) if path.exists() else 0
    return None if times == 1 else f"the text occurs {times} times"


def verdict(file: str, old: str, new: str, tests: str) -> str:
    """caught, SURVIVED, or why the entry itself is wrong."""
    if stale := why_stale(file, old):
        return f"STALE: {stale}"
    text = (ROOT / file).read_text()
    if not passes(tests):
        return "BROKEN: the tests fail without it"
    status, output = run(tests, file, text.replace(old, new))
    if status == 0:
        return "SURVIVED"
    wrong = WRITTEN_WRONG.search(output)
    return f"BROKEN: {wrong[0] if wrong else f'pytest exits with {status}'}" if wrong or status != 1 else "caught"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the entry: its file, texts or tests")
    only = parser.parse_args().only
    faults = [fault for fault in planted() if any(only in text for text in fault.values())]
    caught = 0
    for fault in faults:
        result = verdict(**fault)
        caught += result == "caught"
        print(f"{fault['file']}: {fault['old'].strip()!r} -> {fault['new'].strip()!r}\n    {result}", flush=True)
    print(f"{caught} of {len(faults)} caught")
    return int(not faults or caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())
