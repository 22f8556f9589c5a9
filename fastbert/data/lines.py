"""Lines of files, gzipped ones too, whatever ends them; of a file that is damaged or cut off, what there is."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

_CHUNK = 1 << 16


class Lines:
    """The lines of a file that is open for reading, as bytes, without what ends them: \\n, \\r\\n, or \\r alone.

    Iterate once. Memory is that of a line.

    Args:
        zipped: whether to unpack it with gzip.
        progress: called with the number of bytes of the file that have just been read.

    Attributes:
        number: of the last line that came, from 1.
        damaged: the gzip file ended before its end, or cannot be unpacked from there on.  partial: and in the midst of
            the last line that came. Both say so when that line comes.
    """

    def __init__(self, file: BinaryIO, *, zipped: bool = False, progress: Callable[[int], None] | None = None) -> None:
        self.number = 0
        self.damaged = self.partial = False
        self._file = file
        self._unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if zipped else file
        self._progress = progress

    def __iter__(self) -> Iterator[bytes]:
        for line in self._with_ends():
            self.number += 1
            self.partial = self.damaged and not line.endswith((b"\n", b"\r"))
            yield line.removesuffix(b"\n").removesuffix(b"\r")

    def chunks(self) -> Iterator[bytes]:
        """Instead of lines: what is in them and between them, some of it at a time."""
        before = 0
        while True:
            try:
                # Not `read`, which loses what it has where a gzip file breaks off.
                chunk = self._unpacked.read1(_CHUNK)  # type: ignore[attr-defined]
            except (EOFError, zlib.error, gzip.BadGzipFile):
                self.damaged = True
                chunk = b""
            if self._progress is not None:
                self._progress(self._file.tell() - before)
                before = self._file.tell()
            if not chunk:
                return
            yield chunk

    def _with_ends(self) -> Iterator[bytes]:
        pieces: list[bytes] = []  # of a line that has not ended
        for chunk in self.chunks():
            if pieces and pieces[-1].endswith(b"\r") and not chunk.startswith(b"\n"):
                yield b"".join(pieces)
                pieces = []
            *whole, last = chunk.splitlines(keepends=True)
            for line in whole:
                yield b"".join([*pieces, line])
                pieces = []
            pieces.append(last)
            if last.endswith(b"\n"):
                yield b"".join(pieces)
                pieces = []
        if pieces:
            yield b"".join(pieces)


def is_zipped(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() == ".gz"
