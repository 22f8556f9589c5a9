"""Runs transformers' own model tests on fastbert's classes, family by family.

The tests come from the sdist of the installed transformers version. A test that does not pass on fastbert's classes
runs on transformers' own: if it passes there, it has to on fastbert as well, unless ``exclusions.toml`` names it. The
exit status is 1 when it does not, when an exclusion is stale, or when so few tests of a family pass that they say
nothing.
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
from collections.abc import Iterable, Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # a dependency of pytest there

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".conformance"
STOCK, FAST = "transformers", "fastbert"
MINIMUM_PASSED = 85  # of each family
FAMILIES = HERE.parent / "fastbert" / "families"
ALIKE = ("camembert", "data2vec_text", "xlm_roberta")  # RoBERTa by another name, of the same table of roles
SEVERITY = ("passed", "skipped", "failed")
Results = dict[str, tuple[str, str]]  # class::test -> (one of SEVERITY, first line of the message)
Run = tuple[Path, "subprocess.Popen[bytes]"]  # where its log goes


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


def start(library: str, sources: Path, families: Sequence[str], tests: Iterable[str] = ()) -> Run:
    """Starts the tests of families, or some of them, away from the configuration and the tests of this repository."""
    log = CACHE / f"{library}-{families[0]}.log"
    environment = os.environ | {
        "FASTBERT_CONFORMANCE": " ".join([library, *families]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(sources), os.environ.get("PYTHONPATH")])),
    }
    environment.pop("PYTEST_ADDOPTS", None)
    file = str(HERE / "test_families.py")
    chosen = [f"{file}::{test}" for test in tests] or [file]
    command = [sys.executable, "-m", "pytest", *chosen, f"--junitxml={log.with_suffix('.xml')}"]
    command += ["-c", os.devnull, f"--rootdir={sources}", f"--confcutdir={HERE}", "--import-mode=importlib"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "--disable-warnings", "--tb=short", "-q"]
    log.with_suffix(".xml").unlink(missing_ok=True)
    with log.open("wb") as output:
        return log, subprocess.Popen(command, cwd=sources, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(runs: Sequence[Run], deadline: float) -> Results:
    """Waits for the tests and returns how each of them went."""
    results: Results = {}
    try:
        for log, process in runs:
            results |= results_of(log, process, deadline - time.monotonic())
    finally:
        for _, process in runs:
            process.kill()
    return results


def results_of(log: Path, process: subprocess.Popen[bytes], seconds: float) -> Results:
    try:
        status = str(process.wait(max(seconds, 0)))
    except subprocess.TimeoutExpired:
        status = "timeout"
    report = log.with_suffix(".xml")
    if status not in ("0", "1") or not report.exists():
        tail = log.read_text("utf-8", "replace").splitlines()[-40:]
        sys.exit("\n".join([*tail, f"the tests in {log} did not finish: pytest ended with {status}"]))
    results: Results = {}
    for case in ET.parse(report).iter("testcase"):
        outcomes = [("passed", "")]
        for child in case:  # one for each subtest that did not pass: the worst counts
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                outcomes.append((outcome, next(iter(child.get("message", "").splitlines()), "")))
        name = f"{case.attrib['classname'].rpartition('.')[2]}::{case.attrib['name']}"
        results[name] = max(outcomes, key=lambda o: SEVERITY.index(o[0]))
    return results


def compare(stock: Results, fast: Results, exclusions: dict[str, str]) -> int:
    """Prints the comparison and returns the exit status. stock: of the tests that do not pass on fastbert."""
    cases = {name.partition("::")[0]: Counter[str]() for name in fast}
    for name, (outcome, _) in fast.items():
        cases[name.partition("::")[0]][outcome] += 1
    print(f"\n{'on fastbert':<32}" + "".join(f"{outcome:>9}" for outcome in SEVERITY))
    for case, counts in cases.items():
        print(f"{case:<32}" + "".join(f"{counts[outcome]:>9}" for outcome in SEVERITY))

    lost = {name for name, (outcome, _) in stock.items() if outcome == "passed"}
    regressions = lost - exclusions.keys()
    mine = {name for name in exclusions if name.partition("::")[0] in cases}
    stale = {name for name in mine if name not in lost}
    for name, (outcome, message) in fast.items():
        if outcome == "failed" and name not in lost:
            print(f"fails on transformers too: {name}: {message}")
    for name in sorted(lost & exclusions.keys()):
        print(f"excluded: {name}: {exclusions[name]}")
    for name in sorted(regressions):
        print(f"{fast[name][0]} on fastbert, passes on transformers: {name}: {fast[name][1]}")
    if regressions:
        print(f"the tracebacks are in {CACHE / FAST}-*.log")
    for name in sorted(stale):
        print(f"stale exclusion: {name} {'is no loss' if name in fast else 'does not exist'}")
    few = {case for case, counts in cases.items() if counts["passed"] < MINIMUM_PASSED}
    for case in sorted(few):
        print(f"only {cases[case]['passed']} tests of {case} pass, at least {MINIMUM_PASSED} should")
    print(f"{sum(counts['passed'] for counts in cases.values())} passed, {len(regressions)} failed")
    return int(bool(regressions or stale or few))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sdist", type=Path, help="an sdist of transformers, or the folder of an unpacked one")
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for the tests (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="all families, in all classes; else BERT, others in brief")
    parser.add_argument("--families", nargs="+", metavar="FAMILY", help="only these, in all classes")
    arguments = parser.parse_args()

    families = sorted(path.stem for path in FAMILIES.glob("[!_]*.py"))
    if unknown := set(arguments.families or ()) - set(families):
        sys.exit(f"no such family: {', '.join(sorted(unknown))}. There are {', '.join(families)}")
    exclusions = tomllib.loads((HERE / "exclusions.toml").read_text("utf-8"))["exclusions"]
    sources = find_sources(arguments.sdist)
    deadline = time.monotonic() + arguments.timeout
    if arguments.all or arguments.families:
        chosen = arguments.families or families
        groups = [group for group in (chosen[::2], chosen[1::2]) if group]
    else:
        groups = [["bert"], [f"{family}-" for family in families if family not in ("bert", *ALIKE)]]
    fast = finish([start(FAST, sources, group) for group in groups], deadline)
    open_ = [name for name, (outcome, _) in fast.items() if outcome != "passed"]
    every = [family for group in groups for family in group]
    stock = finish([start(STOCK, sources, every, open_)], deadline) if open_ else {}
    return compare(stock, fast, exclusions)


if __name__ == "__main__":
    sys.exit(main())
