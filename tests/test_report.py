"""The report: the README's sections and the pages, on runs with invented figures."""

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")  # only for the report: a GPU machine tests without it

from bench import report
from bench.finetuned import runs_section
from bench.pictures import PICTURES
from bench.record import OURS, Row, Run, Work
from bench.shown import Gain, kernels, losses, telling
from fastbert.families.__main__ import table
from tests.invented import CPU, SDPA, empty_run, invented_run, model_case, model_row, small_run, timing

DOCUMENTS = {
    "README.md": """# before
<!-- report: headline -->
old
<!-- /report -->
between
<!-- report: inference -->
<!-- /report -->
<!-- report: finetuning -->
<!-- /report -->
<!-- report: families -->
<!-- /report -->
after
""",
    "docs/performance.md": """# before
<!-- report: families -->
<!-- /report -->
<!-- report: memory -->
<!-- /report -->
after
""",
    "docs/finetuning.md": """# before
<!-- report: runs -->
<!-- /report -->
after
""",
}


def write_report(folder: Path, name: str = "README.md", **runs: Run) -> str:
    """The README that these runs make, by the names of their files; or another document."""
    for stem, run in runs.items():
        run.write(folder / "results" / f"{stem}.json")
    write_documents(folder)
    assert report.main(sorted((folder / "results").glob("*.json")), folder) == 0
    return (folder / name).read_text()


def write_documents(folder: Path, lost: str = "<no such marker>") -> None:
    for name, text in DOCUMENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.replace(lost, ""))


def test_the_headline_is_in_tokens_a_second_and_compares_with_the_faster_compiled(tmp_path: Path) -> None:
    seconds = {SDPA: 2.0, f"{SDPA}, compiled": 1.6, f"{SDPA}, compiled dynamic": 1.25, OURS: 0.5}
    text = write_report(tmp_path, here=empty_run(rows=[model_row(seconds)]))
    line = (
        "| BERT-base | inference, SQuAD lengths to 384, batch 8, float32 | 500 | 800 | 2 k "
        "| **4.00 x** (3.84 to 4.16) | **2.50 x** (2.40 to 2.60) |"
    )
    assert line in text.splitlines()
    assert (
        f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="results/here/headline-dark.svg">
  <img alt="How many times as fast as transformers with SDPA, on {CPU}, 2 threads" src="results/here/headline.svg">
</picture>

| model |"""
        in text
    )
    assert (
        f"{CPU}, 2 threads, 2030-01-02, torch 2.13.0, triton 3.7.1, transformers 5.23.0, "
        "commit abc1234: `pytest bench --benchmark`. [All tables and pictures](results/here.md), "
        "[every figure](results/here.json)." in text
    )
    assert all((tmp_path / "results" / "here" / name).exists() for name in ("headline.svg", "headline-dark.svg"))
    assert "slower" not in text


def test_what_is_slower_is_shown_too(tmp_path: Path) -> None:
    text = write_report(tmp_path, here=empty_run(rows=[model_row({SDPA: 0.5, OURS: 1.0})]))
    assert "| 2 k |  | 1 k | 0.50 x, slower (0.48 to 0.52) |  |" in text
    assert "Below 1 x fastbert is slower. " in text


@pytest.mark.parametrize(
    ("spread", "changes", "words"),
    [
        (0.02, {"lengths": "full"}, "Below 1 x fastbert is slower: without padding there is nothing to leave out."),
        (0.5, {}, "Below 1 x fastbert is slower. There the spread reaches above 1 x: this run does not settle it."),
        (0.02, {}, "Below 1 x fastbert is slower."),
    ],
)
def test_what_is_slower_is_explained(spread: float, changes: dict[str, str], words: str) -> None:
    fast, slow = (model_row({SDPA: 1.0, OURS: seconds}, **changes) for seconds in (0.5, 1.1))
    slow.timings = {name: timing(it.median, spread) for name, it in slow.timings.items()}
    assert losses([fast, slow]) == words
    assert losses([fast]) == ""


def test_what_is_hardly_slower_does_not_look_alike() -> None:
    assert str(Gain(0.9999, 0.9, 1.1)) == "0.99 x"
    assert str(Gain(1.0, 0.9, 1.1)) == "1.00 x"


def test_only_the_sections_change(tmp_path: Path) -> None:
    row = Row("memory", {"hidden": 768}, values={SDPA: 200.0, OURS: 50.0}, unit="B")
    text = write_report(tmp_path, here=empty_run(rows=[row]))
    before, headline, inference, finetuning, families = text.split("<!-- report: ")
    assert before == "# before\n"
    assert headline == "headline -->\n<!-- /report -->\nbetween\n"  # no model was measured
    assert inference == "inference -->\n<!-- /report -->\n"
    assert finetuning == "finetuning -->\n<!-- /report -->\n"
    assert families == f"families -->\n{table()}\n<!-- /report -->\nafter\n"
    before, families, memory = (tmp_path / "docs" / "performance.md").read_text().split("<!-- report: ")
    assert before == "# before\n"
    assert families == "families -->\n<!-- /report -->\n"
    assert memory.startswith("memory -->\n| hidden | transformers SDPA, B | fastbert | ratio |\n")
    assert "| 768 | 200 | 50 | 0.25 |" in memory
    assert "(../results/here.md)" in memory
    assert memory.endswith("\n<!-- /report -->\nafter\n")


@pytest.mark.parametrize(
    "lost",
    [
        "<!-- report: headline -->",
        "<!-- report: inference -->",
        "<!-- report: families -->",
        "<!-- report: memory -->",
        "<!-- report: finetuning -->",
        "<!-- report: runs -->",
        "<!-- /report -->\nbetween",
    ],
)
def test_a_marker_that_is_missing(lost: str, tmp_path: Path) -> None:
    write_documents(tmp_path, lost)
    with pytest.raises(ValueError, match=r"(README|performance|finetuning)\.md has no section from <!-- report: "):
        report.main([], tmp_path)
    for name, text in DOCUMENTS.items():
        assert (tmp_path / name).read_text() == text.replace(lost, "")


def test_families_and_finetuning(tmp_path: Path) -> None:
    """Each family against SDPA; each training against the three ways that transformers pads."""
    kinds = (3.0, "inference", "wikipedia"), (2.0, "training", "full")
    rows = [
        model_row({OURS: 1.0, SDPA: gain}, model="MiniLM roberta", step=step, lengths=lengths)
        for gain, step, lengths in kinds
    ]
    case = {"task": "cola", "model": "MiniLM", "steps": 8, "batch": 32, "judged": 256, "S": 128, "dtype": "float32"}
    work = Work(tokens=4000, sequences=512)
    tuned = Row("finetuning", case, work)
    tuned.timings = {OURS: timing(2.0), **{name: timing(2.0 + i) for i, name in enumerate(report.FINETUNING, 1)}}
    run = empty_run(rows=[*rows, tuned])
    assert "| roberta | 3.00 x |  |  | 2.00 x |" in write_report(tmp_path, "docs/performance.md", here=run)
    text = (tmp_path / "README.md").read_text()
    what = "CoLA: 8 steps of 32, then 256 evaluated, up to 128 tokens"
    assert f"| {what} | 2 k tokens/s | 1.50 x | 2.00 x | 2.50 x |" in text


def test_runs_on_real_data_stand_beside_transformers(tmp_path: Path) -> None:
    record = {
        "task": "mrpc",
        "features": None,
        "data": "whole",
        "main": "f1",
        "train": 3668,
        "dev": {"dev": 408},
        "epochs": 1.0,
        "batch_size": 32,
        "learning_rate": 1e-4,
        "figures": {"fastbert": {"f1": 0.875}, "transformers": {"f1": 0.87}},
        "intervals": {"f1": [0.85, 0.9]},
        "seconds": {"fastbert": 100.0, "transformers": 250.0},
        "machine": {"cpu": "a CPU", "threads": 2},
        "started": "2026-11-28T16:00:00",
        "commit": "abc",
        "command": "python -m bench beside mrpc",
    }
    path = tmp_path / "runs.jsonl"
    alone = {
        "figures": {"fastbert": {"f1": 0.9}, "transformers": None},
        "seconds": {"fastbert": 9, "transformers": None},
    }
    frozen = {**record, "task": "ner", "features": "last", **alone}
    path.write_text(json.dumps(record) + "\n" + json.dumps(frozen) + "\n")
    line = (
        "| mrpc: whole | 3,668, 1 x, 32 a step, 0.0001; 408 | f1 | 87.5 (85.0 to 90.0) | 87.0 "
        "| 100 s, 250 s: 2.50 x | 88.9 |"
    )
    assert line in runs_section(path).splitlines()
    line = "| ner, last frozen: whole | 3,668, 1 x, 32 a step, 0.0001; 408 | f1 | 90.0 (85.0 to 90.0) |  |  | 94.9 |"
    assert line in runs_section(path).splitlines()
    assert "python -m bench beside mrpc" in runs_section(path)
    assert runs_section(tmp_path / "none.jsonl") == ""


def test_a_section_that_does_not_end_takes_no_other_with_it() -> None:
    text = "<!-- report: a -->\nmine\n<!-- report: b -->\n<!-- /report -->\n"
    assert report.put(text, "b", "new\n", "README.md") == text.replace("b -->\n", "b -->\nnew\n")
    with pytest.raises(ValueError, match="report: a -->"):
        report.put(text, "a", "new\n", "README.md")


def test_the_latest_gpu_comes_first(tmp_path: Path) -> None:
    rows = [model_row({SDPA: 1.0, OURS: 1.0})]
    text = write_report(
        tmp_path,
        cpu=empty_run(started="2032-01-01T00:00:00+00:00", rows=rows),
        old=empty_run("cuda", started="2030-01-01T00:00:00+00:00", rows=rows),
        new=empty_run("cuda", started="2031-01-01T00:00:00+00:00", rows=rows),
        newest=empty_run("cuda", started="2033-01-01T00:00:00+00:00"),  # without models
    )
    assert '"results/new/headline.svg"' in text


def test_memory_is_of_the_latest_run_that_has_it(tmp_path: Path) -> None:
    def run(started: str, kept: float) -> Run:
        case = {"hidden": 768, "dtype": "bfloat16", "padding": "half"}
        return empty_run(started=started, rows=[Row("memory", case, values={SDPA: 27960.0, OURS: kept}, unit="B")])

    runs = {"new": run("2031", 12320.0), "old": run("2030", 27960.0), "newest": empty_run(started="2032")}
    text = write_report(tmp_path, "docs/performance.md", **runs)
    assert "| 768 | bfloat16 | half | 27960 | 12320 | 0.44 |" in text


def test_the_telling_cases() -> None:
    chosen = [[row.case[key] for key in ("model", "step", "lengths", "S")] for row in telling(invented_run("cuda"))]
    assert chosen == [
        ["MiniLM", "inference", "squad", 384],
        ["MiniLM", "training", "wikipedia", 512],
        ["base", "inference", "squad", 384],
        ["base", "training", "wikipedia", 512],
        ["large", "inference", "squad", 384],
        ["large", "inference", "full", 512],
        ["large", "training", "wikipedia", 512],
        ["large", "training", "full", 512],
    ]


def test_the_usual_dtype_is_told() -> None:
    rows = [model_row({SDPA: 1.0, OURS: 1.0}, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert [row.case["dtype"] for row in telling(empty_run("cpu", rows=rows))] == ["float32"]
    assert [row.case["dtype"] for row in telling(empty_run("cuda", rows=rows))] == ["bfloat16"]


def test_what_to_be_careful_about_is_said(tmp_path: Path) -> None:
    tests = {"status": 1, "failed": ["FAILED tests/test_x.py::test_y"], "summary": "1 failed, 3 passed in 2.0s"}
    failed = Row("attention", {"pass": "forward"}, failures={OURS: "wrong: off by 1e0"})
    rows = [model_row({SDPA: 1.0, OURS: 1.0}), failed, Row("ffn", {}, failures={"Liger": "is not here"})]
    text = write_report(tmp_path, here=empty_run(tests=tests, complete=False, rows=rows))
    assert "**Not all tests passed: 1 failed, 3 passed in 2.0s.** **The run was cut short.**" in text
    assert "**fastbert has no time in 1 of 3 cases.**" in text
    page = (tmp_path / "results" / "here.md").read_text()
    assert "- `FAILED tests/test_x.py::test_y`" in page
    assert "- fastbert has no time in 1 of 1 cases: `wrong: off by 1e0` (attention forward)" in page


def test_nothing_is_said_where_all_is_well(tmp_path: Path) -> None:
    tests = {"status": 0, "failed": [], "summary": "4 passed in 2.0s"}
    text = write_report(tmp_path, here=empty_run(tests=tests, rows=[model_row({SDPA: 1.0, OURS: 1.0})]))
    assert not any(word in text for word in ("tests passed", "cut short", "no time"))


def test_a_page_has_times_rates_shares_and_failures(tmp_path: Path) -> None:
    write_report(tmp_path, here=small_run())
    lines = (tmp_path / "results" / "here.md").read_text().splitlines()
    assert "All: pass forward, tokens 10, dtype float32, dropout 0.0." in lines
    assert "| hidden | fastbert reaches | of ceiling | fastbert | PyTorch |" in lines
    ours, stock = "**500 ms**<br>450 ms to 550 ms<br>12 MB", "**1 s**<br>980 ms to 1.02 s"
    assert f"| 384 | 2 GB/s | 50% | {ours} | {stock}<br>2.00 x |" in lines
    assert f"| 768 |  |  | none, see below | {stock} |" in lines
    assert "- fastbert has no time in 1 of 2 cases: `wrong: off` (layer_norm forward 10 768 float32 0.0)" in lines
    slower = "**2 s**<br>1.96 s to 2.04 s"
    slowest = "**3 s**<br>2.94 s to 3.06 s<br>1.50 x"
    assert f"| 500 GFLOP/s | 25% | {slower} | {slowest} | {stock}<br>0.50 x | none, see below |" in lines
    assert "- new has no time in 1 of 1 cases: `absent` (attention backward 10 2 32 128 float32)" in lines
    assert any(line.startswith("| copy | 2 |") and "| 4 GB/s |  | **1 s**" in line for line in lines)
    assert f"| cpu | {CPU} |" in lines


def test_clocks_are_on_the_page() -> None:
    run = empty_run("cuda", clocks={"before": {"clocks.sm": "345 MHz"}, "after": {"clocks.sm": "1980 MHz"}})
    text = report.page(run, "here", {})
    assert "| clocks.sm before | 345 MHz |\n| clocks.sm after | 1980 MHz |" in text


def test_cuda_graphs_are_compared_with_each_other() -> None:
    row = model_row({OURS: 4.0, SDPA: 6.0, f"{OURS}, CUDA graph": 1.0, f"{SDPA}, CUDA graph": 2.0})
    *_, line = report.timings_table([row], report.Roof(empty_run())).splitlines()
    cells = [cell.split("<br>") for cell in line.strip("| ").split(" | ")]
    assert [cell[2:] for cell in cells[-4:]] == [[], [], ["1.50 x"], ["2.00 x"]]


def test_a_breakdown_in_milliseconds_and_percent() -> None:
    case = model_case(provider=OURS)
    row = Row("breakdown", case, values={"matrix products": 0.003, "gaps": 0.001, "dropout": 0.0}, unit="s")
    *_, line = report.breakdown_table([row]).splitlines()
    assert line == "| 4 ms | 3 ms, 75% | 1 ms, 25% |  |"


def test_what_holds_no_run_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tune.json").write_text('{"tiles": []}')
    write_report(tmp_path, here=empty_run())
    assert "skipped: " in capsys.readouterr().out
    assert [path.name for path in sorted((tmp_path / "results").iterdir())] == ["here.json", "here.md", "tune.json"]


@pytest.mark.parametrize("rows", [0, 10, 40, 80])
def test_a_run_that_was_cut_short(rows: int, tmp_path: Path) -> None:
    run = invented_run("cpu")
    random.Random(rows).shuffle(run.rows)
    run.rows = run.rows[:rows]
    run.complete = False
    write_report(tmp_path, here=run)
    page = (tmp_path / "results" / "here.md").read_text()
    assert "**The run was cut short.**" in page
    for row in run.rows:
        assert f"### {row.bench}\n" in page
    shown = {path.name for path in tmp_path.glob("results/here/*.svg")}
    names = {f"{name}{variant}.svg" for name in PICTURES for variant in ("", "-dark")}
    assert shown == {name for name in names if f'"here/{name}"' in page}


def test_a_rehearsal_with_models_that_nobody_knows(tmp_path: Path) -> None:
    rows = [model_row({SDPA: 1.0, OURS: 1.0}, model="tiny", lengths=lengths) for lengths in ("full", "squad")]
    rows.append(Row("breakdown", rows[0].case | {"provider": OURS}, values={"new part": 1.0, "other": 1.0}, unit="s"))
    assert "headline" not in write_report(tmp_path, here=empty_run(rows=rows)).replace("report: headline", "")
    assert (tmp_path / "results" / "here" / "breakdown.svg").exists()


def test_stale_pictures_go(tmp_path: Path) -> None:
    write_report(tmp_path, here=small_run())
    folder = tmp_path / "results" / "here"
    assert {path.name for path in folder.iterdir()} == {"ceiling.svg", "ceiling-dark.svg"}
    (folder / "mine.txt").touch()
    (folder / "roofline.png").touch()
    write_report(tmp_path, here=empty_run())
    assert {path.name for path in folder.iterdir()} == {"mine.txt"}


def test_of_a_kernel_the_largest_case_is_drawn() -> None:
    case = {"pass": "forward", "tokens": 64, "hidden": 768, "dtype": "float32", "dropout": 0.1}
    changes = [
        {},
        {"tokens": 32},
        {"dropout": 0.0},
        {"dtype": "bfloat16", "tokens": 128},
        {"hidden": 1024, "tokens": 9},
    ]
    rows = [Row("layer_norm", case | change, Work(bytes=1), {OURS: timing(1.0)}) for change in changes]
    rows.append(Row("layer_norm", case | {"tokens": 256}, Work(bytes=1), {"PyTorch": timing(1.0)}, {OURS: "wrong"}))
    for ordered in (rows, rows[::-1]):
        found = kernels(empty_run(rows=ordered))
        assert list(found) == [("layer_norm", "768"), ("layer_norm", "1024")]
        assert found["layer_norm", "768"]["forward"].case == case
