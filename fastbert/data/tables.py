"""Rows of tables: CSV, TSV and Parquet files."""

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastbert.data.documents import Problems
from fastbert.errors import InputError, require

Row = tuple[int, dict[str, Any]]
NOT_UTF8 = "\udcff"  # as `surrogateescape` decodes such a byte
_ROWS_AT_ONCE = 256
_LONGEST_CELL = 1 << 27
_BUFFER = 1 << 20


def csv_rows(
    lines: Iterator[tuple[int, str]],
    delimiter: str,
    name: str,
    problems: Problems,
    check: Callable[[Sequence[str]], None],
) -> Iterator[Row]:
    """The rows below the header, with the line where each begins. Quotes are those of RFC 4180, for TSV too.

    A row that cannot be read is a problem, and comes without a cell.

    Args:
        lines: with their ends, all of them.
        check: called with the header.
    """
    csv.field_size_limit(_LONGEST_CELL)
    # Strict: a quote that is not closed would make one cell of all that follows, without a word.
    rows = csv.reader((line for _, line in lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        start = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"not {'TSV' if delimiter == chr(9) else 'CSV'} ({error})", f"{name}, line {start}")
            yield start, {}
            continue
        if not row:
            continue
        if header is None:
            header = row
            check(header)
        elif len(row) != len(header):
            problems.add("a row with more or fewer cells than the header", f"{name}, line {start}")
            yield start, {}
        else:
            yield start, dict(zip(header, row, strict=True))


def parquet_rows(
    path: Path, keys: Sequence[str], check: Callable[[Sequence[str]], None], progress: Callable[[int], None]
) -> Iterator[Row]:
    """The rows, numbered from 1, with these of their columns; memory is that of some rows.

    Args:
        check: called with the names of all columns.

    Raises:
        InputError: if the file is damaged, or pyarrow is missing.
    """
    require("pyarrow", to="read Parquet")
    import pyarrow
    from pyarrow import parquet

    number = read = 0
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            check(file.schema_arrow.names)
            columns = [key for key in keys if key in file.schema_arrow.names]
            size, rows = path.stat().st_size, file.metadata.num_rows
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
                for values in zip(*map(_values, batch.columns), strict=True):
                    number += 1
                    yield number, dict(zip(batch.schema.names, values, strict=True))
                progress(size * number // rows - read)
                read = size * number // rows
            progress(size - read)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def _values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return NOT_UTF8
