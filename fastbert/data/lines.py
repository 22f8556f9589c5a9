"""Lines of files, compressed ones too, whatever ends them; of a file that is damaged or cut off, what there is."""

from collections.abc import Callable, Iterator
from typing import BinaryIO

from fastbert.data.compression import Damaged, chunks

_CHUNK = 1 << 16


class Lines:
    """The lines of a file that is open for reading, as bytes, without what ends them: \\n, \\r\\n, or \\r alone.

    Iterate once. Memory is that of a line.

    Args:
        compression: what unpacks it: see compression.KINDS.
        progress: called with the number of bytes of the file that have just been read.

    Attributes:
        number: of the last line that came, from 1.
        damaged: the compressed file ended before its end, or cannot be unpacked from there on.
        partial: and in the midst of the last line that came. Both say so when that line comes.
    """

    def __init__(
        self, file: BinaryIO, compression: str | None = None, progress: Callable[[int], None] | None = None
    ) -> None:
        self.number = 0
        self.damaged = self.partial = False
        self._file = file
        self._compression = compression
        self._progress = progress or (lambda count: None)

    def __iter__(self) -> Iterator[bytes]:
        for line in self._with_ends():
            self.number += 1
            self.partial = self.damaged and not line.endswith((b"\n", b"\r"))
            yield line.removesuffix(b"\n").removesuffix(b"\r")

    def chunks(self) -> Iterator[bytes]:
        """Instead of lines: what is in them and between them, some of it at a time."""
        seekable = self._file.seekable()
        before = self._file.tell() if seekable else 0
        try:
            for chunk in chunks(self._file, self._compression, _CHUNK):
                after = self._file.tell() if seekable else before + len(chunk)
                self._progress(after - before)
                before = after
                yield chunk
        except Damaged:
            self.damaged = True
        if seekable:
            self._progress(self._file.tell() - before)

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
