"""What people see of the benches of inference: the README's section, its picture, the terminal's table."""

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.colors import to_hex

from bench import bench_inference, pictures, report
from bench.record import OURS, Row, Run
from bench.shown import PATCHED, STOCK, behind, engines, precisions, sides
from bench.table import terminal_table
from fastbert.training.style import BLUE, ORANGE, PALE, STYLE
from tests.invented import empty_run, engine_row

SECONDS = {
    STOCK: 4.0,
    PATCHED: 1.0,
    OURS: 2.0,
    f"{OURS} bf16": 1.0,
    f"{OURS} int8": 0.8,
    f"{STOCK} bf16": 3.0,
    "ONNX Runtime": 8.0,
    "ONNX Runtime int8": 2.0,
    "OpenVINO": 2.5,
    "OpenVINO bf16": 1.25,
    "OpenVINO int8": 0.5,
    "CTranslate2": 3.0,
    "CTranslate2 int8": 0.7,
}
QUALITY = {STOCK: 86.72, OURS: 86.72, f"{OURS} int8": 86.6, "OpenVINO int8": 86.76, f"{STOCK} bf16": 86.71}


def engine(task: str = "queries", count: int = 100, model: str = "MiniLM", **changes: Any) -> Row:
    case = bench_inference.case_of(model, task, count) | {"source": "SQuAD"} | changes
    return engine_row(case, "cpu", random.Random(0), **SECONDS)


def run_of(*rows: Row) -> Run:
    quality = Row("quality", {"model": "MiniLM", "what": "STS-B", "dtype": "fp32"}, values=QUALITY, unit="%")
    run = empty_run(rows=[*rows, quality])
    run.versions |= {"openvino": "2026.4.1", "sentence-transformers": "6.2.0"}
    return run


def test_the_readme_has_times_rates_and_quality() -> None:
    section = report.inference_section({Path("/a/here.json"): run_of(engine())}, Path("/a"))
    lines = section.splitlines()
    assert (
        "| MiniLM-L6, short queries: 100 texts of SQuAD | 1.25 k tokens/s, 25 texts/s | 4.00 x "
        "| **2.00 x**<br>2.5 k tokens/s, 50 texts/s | 1.60 x OpenVINO "
        "| **4.00 x**<br>5 k tokens/s, 100 texts/s | 3.20 x OpenVINO "
        "| 5.00 x<br>6.25 k tokens/s, 125 texts/s | 8.00 x OpenVINO |" in lines
    )
    assert (
        "| STS-B dev, Spearman | 86.72 % |  | 86.72 % |  |  | sentence-transformers 86.71 % "
        "| 86.60 % | OpenVINO 86.76 % |" in lines
    )
    assert "Another is faster in 1 of 3: MiniLM-L6, short queries, int8: 0.62 x of OpenVINO." in section
    assert "Not timed: sentence-transformers, compiled (is not here)." in section
    assert "Against sentence-transformers 6.2.0, openvino 2026.4.1." in section
    assert 'srcset="here/inference-dark.svg"' in section


def test_nothing_is_shown_without_a_time_of_sentence_transformers_or_from_tokens_alone() -> None:
    row = engine()
    del row.timings[STOCK]
    for rows in ([], [row], [engine(**{"from": "tokens"})], [engine(model="tiny")]):
        run = empty_run(rows=rows)
        assert report.inference_section({Path("/a/here.json"): run}, Path("/a")) == ""
        assert pictures.inference(run) is None


def test_what_is_patched_by_fastbert_is_no_other() -> None:
    assert sides(engine(), "fp32") == (OURS, "OpenVINO")
    assert sides(engine(), "int8") == (f"{OURS} int8", "OpenVINO int8")
    assert sides(engine(), "fp16") == (None, None)
    assert precisions([engine()]) == ["fp32", "bf16", "int8"]


def test_where_nothing_is_faster_nothing_is_said() -> None:
    row = engine()
    del row.timings["OpenVINO int8"], row.timings["CTranslate2 int8"]
    assert behind([row]) == ""


def test_the_order_is_that_of_models_and_tasks() -> None:
    rows = [engine("query", model="base"), engine("query"), engine("queries")]
    chosen = [(row.case["model"], row.case["task"]) for row in engines(empty_run(rows=rows))]
    assert chosen == [("MiniLM", "queries"), ("MiniLM", "query"), ("base", "query")]


def test_a_bar_is_as_long_as_its_text_says_in_each_precision() -> None:
    with rc_context(STYLE):
        figure = pictures.inference(run_of(engine()))
    assert figure is not None
    found = {
        ax.get_title(loc="left"): [
            (text.get_text(), float(patch.get_width()), to_hex(patch.get_facecolor()))
            for text, patch in zip([it for it in ax.texts if it.get_ha() == "left"], ax.patches, strict=True)
        ]
        for ax in figure.axes
    }
    assert found == {
        "fp32": [("2.00 x", 2.0, BLUE), ("1.60 x OpenVINO", 1.6, PALE)],
        "bf16": [("4.00 x", 4.0, BLUE), ("3.20 x OpenVINO", 3.2, PALE)],
        "int8": [("5.00 x", 5.0, ORANGE), ("8.00 x OpenVINO", 8.0, PALE)],
    }


def test_the_terminal_has_a_line_a_precision() -> None:
    lines = [
        line.split("  ")[0] + " " + line.rsplit("  ", 1)[1] for line in terminal_table(run_of(engine())).splitlines()
    ]
    label = "inference MiniLM queries 100 strings fp32 SQuAD"
    assert lines[1:] == [
        f"{label} 1.25 x OpenVINO",
        f"{label} bf16 1.25 x OpenVINO bf16",
        f"{label} int8 0.62 x OpenVINO int8",
    ]
