"""What files of results hold: .npy, .safetensors, .parquet and JSON lines, written a window at a time.

Dimension key:  B rows   N vector size
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastbert.errors import InputError, require
from fastbert.inference.inputs import Row

MADE = "made"  # beside a draft: what is not made in place
MODEL = "fastbert.model"  # the name of a fingerprint
_HEAD = 256  # bytes that the header of an array may have
VECTORS = (".npy", ".safetensors", ".parquet")


class Format(Protocol):
    """A way to write rows that can end and go on anywhere between windows."""

    def head(self) -> bytes:
        """What stands before the first row."""

    def encode(self, rows: Sequence[Row], results: Sequence[Any]) -> bytes | memoryview:
        """A window."""

    def finish(self, draft: Path, shape: tuple[int, ...], model: str) -> Path:
        """Make the file of what has been written, in place or beside it.

        Args:
            shape: of all results: (B, N), or (B,) where each is a number or no array.
            model: the fingerprint of what made them, which .parquet and .safetensors keep.
        """


def format_of(
    path: Path,
    suffixes: Sequence[str],
    *,
    record: Callable[[Row, Any], Mapping[str, Any]] | None = None,
    texts: Sequence[str] = (),
    column: str = "vector",
) -> Format:
    """By the suffix of a file.

    Args:
        suffixes: those that there may be.
        record: of .jsonl: what a row and its result are there.
        texts: of .parquet: names of the columns with the texts; none are written where it is empty.
        column: of .parquet and .safetensors: the name of the results.

    Raises:
        InputError: if it is another one, or .parquet without pyarrow.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"cannot write {path}: its name must end with {' or '.join(suffixes)}")
    if suffix == ".npy":
        return Npy()
    if suffix == ".safetensors":
        return Safetensors(column)
    if suffix == ".parquet":
        return Parquet(texts, column)
    assert record is not None
    return JsonLines(record)


class Npy:
    """Float32, as numpy saves it."""

    def head(self) -> bytes:
        return bytes(len(self._header((0, 0))))

    def encode(self, rows: Sequence[Row], results: Sequence[Any]) -> bytes | memoryview:
        return np.ascontiguousarray(results, "<f4").data.cast("B")

    def finish(self, draft: Path, shape: tuple[int, ...], model: str) -> Path:
        with draft.open("r+b") as file:
            file.write(self._header(shape, model))
        return draft

    def _header(self, shape: tuple[int, ...], model: str = "") -> bytes:
        """Of the same length, whatever the shape: numpy pads it for all."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return header.getvalue()


class Safetensors(Npy):
    """One float32 tensor."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _header(self, shape: tuple[int, ...], model: str = "") -> bytes:
        size = 4 * int(np.prod(shape, dtype=np.int64))
        tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
        header = json.dumps({"__metadata__": {MODEL: model}, self._name: tensor}).encode().ljust(_HEAD - 8)
        return len(header).to_bytes(8, "little") + header


class JsonLines:
    """An object for each row."""

    def __init__(self, record: Callable[[Row, Any], Mapping[str, Any]]) -> None:
        self._record = record

    def head(self) -> bytes:
        return b""

    def encode(self, rows: Sequence[Row], results: Sequence[Any]) -> bytes:
        records = (self._record(row, result) for row, result in zip(rows, results, strict=True))
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()

    def finish(self, draft: Path, shape: tuple[int, ...], model: str) -> Path:
        return draft


class Parquet:
    """Columns "id", the texts, and the results: a list of fixed size of float32, or a float32.

    Ids are integers where all of them are, otherwise strings. Until the end the rows are in Arrow's own format, to
    which one can append.
    """

    def __init__(self, texts: Sequence[str], column: str) -> None:
        require("pyarrow", to="write Parquet")
        self._texts, self._column = list(texts), column

    def head(self) -> bytes:
        return b""

    def encode(self, rows: Sequence[Row], results: Sequence[Any]) -> bytes:
        import pyarrow as pa

        ids = [None if row.id is None else row.id if isinstance(row.id, str) else json.dumps(row.id) for row in rows]
        integer = all(row.id is None or _is_integer(row.id) for row in rows)
        texts = [pa.array([row.texts[i] for row in rows], pa.large_string()) for i in range(len(self._texts))]
        array = np.ascontiguousarray(results, np.float32)
        columns = [pa.array(ids, pa.large_string()), *texts, _arrow(array)]
        schema = pa.schema(
            [*zip(["id", *self._texts, self._column], [each.type for each in columns], strict=True)],
            metadata={"integer": str(integer)},
        )
        sink = io.BytesIO()
        # A stream of its own for each window: whole ones can stand one after the other.
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_batch(pa.record_batch(columns, schema=schema))
        return sink.getvalue()

    def finish(self, draft: Path, shape: tuple[int, ...], model: str) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        path = draft.with_name(MADE)
        integer = all(window.schema.metadata[b"integer"] == b"True" for window in _windows(draft))
        with contextlib.ExitStack() as stack:
            writer = None
            for window in _windows(draft):
                ids = window["id"].cast(pa.int64() if integer else pa.large_string())
                table = window.set_column(0, "id", ids).replace_schema_metadata({MODEL: model})
                if writer is None:
                    writer = stack.enter_context(
                        parquet.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False)
                    )
                writer.write_table(table)
        return path


def _windows(draft: Path) -> Iterator[Any]:
    """Tables, whose pages are read where they are touched."""
    import pyarrow as pa

    with pa.memory_map(str(draft)) as file:
        while file.tell() < file.size():
            with pa.ipc.open_stream(file) as stream:
                yield stream.read_all()


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _arrow(array: npt.NDArray[np.float32]) -> Any:
    import pyarrow as pa

    flat = pa.array(array.reshape(-1))
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
