"""Files of results that are whole or not there, and that a killed run goes on with."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch.nn import Module

import fastbert
from fastbert.data.drafts import Drafts
from fastbert.errors import InputError
from fastbert.inference.formats import MADE, Format
from fastbert.inference.inputs import Row
from fastbert.inference.stream import Window

_JOB, _DATA, _WINDOWS = "job.json", "data", "windows.jsonl"
_KEY = "fastbert"
_SAMPLE = 1024


class Refused(InputError):
    """What is left of a run cannot be gone on with."""


class Output:
    """A file that appears at the end. Until then its windows lie in the folder OUT.parts beside it.

    There, `data` holds the rows, and `windows.jsonl` says after each window how far they go: what is behind that was
    being written when the run was killed, and is written again. `job.json` says what the run was asked for.

    Args:
        path: where it appears.
        format: what is written: see `formats`.
        resume: go on with what is there of a run that did not end.
        force: leave nothing of that, and take the place of a file that is there.

    Attributes:
        parts: the folder.
        windows: of each that is written what `add` was told of it, and its rows.
        before: how many of these an earlier run wrote.
        finished: there is nothing to do: a run with `resume` finds the file whole.

    Raises:
        InputError: if the path cannot be written or holds something already.
    """

    def __init__(self, path: Path, format: Format, *, resume: bool = False, force: bool = False) -> None:
        self.path, self._format, self._force = path, format, force
        self._target = path.resolve()
        self.parts = self._target.with_name(f"{self._target.name}.parts")
        self.windows: list[dict[str, Any]] = []
        self.before = self._compared = 0
        self._model = ""
        self._data: BinaryIO | None = None
        self._log: BinaryIO | None = None
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is no regular file")
        if not self._target.parent.is_dir():
            raise InputError(f"cannot write {path}: there is no directory {self._target.parent}")
        if not os.access(self._target.parent, os.W_OK):
            raise InputError(f"cannot write {path}: nothing may be written in {self._target.parent}")
        self.finished = path.exists() and resume and not self._begun
        if self.finished:  # and killed then
            with contextlib.suppress(OSError):
                self._clear()
        if path.exists() and not (resume or force):
            raise InputError(f"{path} exists: --force takes its place")
        if self._begun and not (resume or force):
            raise InputError(
                f"{self.parts} is left of a run that did not end: --resume goes on with it, --force begins anew"
            )

    @property
    def _begun(self) -> bool:
        return (self.parts / _DATA).exists() and (self.parts / _JOB).exists()

    @property
    def rows(self) -> int:
        """How many are written."""
        return self.total("rows")

    def total(self, name: str) -> int:
        """Of all windows that are written."""
        return sum(window[name] for window in self.windows)

    @property
    def kept(self) -> str:
        """What is said where a run ends early."""
        return f"; {self.rows:,} rows are in {self.parts}: --resume goes on with them" if self.windows else ""

    def begin(self, job: Mapping[str, Any]) -> None:
        """Make the folder, or go on with it.

        Args:
            job: all that the content of the file depends on but the rows, by name: see `job_of`.

        Raises:
            Refused: if that run was asked for something else.
            InputError: if it cannot be written, or another run writes it.
        """
        self._model = str(job.get("model"))
        with self._writing():
            if (self.parts / _DATA).exists():
                self._data = self._locked()
            if self._force or not self._begun:
                self._close()
                self._clear()
                self.parts.mkdir()
                self._data = self._locked()
                Drafts(self.parts, _KEY).json(_JOB, job)
            self._log = (self.parts / _WINDOWS).open("a+b")
            self._go_on(json.loads(json.dumps(job)))

    def skip(self, rows: Sequence[Row]) -> bool:
        """Whether this window, the next one of the input, is written already.

        Raises:
            Refused: if the one that is written was of other rows.
        """
        number = self._compared
        if number >= self.before:
            return False
        self._compared += 1
        if self.windows[number]["digest"] != _digest(rows):
            first = sum(window["rows"] for window in self.windows[:number]) + 1
            raise Refused(
                f"cannot go on with {self.parts}: rows {first:,} to {first + len(rows) - 1:,} were other ones;"
                " --force begins anew"
            )
        return True

    def add(self, window: Window[Row], **about: Any) -> None:
        """Write a window. Raises: InputError, if that cannot be done."""
        assert self._data is not None
        assert self._log is not None
        with self._writing():
            self._data.write(self._format.encode(window.rows, window.results))
            self._data.flush()
            shape = list(getattr(window.results, "shape", (0,))[1:])
            told = {"rows": len(window.rows), "shape": shape, "digest": _digest(window.rows), **about}
            self._log.write(json.dumps({**told, "end": self._data.tell()}).encode() + b"\n")
            self._log.flush()
            self.windows.append(told)

    def finish(self) -> tuple[int, ...]:
        """Bring the file to its place, and say its shape. Raises: InputError, if that cannot be done."""
        assert self._data is not None
        if self._compared < self.before:
            raise Refused(f"cannot go on with {self.parts}: there were more rows; --force begins anew")
        shape = (self.rows, *self.windows[-1]["shape"])
        with self._writing():
            file = self._format.finish(self.parts / _DATA, shape, self._model)
            Drafts(self._target.parent, _KEY).publish(file, self._target.name)
            self._close()
            self._clear()
        return shape

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._data is not None:
            self._close()
            if not self.windows:
                self._clear()

    def _locked(self) -> BinaryIO:
        """The data, which nobody else writes until it is closed, or this process ends, however that happens."""
        file = (self.parts / _DATA).open("a+b")
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise InputError(f"cannot write {self.path}: another run is at it") from None
        return file

    def _go_on(self, job: Mapping[str, Any]) -> None:
        """After the last window that was written whole. Nothing is changed where that cannot be."""
        assert self._data is not None
        assert self._log is not None
        self._log.seek(0)
        *whole, _ = self._log.read().split(b"\n")
        self.windows = [json.loads(line) for line in whole]
        self.before = len(self.windows)
        self._compare(json.loads((self.parts / _JOB).read_text(encoding="utf-8")), job)
        end = self.windows[-1]["end"] if self.windows else 0
        if self._data.seek(0, os.SEEK_END) < end:
            raise Refused(f"{self.parts / _DATA} was cut off: --force begins anew")
        self._log.truncate(sum(len(line) + 1 for line in whole))
        self._data.truncate(end)
        if not self.windows:
            self._data.write(self._format.head())

    def _clear(self) -> None:
        """Remove the folder, but nothing that is not ours."""
        if self.parts.is_dir():
            Drafts(self.parts, _KEY).clear()
            for name in (_DATA, MADE, _WINDOWS, _JOB):
                (self.parts / name).unlink(missing_ok=True)
            self.parts.rmdir()

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name in {**before, **now}:
            a, b = before.get(name), now.get(name)
            if a != b:
                raise Refused(
                    f"cannot go on with {self.parts}: it was begun with {name} {a}, and now it is {b}; --force begins"
                    " anew"
                )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _close(self) -> None:
        for file in (self._data, self._log):
            if file is not None:
                with contextlib.suppress(OSError):  # a disk that is full says so again
                    file.close()
        self._data = self._log = None


def job_of(engine: Any, **options: Any) -> dict[str, Any]:
    """What the results of an engine depend on: its settings, its weights, its tokenizer.

    Args:
        options: what they depend on besides.
    """
    named = any("__str__" in vars(kind) for kind in type(engine).__mro__[:-1])
    settings: dict[str, Any] = {
        "fastbert": fastbert.__version__,
        "engine": str(engine) if named else type(engine).__name__,
    }
    for name, value in sorted(vars(engine).items()):
        modules = [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, Module)]
        if modules:
            settings[name] = fingerprint(*modules)
        elif isinstance(value, str | int | float | dict | None) and not name.startswith("_"):
            settings[name] = value
    backend = getattr(engine.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        settings["tokenizer"] = hashlib.blake2b(backend.to_str().encode(), digest_size=8).hexdigest()
    return {**settings, "device": engine.model.device.type, **options}


def fingerprint(*modules: Module) -> str:
    """Of a thousand numbers of each weight, which training changes."""
    digest = hashlib.blake2b(digest_size=8)
    for module in modules:
        for name, weight in module.state_dict().items():
            if name.startswith("pooler."):  # of an encoder alone: nobody reads it, and many checkpoints lack it
                continue
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLE)].cpu().contiguous()
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest(rows: Sequence[Row]) -> str:
    text = repr([tuple(row) for row in rows])
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
