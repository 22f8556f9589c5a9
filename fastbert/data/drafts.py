"""Files and folders that appear at once, whole: made under a hidden name, brought to the disk, renamed."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Drafts:
    """What one writer makes in a folder.

    Attributes:
        key: of the writer. What it left behind when it was killed, the next with this key clears.
    """

    folder: Path
    key: str

    def clear(self) -> None:
        for draft in self.folder.glob(f".*.{self.key}.*.tmp"):
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)

    def json(self, name: str, content: object) -> None:
        """Write a file, in place of one that is there."""
        with self._draft(name) as draft:
            draft.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            self.publish(draft, name)

    @contextlib.contextmanager
    def directory(self, name: str) -> Iterator[Path]:
        """A folder to write files into, which takes the place of one that is there."""
        with self.scratch(name) as draft:
            yield draft
            for file in draft.iterdir():
                _to_disk(file)
            _to_disk(draft)
            while True:
                try:
                    os.rename(draft, self.folder / name)
                    break
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
                with self._draft(name) as old, contextlib.suppress(FileNotFoundError):
                    os.rename(self.folder / name, old)
            _to_disk(self.folder)

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder for the time being."""
        with self._draft(name) as draft:
            draft.mkdir()
            yield draft

    def publish(self, file: Path, name: str) -> None:
        """Give a file its name, in place of one that is there."""
        _to_disk(file)
        os.replace(file, self.folder / name)
        _to_disk(self.folder)

    @contextlib.contextmanager
    def _draft(self, name: str) -> Iterator[Path]:
        """A hidden path for a file or a folder. What is there at the end is removed."""
        draft = self.folder / f".{name}.{self.key}.{secrets.token_hex(4)}.tmp"
        try:
            yield draft
        finally:
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    if sys.platform == "win32":  # flushes only what is open for writing, and no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
