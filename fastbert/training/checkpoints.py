"""Checkpoints that are there whole or not at all."""

import os
import re
import shutil
import sys
from pathlib import Path

RUN = "run.json"  # in the run's folder: what the run is
LOG = "log.jsonl"
DRAFTS = ".writing"  # in the run's folder: a checkpoint until it is whole
STATE = "data.json"  # in a checkpoint: where its next step begins in the corpus


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps."""
    found = _checkpoints(run)
    return found[-1] if found else None


def remove_drafts(run: Path) -> None:
    """What a run that was killed left behind."""
    shutil.rmtree(run / DRAFTS, ignore_errors=True)


def publish(draft: Path, target: Path) -> None:
    """Give a folder its name, once all that is in it is on the disk."""
    for file in sorted(draft.rglob("*")):
        if file.is_file():
            flush(file)
    for folder in sorted((path for path in draft.rglob("*") if path.is_dir()), reverse=True):
        flush(folder)
    flush(draft)
    if target.exists():
        shutil.rmtree(target)
    os.rename(draft, target)
    flush(target.parent)


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
