"""Checkpoints that are there whole or not at all."""

import os
import re
import shutil
import sys
from pathlib import Path

DRAFTS = ".writing"  # in the run's folder: a checkpoint until it is whole
STATE = "data.json"  # in a checkpoint: where its next step begins in the corpus
_BEFORE = "before-"  # among the drafts: what had the name before


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps."""
    found = _checkpoints(run)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def remove_drafts(run: Path) -> None:
    """What a run that was killed left behind, but for what had just lost its name to something that got none."""
    for old in (run / DRAFTS).glob(f"{_BEFORE}*"):
        name = old.name.removeprefix(_BEFORE)
        if not (run / name).exists():
            os.rename(old, run / name)
    shutil.rmtree(run / DRAFTS, ignore_errors=True)


def publish(draft: Path, target: Path) -> None:
    """Give a folder, among the drafts, its name, once all that is in it is on the disk.

    What has that name is there until then, or is what `remove_drafts` gives the name back to.
    """
    for file in sorted(draft.rglob("*")):
        if file.is_file():
            flush(file)
    for folder in sorted((path for path in draft.rglob("*") if path.is_dir()), reverse=True):
        flush(folder)
    flush(draft)
    before = draft.with_name(f"{_BEFORE}{target.name}")
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        os.rename(target, before)
    os.rename(draft, target)
    flush(target.parent)
    shutil.rmtree(before, ignore_errors=True)


def rotate(run: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints; each loses its name first."""
    for old in _checkpoints(run)[:-keep]:
        doomed = run / DRAFTS / f"old-{old.name}"
        doomed.parent.mkdir(exist_ok=True)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def why_not_written(error: BaseException) -> str:
    """In a line. What PyTorch says of a disk that is full is about its own file format."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return "PyTorch could not write all of a file: is the disk full?" if "inline_container" in line else line


def flush(path: Path) -> None:
    if sys.platform == "win32":  # flushes only what is open for writing, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checkpoints(run: Path) -> list[Path]:
    found = {
        int(match[1]): path
        for path in (run.iterdir() if run.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    }
    return [found[step] for step in sorted(found)]
