"""Rows of files of every kind, whatever is wrong with them, and files of results that are whole or not there."""

import csv
import gzip
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from safetensors import safe_open
from safetensors.numpy import load_file

from fastbert.errors import InputError
from fastbert.inference import inputs
from fastbert.inference.formats import VECTORS, format_of
from fastbert.inference.inputs import Row, Rows
from fastbert.inference.outputs import Output
from fastbert.inference.stream import Window
from fastbert.inference.tokens import Tokens
from tests.stores import full_disk, write

TEXTS = ["one", "", 'a comma, a "quote"\tand a tab', "ö\u2028ü", "  blank  "]
JOB = {"model": "0123456789abcdef", "pool": "mean"}


def texts_of(rows: Rows) -> list[str]:
    return [row.texts[0] for row in rows]


def a_table(path: Path) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.table({"id": range(10, 15), "text": TEXTS}), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS, 10)))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t")
            rows.writerows([("id", "text"), *enumerate(TEXTS, 10)])
    return path


class TestRows:
    def test_a_line_is_a_text(self, tmp_path: Path) -> None:
        content = "\ufeff" + "\n".join(TEXTS) + "\n"
        rows = Rows(write(tmp_path / "a.txt", content))
        assert list(rows) == [Row(number, (text,)) for number, text in enumerate(TEXTS)]
        assert (rows.number, rows.read, rows.size) == (5, len(content.encode()), len(content.encode()))
        assert texts_of(Rows(write(tmp_path / "a.txt.gz", gzip.compress(content.encode())))) == TEXTS
        assert not rows.problems.counts

    @pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
    def test_tables(self, tmp_path: Path, suffix: str) -> None:
        path = a_table(tmp_path / f"a.{suffix}")
        ids: list[Any] = list(range(10, 15)) if suffix in ("jsonl", "parquet") else ["10", "11", "12", "13", "14"]
        assert list(Rows(path, id_key="id")) == [Row(i, (text,)) for i, text in zip(ids, TEXTS, strict=True)]
        assert [row.id for row in Rows(path)] == [0, 1, 2, 3, 4]
        with pytest.raises(InputError, match=r"has no column 'body', but 'id', 'text': --text-key names another"):
            Rows(path, {"--text-key": "body"})
        with pytest.raises(InputError, match="has no column 'key', but 'id', 'text': --id-key names another"):
            Rows(path, id_key="key")

    def test_pairs(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", '{"query": "q", "document": "d"}\n')
        (row,) = Rows(path, {"--query-key": "query", "--document-key": "document"})
        assert row.item == ("q", "d")
        with pytest.raises(InputError, match="a text a line, and no columns"):
            Rows(write(tmp_path / "a.txt", "q"), {"--query-key": "query", "--document-key": "document"})

    def test_stdin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def rows(content: bytes, **options: str) -> Rows:
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
            return Rows("-", **options)

        assert texts_of(rows(b"one\n\ntwo")) == ["one", "", "two"]
        assert texts_of(rows(b'{"text": "one"}', format="jsonl")) == ["one"]
        with pytest.raises(InputError, match="stdin is empty"):
            list(rows(b""))
        with pytest.raises(InputError, match="stdin, line 1: not JSON"):
            list(rows(b"one", format="jsonl"))
        with pytest.raises(InputError, match="--format must be one of"):
            rows(b"one", format="pdf")

    def test_what_is_not_utf8_is_read_and_counted(self, tmp_path: Path) -> None:
        rows = Rows(write(tmp_path / "a.txt", b"one\ntw\xffo\n\xc3\nfour"))
        assert texts_of(rows) == ["one", "tw\ufffdo", "\ufffd", "four"]
        assert list(rows.problems.counts.values()) == [2]
        assert rows.problems.first == {inputs._NOT_UTF8: [f"{tmp_path}/a.txt, line {line}" for line in (2, 3)]}
        rows = Rows(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n{"text": "\\ud800x"}\n'))
        assert texts_of(rows) == ["a", "\ufffd", "\ufffdx"]
        assert rows.problems.counts == {inputs._NOT_UTF8: 2}
        rows = Rows(write(tmp_path / "a.csv", b"text\na\n\xff\n"))
        assert texts_of(rows) == ["a", "\ufffd"]
        assert rows.problems.counts == {inputs._NOT_UTF8: 1}

    def test_a_broken_row_is_an_empty_text(self, tmp_path: Path) -> None:
        lines = ['{"id": 7, "text": "a"}', "{", "", "[1]", '{"id": 8}', '{"id": 9, "text": 5}', '{"text": "b"}']
        rows = Rows(write(tmp_path / "a.jsonl", "\n".join(lines)), id_key="id")
        assert [(row.id, row.texts[0]) for row in rows] == [
            (7, "a"),
            (None, ""),
            (None, ""),
            (8, ""),
            (9, ""),
            (None, "b"),
        ]
        assert rows.problems.counts == {
            "not JSON (taken as empty)": 1,
            "not a JSON object (taken as empty)": 1,
            "no text at 'text' (taken as empty)": 2,
            "no id at 'id'": 1,
        }
        rows = Rows(write(tmp_path / "a.csv", "text,b\na,1\nb\nc,3,4\nd,5\n"))
        assert texts_of(rows) == ["a", "", "", "d"]
        assert rows.problems.counts == {"a row with more or fewer cells than the header": 2}
        parquet.write_table(pa.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
        rows = Rows(tmp_path / "a.parquet")
        assert texts_of(rows) == ["a", "", "c"]
        assert rows.problems.counts == {"no text at 'text' (taken as empty)": 1}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"", "a.txt is empty"),
            ("a.jsonl", b"\n\n", "a.jsonl is empty"),
            ("a.csv", b"id,text\n", "a.csv is empty"),
            ("a.txt", "a".encode("utf-16"), "a file in UTF-16, but UTF-8 is wanted"),
            ("a.jsonl", b'[{"text": "a"},\n', "a.jsonl, line 1: not JSON; JSON lines are an object a line"),
            ("a.parquet", b"PAR1", "cannot read .*a.parquet"),
            ("a.pdf", b"a", "its name must end with one of .txt"),
        ],
    )
    def test_what_cannot_be_read_is_named_at_once(
        self, tmp_path: Path, name: str, content: bytes, message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            Rows(write(tmp_path / name, content))
        assert texts_of(Rows(write(tmp_path / "a.log", "a"), format="txt")) == ["a"]

    @pytest.mark.parametrize("suffix", ["txt", "jsonl"])
    def test_a_file_that_is_cut_off_is_said_at_its_end(self, tmp_path: Path, suffix: str) -> None:
        lines = [json.dumps({"text": f"{number}"}) if suffix == "jsonl" else f"{number}" for number in range(9)]
        packed = gzip.compress("\n".join(lines).encode(), 0)
        rows = Rows(write(tmp_path / f"a.{suffix}.gz", packed[:-9]))
        came: list[str] = []
        with pytest.raises(InputError, match="damaged or truncated gzip file, after line 8"):
            came.extend(row.texts[0] for row in rows)
        assert came == [f"{number}" for number in range(8)]

    def test_parquet_is_not_read_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        parquet.write_table(pa.table({"text": ["a"] * 5000}), tmp_path / "a.parquet", row_group_size=1000)
        rows = Rows(tmp_path / "a.parquet")
        next(reading := iter(rows))
        assert rows.read == 0
        for _ in range(2000):
            next(reading)
        assert 0 < rows.read < rows.size


VECTORS_ = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
ROWS = [Row(number, (f"text {number}",)) for number in range(10)]


def windows(rows: Sequence[Row] = ROWS, results: Any = VECTORS_, size: int = 4) -> list[Window[Row]]:
    tokens = Tokens(np.zeros(0, np.int32), np.zeros(0, np.int64))
    starts = range(0, len(rows), size)
    return [Window(list(rows[i : i + size]), tokens, results[i : i + size], 0) for i in starts]


def output(path: Path, **options: bool) -> Output:
    record = {"record": lambda row, result: {"id": row.id, "score": float(result[0])}}
    return Output(path, format_of(path, [*VECTORS, ".jsonl"], texts=["text"], **record), **options)


def run(path: Path, every: Sequence[Window[Row]] | None = None, job: Any = JOB, **options: bool) -> tuple[int, ...]:
    with output(path, **options) as out:
        out.begin(job)
        for window in windows() if every is None else every:
            if not out.skip(window.rows):
                out.add(window, tokens=len(window.rows))
        return out.finish()


SUFFIXES = ["npy", "safetensors", "parquet", "jsonl"]


class TestOutput:
    def test_npy_is_as_numpy_saves_it(self, tmp_path: Path) -> None:
        assert run(tmp_path / "v.npy") == (10, 3)
        np.save(tmp_path / "numpy.npy", VECTORS_)
        assert (tmp_path / "v.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
        run(tmp_path / "s.npy", windows(results=VECTORS_[:, 0]))
        np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), VECTORS_[:, 0])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["numpy.npy", "s.npy", "v.npy"]

    def test_safetensors(self, tmp_path: Path) -> None:
        run(tmp_path / "v.safetensors")
        np.testing.assert_array_equal(load_file(tmp_path / "v.safetensors")["vector"], VECTORS_)
        with safe_open(tmp_path / "v.safetensors", framework="np") as file:
            assert file.metadata() == {"fastbert.model": JOB["model"]}

    def test_parquet(self, tmp_path: Path) -> None:
        run(tmp_path / "v.parquet")
        table = parquet.read_table(tmp_path / "v.parquet")
        assert str(table.schema.remove_metadata()) == (
            "id: int64\ntext: large_string\nvector: fixed_size_list<element: float>[3]\n  child 0, element: float"
        )
        assert table["id"].to_pylist() == list(range(10))
        assert table["text"].to_pylist() == [row.texts[0] for row in ROWS]
        np.testing.assert_array_equal(np.array(table["vector"].to_pylist(), np.float32), VECTORS_)
        run(tmp_path / "s.parquet", windows(results=VECTORS_[:, 0]))
        assert parquet.read_schema(tmp_path / "s.parquet").field("vector").type == pa.float32()

    @pytest.mark.parametrize(
        ("ids", "written"),
        [
            (["a"] * 9 + [None], ["a"] * 9 + [None]),
            ([*range(9), None], [*range(9), None]),
            ([*range(9), "x"], [*"012345678", "x"]),
            ([*range(9), 2**64], [*"012345678", str(2**64)]),
            ([*range(9), [1, "a"]], [*"012345678", '[1, "a"]']),
        ],
    )
    def test_ids_are_of_one_type(self, tmp_path: Path, ids: list[Any], written: list[Any]) -> None:
        run(tmp_path / "v.parquet", windows([Row(i, ("",)) for i in ids]))
        assert parquet.read_table(tmp_path / "v.parquet")["id"].to_pylist() == written

    def test_json_lines(self, tmp_path: Path) -> None:
        run(tmp_path / "s.jsonl")
        records = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
        assert records == [{"id": i, "score": float(VECTORS_[i, 0])} for i in range(10)]

    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(self, tmp_path: Path, suffix: str) -> None:
        whole, path, kept = tmp_path / f"whole.{suffix}", tmp_path / f"v.{suffix}", tmp_path / "kept"
        run(whole)
        parts = tmp_path / f"v.{suffix}.parts"
        self.begun(path, 3)
        shutil.copytree(parts, kept)
        log, data = (kept / "windows.jsonl").read_bytes(), (kept / "data").read_bytes()
        ends = [0, *(json.loads(line)["end"] for line in log.splitlines())]
        for cut in {*range(0, len(log), 19), len(log)}:
            done = log[:cut].count(b"\n")
            for lost in {len(data), max(ends[done], min(len(data), ends[done] + 5))}:
                shutil.copytree(kept, parts, dirs_exist_ok=True)
                (parts / "windows.jsonl").write_bytes(log[:cut])
                (parts / "data").write_bytes(data[:lost])
                with output(path, resume=True) as again:
                    again.begin(JOB)
                    left = [window for window in windows() if not again.skip(window.rows)]
                    assert len(left) == 3 - done
                    for window in left:
                        again.add(window)
                    again.finish()
                assert path.read_bytes() == whole.read_bytes()
                assert not parts.exists()
                path.unlink()

    def begun(self, path: Path, count: int = 2) -> None:
        with output(path) as out:
            out.begin(JOB)
            for window in windows()[:count]:
                out.add(window)

    def test_what_is_left_is_neither_taken_nor_removed_in_silence(self, tmp_path: Path) -> None:
        path = tmp_path / "v.npy"
        self.begun(path)
        assert not path.exists()
        with pytest.raises(InputError, match="is left of a run that did not end: --resume goes on with it, --force"):
            run(path)
        assert run(path, force=True) == (10, 3)
        np.testing.assert_array_equal(np.load(path), VECTORS_)

    def test_a_run_without_a_window_leaves_nothing(self, tmp_path: Path) -> None:
        self.begun(tmp_path / "v.npy", 0)
        assert not list(tmp_path.iterdir())

    def gone_on_with(self, path: Path) -> int:
        """How many windows need not be made again."""
        with output(path, resume=True) as out:
            out.begin(JOB)
            return sum(out.skip(window.rows) for window in windows())

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([*ROWS[:6], Row(6, ("other",)), *ROWS[7:]], "rows 5 to 8 were other ones"),
            ([*ROWS[:6], Row(9, ROWS[6].texts), *ROWS[7:]], "rows 5 to 8 were other ones"),
            (ROWS[:4], "there were more rows"),
        ],
    )
    def test_other_rows_are_refused(self, tmp_path: Path, rows: list[Row], message: str) -> None:
        self.begun(tmp_path / "v.npy")
        with pytest.raises(InputError, match=message):
            run(tmp_path / "v.npy", windows(rows), resume=True)
        assert self.gone_on_with(tmp_path / "v.npy") == 2

    def test_another_job_is_refused(self, tmp_path: Path) -> None:
        self.begun(tmp_path / "v.npy")
        with pytest.raises(InputError, match="was begun with pool mean, and now it is cls; --force begins anew"):
            run(tmp_path / "v.npy", job={**JOB, "pool": "cls"}, resume=True)
        assert self.gone_on_with(tmp_path / "v.npy") == 2

    def test_two_runs_do_not_write_one_file(self, tmp_path: Path) -> None:
        with output(tmp_path / "v.npy") as first:
            first.begin(JOB)
            first.add(windows()[0])
            with pytest.raises(InputError, match="another run is at it"):
                run(tmp_path / "v.npy", resume=True)
            with pytest.raises(InputError, match="another run is at it"):
                run(tmp_path / "v.npy", force=True)
            for window in windows()[1:]:
                first.add(window)
            assert first.finish() == (10, 3)
        np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), VECTORS_)

    def test_what_is_there_stays_but_with_force(self, tmp_path: Path) -> None:
        path = write(tmp_path / "v.npy", "before")
        with pytest.raises(InputError, match="exists: --force takes its place"):
            output(path)
        (tmp_path / "v.npy.parts").mkdir()
        assert output(path, resume=True).finished
        assert not (tmp_path / "v.npy.parts").exists()
        with output(path, force=True) as forced:
            forced.begin(JOB)
            forced.add(windows()[0])
        assert path.read_bytes() == b"before"
        assert run(path, resume=True) == (10, 3)
        np.testing.assert_array_equal(np.load(path), VECTORS_)

    def test_a_folder_of_somebody_else_is_not_removed(self, tmp_path: Path) -> None:
        (tmp_path / "v.npy.parts").mkdir()
        mine = write(tmp_path / "v.npy.parts" / "thesis.tex", "years of work")
        for force in (False, True):
            with pytest.raises(InputError, match="cannot write"):
                run(tmp_path / "v.npy", force=force)
        assert mine.read_text() == "years of work"

    @pytest.mark.parametrize("suffix", SUFFIXES)
    @pytest.mark.parametrize("room", [10, 200, 4000])
    def test_a_full_disk_is_said_and_gone_on_with(self, tmp_path: Path, suffix: str, room: int) -> None:
        path, whole = tmp_path / f"v.{suffix}", tmp_path / f"whole.{suffix}"
        every = windows([Row(i, (f"text {i}",)) for i in range(800)], np.tile(VECTORS_, (80, 1)), 50)
        run(whole, every)
        with pytest.raises(InputError, match=r"cannot write .*: File too large"), full_disk(room):
            run(path, every)
        assert not path.exists()
        assert (tmp_path / f"v.{suffix}.parts").exists() == (room == 4000)
        run(path, every, resume=True)
        assert path.read_bytes() == whole.read_bytes()

    @pytest.mark.parametrize("name", ["v.csv", "v", "v.npy.gz"])
    def test_another_suffix_is_refused(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(InputError, match=r"its name must end with \.npy or \.safetensors or \.parquet"):
            format_of(tmp_path / name, VECTORS)
