"""Runs transformers' own model tests on fastbert's BERT classes, next to the same tests on stock BERT.

The tests come from the sdist of the installed transformers version. A test that passes on stock BERT has to pass on
fastbert as well, unless ``exclusions.toml`` names it. The exit status is 1 when one does not, when an exclusion is
stale, or when so few tests pass on stock BERT that the comparison says nothing.
"""

import argparse
import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".conformance"
STOCK, FAST = "transformers", "fastbert"
MINIMUM_PASSED = 95
SEVERITY = ("passed", "skipped", "failed")
Results = dict[str, tuple[str, str]]  # test name -> (one of SEVERITY, first line of the message)


def unpack(sdist: Path, target: Path) -> None:
    """Puts the ``tests`` package of an sdist, a file or an unpacked folder, into ``target``."""
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        scratch = Path(name)
        if sdist.is_file():
            with tarfile.open(sdist) as archive:
                members = [m for m in archive.getmembers() if Path(m.name).parts[1:2] in [("tests",), ("PKG-INFO",)]]
                archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not in Python 3.11.0 to 3.11.3
                archive.extractall(scratch, members)
            sdist = next(path for path in scratch.iterdir() if path.is_dir())
        if f"\nVersion: {target.name.partition('-')[2]}\n" not in (sdist / "PKG-INFO").read_text("utf-8"):
            sys.exit(f"{sdist} is not an sdist of {target.name}, the version that is installed")
        package = scratch / "new" / "tests"
        shutil.copytree(sdist / "tests", package)
        (package / "__init__.py").touch()  # so that no other package named tests comes first
        stub_missing_modules(package)
        shutil.rmtree(target, ignore_errors=True)
        package.parent.rename(target)


def stub_missing_modules(package: Path) -> None:
    """Writes empty classes for the test mixins that an sdist leaves out, for it has no subpackages of ``tests``."""
    tree = ast.parse((package / "test_modeling_common.py").read_text("utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level != 1 or node.module is None:
            continue
        module = package.joinpath(*node.module.split("."))
        if module.is_dir() or module.with_suffix(".py").exists():
            continue
        module.parent.mkdir(parents=True, exist_ok=True)
        module.with_suffix(".py").write_text("".join(f"class {alias.name}: ...\n" for alias in node.names), "utf-8")


def find_sources(sdist: Path | None) -> Path:
    """Returns the folder that holds transformers' ``tests`` package, after a download if need be."""
    CACHE.mkdir(exist_ok=True)
    version = importlib.metadata.version("transformers")
    target = CACHE / f"transformers-{version}"
    if sdist is not None:
        unpack(sdist, target)
    elif not target.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", folder]
            subprocess.run([sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"], check=True)
            unpack(next(Path(folder).glob("*.tar.gz")), target)
    return target


def start(library: str, sources: Path) -> subprocess.Popen[bytes]:
    """Starts the tests on one library's classes, away from the configuration and the tests of this repository."""
    environment = os.environ | {
        "FASTBERT_CONFORMANCE": library,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(sources), os.environ.get("PYTHONPATH")])),
    }
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", str(HERE / "test_bert.py"), f"--junitxml={CACHE / library}.xml"]
    command += ["-c", os.devnull, f"--rootdir={sources}", f"--confcutdir={HERE}", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "--disable-warnings", "--tb=short", "-q"]
    (CACHE / f"{library}.xml").unlink(missing_ok=True)
    with (CACHE / f"{library}.log").open("wb") as log:
        return subprocess.Popen(command, cwd=sources, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(library: str, process: subprocess.Popen[bytes], seconds: float) -> Results:
    """Waits for the tests on one library's classes and returns how each of them went."""
    try:
        status = str(process.wait(max(seconds, 0)))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = "timeout"
    report = CACHE / f"{library}.xml"
    if status not in ("0", "1") or not report.exists():
        tail = (CACHE / f"{library}.log").read_text("utf-8", "replace").splitlines()[-40:]
        sys.exit("\n".join([*tail, f"the tests on {library} did not finish: pytest ended with {status}"]))
    results: Results = {}
    for case in ET.parse(report).iter("testcase"):
        outcomes = [("passed", "")]
        for child in case:  # one for each subtest that did not pass: the worst counts
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                outcomes.append((outcome, next(iter(child.get("message", "").splitlines()), "")))
        results[case.attrib["name"]] = max(outcomes, key=lambda o: SEVERITY.index(o[0]))
    return results


def compare(stock: Results, fast: Results, exclusions: dict[str, str]) -> int:
    """Prints the comparison and returns the exit status."""
    print(f"\n{'':<14}" + "".join(f"{outcome:>9}" for outcome in SEVERITY))
    for library, results in ((STOCK, stock), (FAST, fast)):
        counts = Counter(outcome for outcome, _ in results.values())
        print(f"{library:<14}" + "".join(f"{counts[outcome]:>9}" for outcome in SEVERITY))
    for name, (outcome, message) in stock.items():
        if outcome == "failed":
            print(f"fails on stock BERT: {name}: {message}")

    passed = {name for name, (outcome, _) in stock.items() if outcome == "passed"}
    lost = {name: fast.get(name, ("missing", "")) for name in passed}
    lost = {name: outcome for name, outcome in lost.items() if outcome[0] != "passed"}
    regressions = lost.keys() - exclusions.keys()
    stale = {name for name in exclusions if name not in stock or fast.get(name, ("", ""))[0] == "passed"}
    for name in sorted(lost.keys() & exclusions.keys()):
        print(f"excluded: {name}: {exclusions[name]}")
    for name in sorted(regressions):
        print(f"{lost[name][0]} on fastbert, passes on stock BERT: {name}: {lost[name][1]}")
    if regressions:
        print(f"the tracebacks are in {CACHE / FAST}.log")
    for name in sorted(stale):
        print(f"stale exclusion: {name} {'passes' if name in stock else 'does not exist'}")
    if len(passed) < MINIMUM_PASSED:
        print(f"only {len(passed)} tests pass on stock BERT, at least {MINIMUM_PASSED} should")
    print(f"{sum(outcome == 'passed' for outcome, _ in fast.values())} passed, {len(regressions)} failed")
    return int(bool(regressions or stale or len(passed) < MINIMUM_PASSED))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="an sdist of transformers, or the folder of an unpacked one")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for the tests (default: %(default)s)")
    arguments = parser.parse_args()

    exclusions = tomllib.loads((HERE / "exclusions.toml").read_text("utf-8"))["exclusions"]
    sources = find_sources(arguments.sdist)
    deadline = time.monotonic() + arguments.timeout
    processes = {library: start(library, sources) for library in (STOCK, FAST)}
    try:
        stock, fast = (finish(name, process, deadline - time.monotonic()) for name, process in processes.items())
    finally:
        for process in processes.values():
            process.kill()
    return compare(stock, fast, exclusions)


if __name__ == "__main__":
    sys.exit(main())
