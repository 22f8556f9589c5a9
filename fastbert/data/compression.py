"""Compressed files: what is in them, and where they are damaged or cut off."""

import bz2
import gzip
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastbert.errors import MissingPackage, how_to_install

KINDS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_LONGEST_WINDOW = 31  # of zstd --long=31, as large corpora are packed


class Damaged(Exception):
    """A compressed file ended before its end, or cannot be unpacked from there on."""


def kind_of(path: Path) -> str | None:
    """By its name; None if it is not compressed."""
    return KINDS.get(path.suffix.lower())


def chunks(file: BinaryIO, kind: str | None, size: int) -> Iterator[bytes]:
    """What is in a file that is open for reading, at most `size` bytes at a time.

    Raises:
        Damaged: when all that can be unpacked has come.
        InputError: if what unpacks this kind is not installed.
    """
    if kind is None:
        yield from _read(file, size)
    elif kind == "gzip":
        try:
            # Not `read`, which loses what it has where a gzip file breaks off.
            yield from _read(gzip.GzipFile(fileobj=file), size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Damaged from error
    elif kind == "bzip2":
        yield from _streams(file, bz2.BZ2Decompressor, (OSError, ValueError), size)
    elif kind == "xz":
        yield from _streams(file, lzma.LZMADecompressor, (lzma.LZMAError,), size)
    else:
        zstd = import_zstd()
        options = {zstd.DecompressionParameter.window_log_max: _LONGEST_WINDOW}
        yield from _streams(file, lambda: zstd.ZstdDecompressor(options=options), (zstd.ZstdError,), size)


def import_zstd() -> Any:
    """The standard library's module from Python 3.14 on, or its backport.

    Raises:
        MissingPackage: if that is not installed.
    """
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise MissingPackage(f"to read .zst, install backports.zstd: {how_to_install('backports.zstd')}") from error
    return zstd


def _read(file: Any, size: int) -> Iterator[bytes]:
    while chunk := file.read1(size):
        yield chunk


def _streams(
    file: BinaryIO, begin: Callable[[], Any], errors: tuple[type[Exception], ...], size: int
) -> Iterator[bytes]:
    """Of one stream after the other, as parallel packers and `cat` make them, with zeros between them or none.

    The standard library's own files end in silence at a stream whose head is damaged.
    """
    stream: Any = None
    packed = b""
    while True:
        if not packed and (stream is None or stream.needs_input):
            packed = file.read(size)
            if not packed and stream is not None:
                raise Damaged
            if not packed:
                return
        if stream is None:
            packed = packed.lstrip(b"\0")
            if not packed:
                continue
            stream = begin()
        try:
            chunk = stream.decompress(packed, size)
        except errors as error:
            raise Damaged from error
        packed = b""
        if stream.eof:
            packed, stream = stream.unused_data, None
        if chunk:
            yield chunk
