"""The report and the comparison of runs, on runs with invented figures."""

import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")  # only for the report: a GPU machine tests without it

from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bench import (
    bench_attention,
    bench_breakdown,
    bench_cross_entropy,
    bench_embedding,
    bench_ffn,
    bench_layer_norm,
    bench_memory,
    bench_model,
    bench_roof,
    report,
)
from bench.compare import compare, differences
from bench.compare import main as compare_main
from bench.record import OURS, Row, Run, Timing, Work
from bench.shapes import MODELS, batch_of, tokens_of

SDPA = "transformers SDPA"
CPU = "INVENTED(R) CPU Platinum 8481C Processor @ 2.70GHz"
PEAK = {"cuda": {"bfloat16": 7.6e14, "float16": 7.5e14, "float32": 5e13}, "cpu": {"float32": 2.4e11, "bfloat16": 9e10}}
COPY = {"cuda": 4.1e12, "cpu": 1.9e10}


def empty_run(device: str = "cpu", started: str = "2030-01-02T03:04:05+00:00", **changes: Any) -> Run:
    gpu = {"gpu": "INVENTED GPU", "memory_bytes": 150_000_000_000} if device == "cuda" else {"gpu": None}
    run = Run(
        machine={"cpu": CPU, "threads": 2, **gpu},
        versions={"python": "3.12.1", "torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0"},
        commit="abc1234",
        command="pytest bench --benchmark",
        started=started,
        clocks={"before": None, "after": None},
        complete=True,
    )
    return Run(**{**vars(run), **changes})


def timing(seconds: float, spread: float = 0.02, peak_bytes: int | None = None) -> Timing:
    return Timing(seconds, (1 - spread) * seconds, (1 + spread) * seconds, 20, "events", peak_bytes)


def invented_run(device: str) -> Run:
    """Every case of every bench, timed by a random generator."""
    run, rng = empty_run(device), random.Random(0)
    peak, copy = PEAK[device], COPY[device]

    def least(work: Work, dtype: str) -> float:
        rate = peak["bfloat16" if dtype == "autocast" else dtype]
        return max(work.bytes / copy, work.flops / rate)

    def add(bench: str, case: dict[str, Any], work: Work, shares: dict[str, float], **failures: str) -> None:
        seconds = {name: least(work, case.get("dtype", "float32")) / share for name, share in shares.items()}
        timings = {name: timing(s * rng.uniform(0.97, 1.03)) for name, s in seconds.items()}
        run.rows.append(Row(bench, case, work, timings, failures))

    def unique(module: Any) -> list[dict[str, Any]]:
        cases = [*getattr(module, "GOALS", {}).get(device, []), *module.CASES[device]]
        return [case for i, case in enumerate(cases) if case not in cases[:i]]

    for case in unique(bench_roof):
        if case["what"] == "copy":
            add("roof", case, Work(bytes=2 * case["bytes"]), {"PyTorch": 1.0})
        elif case["what"] == "launch":
            run.rows.append(Row("roof", case, timings={"PyTorch": timing(1e-3 if case["how"] == "eager" else 3e-4)}))
        else:
            M, K, N = case["tokens"], case["in"], case["out"]
            work = Work(flops=2 * M * N * K, products=((case["pass"], M, K, N),))
            add("roof", case, work, {"PyTorch": 1.0 if case["pass"] == "square" else rng.uniform(0.7, 0.9)})
    for case in unique(bench_attention):
        sequences = tokens_of(case["lengths"], case["tokens"])
        H, D, itemsize = case["heads"], case["head_dim"], 4 if case["dtype"] == "float32" else 2
        tensors, products = (4, 2) if case["pass"] == "forward" else (8, 5)
        moved = tensors * sum(sequences) * H * D * itemsize
        work = Work(moved, 2 * products * H * D * sum(n * n for n in sequences))
        others = {"PyTorch": 0.07, "torch.compile": 0.12, "SDPA efficient": 0.25, "SDPA cuDNN": 0.4, "flash-attn": 0.5}
        others = others if device == "cuda" else {"PyTorch": 0.2, "SDPA": 0.5}
        add("attention", case, work, {OURS: rng.uniform(0.45, 0.9), **others}, varlen_attn="has no dropout")
    for module, bench in ((bench_layer_norm, "layer_norm"), (bench_embedding, "embedding")):
        for case in unique(module):
            itemsize = 4 if case["dtype"] == "float32" else 2
            tensors = 3 if case["pass"] == "forward" else 5
            work = Work(bytes=tensors * case["tokens"] * case["hidden"] * itemsize)
            add(bench, case, work, {OURS: rng.uniform(0.75, 0.97), "PyTorch": 0.24, "torch.compile": 0.7})
    for case in unique(bench_ffn):
        M, K, N = case["tokens"], case["hidden"], 4 * case["hidden"]
        passes = ("forward",) if case["pass"] == "forward" else ("dgrad", "wgrad")
        work = Work(flops=2 * M * K * N * len(passes), products=tuple((name, M, K, N) for name in passes))
        add("ffn", case, work, {OURS: rng.uniform(0.65, 0.85), "PyTorch": 0.6, "torch.compile": 0.66})
    for case in unique(bench_cross_entropy):
        n, K, V = case["labelled"], case["hidden"], case["vocabulary"]
        passes = ("forward",) if case["pass"] == "forward" else ("forward", "dgrad", "wgrad")
        work = Work(flops=2 * n * K * V * len(passes), products=tuple((name, n, K, V) for name in passes))
        add("cross_entropy", case, work, {OURS: rng.uniform(0.5, 0.7), "PyTorch": 0.3, "Liger": 0.45})
    for case in unique(bench_model):
        layers, hidden, _ = MODELS[case["model"]]
        sequences = batch_of(case["lengths"], case["batch"], case["S"])
        flops = sum((24 * hidden * hidden + 4 * n * hidden) * n * layers for n in sequences)
        training = case["step"] == "training"
        work = Work(flops=flops * (3 if training else 1), tokens=sum(sequences), sequences=len(sequences))
        waste = sum(sequences) / (case["batch"] * case["S"])
        small = 1 / (1 + 2 / case["batch"])
        shares = {
            OURS: 0.6 * small,
            SDPA: 0.42 * waste * small,
            "transformers eager": 0.3 * waste * small,
            "reference": 0.2 * small,
            "transformers SDPA, compiled": 0.5 * waste * small,
            "transformers SDPA, compiled dynamic": 0.47 * waste * small,
        }
        if device == "cuda" and case["batch"] <= 8:
            shares |= {f"{OURS}, CUDA graph": 0.65 * small**0.7, f"{SDPA}, CUDA graph": 0.5 * small**0.7}
        if training:
            del shares["reference"]
        add("model", case, work, shares)
    for case in unique(bench_breakdown):
        ours = case["provider"] == OURS
        total = (2e-4 if case["batch"] == 1 else 0.2 if case["step"] == "training" else 0.06) * (1 if ours else 2.4)
        weights = dict.fromkeys((*bench_breakdown.PARTS, "other", "gaps"), 0.04 if ours else 0.08)
        weights["matrix products"], weights["attention"] = 0.7, 0.12
        if case["step"] == "inference":
            weights["optimizer"] = weights["cross-entropy"] = weights["dropout"] = 0.0
        values = {part: total * weight / sum(weights.values()) for part, weight in weights.items()}
        run.rows.append(Row("breakdown", case, values=values, unit="s"))
    for case in unique(bench_memory):
        values = {SDPA: 36.1 * case["hidden"], OURS: (32.1 if case["padding"] == "none" else 16.0) * case["hidden"]}
        run.rows.append(Row("memory", case, values=values, unit="B per token and layer"))
    return run


README = """# before
<!-- report: headline -->
old
<!-- /report -->
between
<!-- report: memory -->
<!-- /report -->
after
"""


def model_case(**changes: Any) -> dict[str, Any]:
    return bench_model.case_of("base", "inference", 8, 384, "squad", "float32") | changes


def model_row(seconds: dict[str, float], tokens: int = 1000, **changes: Any) -> Row:
    work = Work(flops=10, tokens=tokens, sequences=8)
    return Row("model", model_case(**changes), work, {name: timing(s) for name, s in seconds.items()})


def write_report(folder: Path, **runs: Run) -> str:
    """The README that these runs make, by the names of their files."""
    for name, run in runs.items():
        run.write(folder / "results" / f"{name}.json")
    (folder / "README.md").write_text(README)
    assert report.main(sorted((folder / "results").glob("*.json")), folder / "README.md") == 0
    return (folder / "README.md").read_text()


def test_the_headline_is_in_tokens_a_second_and_compares_with_the_faster_compiled(tmp_path: Path) -> None:
    seconds = {SDPA: 2.0, f"{SDPA}, compiled": 1.6, f"{SDPA}, compiled dynamic": 1.25, OURS: 0.5}
    text = write_report(tmp_path, here=empty_run(rows=[model_row(seconds)]))
    line = (
        "| BERT-base | inference, SQuAD lengths to 384, batch 8, float32 | 500 | 800 | 2 k | **4.00 x** | **2.50 x** |"
    )
    assert line in text.splitlines()
    assert f"![How many times as fast as transformers, on {CPU}, 2 threads](results/here/headline.png)" in text
    assert (
        f"{CPU}, 2 threads, 2030-01-02, torch 2.13.0, triton 3.7.1, transformers 5.23.0, "
        "commit abc1234: `pytest bench --benchmark`. [All tables and pictures](results/here.md), "
        "[every figure](results/here.json)." in text
    )
    assert (tmp_path / "results" / "here" / "headline.png").exists()


def test_what_is_slower_is_shown_too(tmp_path: Path) -> None:
    text = write_report(tmp_path, here=empty_run(rows=[model_row({SDPA: 0.5, OURS: 1.0})]))
    assert "| 2 k |  | 1 k | **0.50 x** |  |" in text


def test_only_the_sections_change(tmp_path: Path) -> None:
    row = Row("memory", {"hidden": 768}, values={SDPA: 200.0, OURS: 50.0}, unit="B")
    text = write_report(tmp_path, here=empty_run(rows=[row]))
    before, headline, memory = text.split("<!-- report: ")
    assert before == "# before\n"
    assert headline == "headline -->\n<!-- /report -->\nbetween\n"  # no model was measured
    assert memory.startswith("memory -->\n| hidden | transformers SDPA, B | fastbert | ratio |\n")
    assert "| 768 | 200 | 50 | 0.25 |" in memory
    assert memory.endswith("\n<!-- /report -->\nafter\n")


@pytest.mark.parametrize("lost", ["<!-- report: headline -->", "<!-- report: memory -->", "<!-- /report -->\nbetween"])
def test_a_marker_that_is_missing(lost: str, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.replace(lost, ""))
    with pytest.raises(ValueError, match="README has no section from <!-- report: "):
        report.main([], readme)
    assert readme.read_text() == README.replace(lost, "")


def test_a_section_that_does_not_end_takes_no_other_with_it() -> None:
    text = "<!-- report: a -->\nmine\n<!-- report: b -->\n<!-- /report -->\n"
    assert report.put(text, "b", "new\n") == text.replace("b -->\n", "b -->\nnew\n")
    with pytest.raises(ValueError, match="report: a -->"):
        report.put(text, "a", "new\n")


def test_the_latest_gpu_comes_first(tmp_path: Path) -> None:
    rows = [model_row({SDPA: 1.0, OURS: 1.0})]
    text = write_report(
        tmp_path,
        cpu=empty_run(started="2032-01-01T00:00:00+00:00", rows=rows),
        old=empty_run("cuda", started="2030-01-01T00:00:00+00:00", rows=rows),
        new=empty_run("cuda", started="2031-01-01T00:00:00+00:00", rows=rows),
        newest=empty_run("cuda", started="2033-01-01T00:00:00+00:00"),  # without models
    )
    assert "(results/new/headline.png)" in text


def test_memory_is_of_the_latest_run_that_has_it(tmp_path: Path) -> None:
    def run(started: str, kept: float) -> Run:
        case = {"hidden": 768, "dtype": "bfloat16", "padding": "half"}
        return empty_run(started=started, rows=[Row("memory", case, values={SDPA: 27960.0, OURS: kept}, unit="B")])

    text = write_report(tmp_path, new=run("2031", 12320.0), old=run("2030", 27960.0), newest=empty_run(started="2032"))
    assert "| 768 | bfloat16 | half | 27960 | 12320 | 0.44 |" in text


def test_the_telling_cases() -> None:
    chosen = [
        [row.case[key] for key in ("model", "step", "lengths", "S")] for row in report.telling(invented_run("cuda"))
    ]
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
    assert [row.case["dtype"] for row in report.telling(empty_run("cpu", rows=rows))] == ["float32"]
    assert [row.case["dtype"] for row in report.telling(empty_run("cuda", rows=rows))] == ["bfloat16"]


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


def small_run() -> Run:
    """A copy at 4 GB/s, products at 2 TFLOP/s; LayerNorm at a half of it, attention at a quarter."""
    norm = {"pass": "forward", "tokens": 10, "hidden": 384, "dtype": "float32", "dropout": 0.0}
    square = {"what": "product", "pass": "square", "tokens": 10, "in": 10, "out": 10, "dtype": "float32"}
    attention = {"pass": "backward", "tokens": 10, "heads": 2, "head_dim": 32, "lengths": "128", "dtype": "float32"}
    stock, copy, products = {"PyTorch": timing(1.0)}, Work(bytes=4 * 10**9), Work(flops=10**12)
    others = {"PyTorch": timing(3.0), "SDPA": timing(1.0)}
    rows = [
        Row("roof", {"what": "copy", "bytes": 2}, copy, stock),
        Row("roof", square, products, {"PyTorch": timing(0.5)}),
        Row("layer_norm", norm, Work(bytes=10**9), {**stock, OURS: timing(0.5, 0.1, 12_000_000)}),
        Row("layer_norm", norm | {"hidden": 768}, Work(bytes=10**9), stock, {OURS: "wrong: off"}),
        Row("attention", attention, Work(10**9, 10**12), {**others, OURS: timing(2.0)}, {"new": "absent"}),
    ]
    return empty_run(rows=rows)


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
    text = report.page(run, "here", [])
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
    shown = {path.stem for path in tmp_path.glob("results/here/*.png")}
    assert shown == {name for name in report.PICTURES if f"![{name}](here/{name}.png)" in page}


def test_a_rehearsal_with_models_that_nobody_knows(tmp_path: Path) -> None:
    rows = [model_row({SDPA: 1.0, OURS: 1.0}, model="tiny", lengths=lengths) for lengths in ("full", "squad")]
    rows.append(Row("breakdown", rows[0].case | {"provider": OURS}, values={"new part": 1.0, "other": 1.0}, unit="s"))
    assert "headline.png" not in write_report(tmp_path, here=empty_run(rows=rows))
    assert (tmp_path / "results" / "here" / "breakdown.png").exists()


def test_stale_pictures_go(tmp_path: Path) -> None:
    write_report(tmp_path, here=small_run())
    folder = tmp_path / "results" / "here"
    assert {path.name for path in folder.iterdir()} == {"ceiling.png", "roofline.png"}
    (folder / "mine.txt").touch()
    write_report(tmp_path, here=empty_run())
    assert {path.name for path in folder.iterdir()} == {"mine.txt"}


def test_points_of_the_roofline() -> None:
    """LayerNorm at a half of the slope; attention at 1000 FLOP a byte, at a quarter of the large product."""
    with rc_context(report.STYLE):
        figure = report.roofline(small_run())
    assert figure is not None
    *points, roof = figure.axes[0].lines
    assert [line.get_marker() for line in points] == ["v", "^"]  # backward, forward
    (x_attention, y_attention), (x_norm, y_norm) = ([float(v) for v in line.get_xydata()[0]] for line in points)
    assert (x_attention, y_attention) == (1000.0, 5e11)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "attention",
        "LayerNorm",
        "forward",
        "backward, or both",
    ]
    assert y_norm == pytest.approx(0.5 * 4e9 * x_norm)
    assert [tuple(point) for point in roof.get_xydata()][1:2] == [(500.0, 2e12)]


def test_what_is_above_the_roof_is_drawn() -> None:
    """As on a machine that was disturbed while its ceilings were measured."""
    run = small_run()
    run.rows[-1].timings[OURS] = timing(1e-3)
    with rc_context(report.STYLE):
        figure = report.roofline(run)
    assert figure is not None
    assert figure.axes[0].get_ylim()[1] > figure.axes[0].lines[0].get_ydata()[0] == 1e15
    assert not illegible(figure)


def test_the_intensity_of_plain_products() -> None:
    work = Work(flops=2 * 2 * 3 * 5, products=(("forward", 2, 3, 5),))
    assert report._intensity(Row("ffn", {"dtype": "bfloat16"}, work)) == 60 / (2 * (6 + 15 + 10))


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
        found = report.kernels(empty_run(rows=ordered))
        assert list(found) == [("layer_norm", "768"), ("layer_norm", "1024")]
        assert found["layer_norm", "768"]["forward"].case == case


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def dense(request: pytest.FixtureRequest) -> Run:
    return invented_run(request.param)


def test_pictures_are_the_same_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        assert report.draw(invented_run("cpu"), tmp_path / folder) == list(report.PICTURES)
    for name in report.PICTURES:
        first, second = ((tmp_path / folder / f"{name}.png").read_bytes() for folder in ("a", "b"))
        assert first == second


def test_pictures_are_small_and_opaque(tmp_path: Path) -> None:
    assert report.draw(invented_run("cuda"), tmp_path) == list(report.PICTURES)
    for name in report.PICTURES:
        path = tmp_path / f"{name}.png"
        assert path.stat().st_size < 150_000
        with Image.open(path) as image:
            assert 700 <= image.width <= 1200
            assert 300 <= image.height <= 1200
            assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def drawn_texts(figure: Figure) -> list[Text]:
    """Texts that are seen: not of hidden axes, nor of ticks beyond an axis' ends."""
    hidden = {text for ax in figure.axes if not ax.get_visible() for text in ax.findobj(Text)}
    for axis in figure.findobj(Axis):
        low, high = sorted(axis.get_view_interval())
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not low - 1e-9 * abs(low) <= tick.get_loc() <= high + 1e-9 * abs(high):
                hidden |= {tick.label1, tick.label2}
    return [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in hidden]


def illegible(figure: Figure) -> list[str]:
    """Texts that overlap, or leave the figure, or the axes that they annotate."""
    FigureCanvasAgg(figure).draw()
    boxes = {text: Text.get_window_extent(text).padded(-0.5) for text in drawn_texts(figure)}  # without arrows
    within = {text: figure.bbox for text in boxes} | {text: ax.bbox for ax in figure.axes for text in ax.texts}
    found = [
        f"{text.get_text()!r} leaves"
        for text, box in boxes.items()
        if not all(within[text].padded(1).contains(*corner) for corner in (box.min, box.max))
    ]
    found += [f"{a.get_text()!r} {b.get_text()!r}" for a, b in combinations(boxes, 2) if boxes[a].overlaps(boxes[b])]
    return found


@pytest.fixture(scope="module")
def pictures(dense: Run) -> dict[str, Figure]:
    with rc_context(report.STYLE):
        figures = report.figures(dense)
        for figure in figures.values():
            figure.draw_without_rendering()
    return figures


@pytest.mark.parametrize("name", report.PICTURES)
def test_no_text_covers_another(name: str, pictures: dict[str, Figure]) -> None:
    with rc_context(report.STYLE):
        assert not illegible(pictures[name])


def test_the_check_for_covered_texts_sees_them() -> None:
    figure = Figure((3, 3))
    figure.subplots().set_xticks([])
    figure.text(0.5, 0.5, "one")
    assert not illegible(figure)
    figure.text(0.52, 0.51, "two")
    figure.text(0.9, 0.8, "beyond the end")
    assert sorted(illegible(figure)) == ["'beyond the end' leaves", "'one' 'two'"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("headline", ["tokens a second, relative to transformers SDPA (the line)", "fastbert"]),
        ("tokens", ["tokens/s", "tokens in a sequence", "sequences in a batch", "MiniLM-L6 inference, S = 128"]),
        ("ceiling", ["100%", "fastbert", "forward", "backward", "linear + GELU, hidden 768"]),
        ("roofline", ["copy, ", "plain product, ", "attention", "LayerNorm", "linear + GELU", "cross-entropy"]),
        ("breakdown", ["ms a step, and each part's share of the step", "matrix products", "69%", " 480 ms", "400"]),
    ],
)
def test_what_a_picture_says(name: str, expected: list[str], dense: Run, pictures: dict[str, Figure]) -> None:
    texts = [text.get_text().replace("\n", " ") for text in drawn_texts(pictures[name])]
    where = f"{dense.name}, 2030-01-02, torch 2.13.0, triton 3.7.1, transformers 5.23.0, commit abc1234"
    for line in (*expected, where):
        assert any(text.startswith(line) for text in texts), line


def bars(figure: Figure) -> list[tuple[str, float]]:
    """Every bar's text and length, axes by axes."""
    return [
        (text.get_text(), float(patch.get_width()))
        for ax in figure.axes
        for text, patch in zip(ax.texts, ax.patches, strict=True)
    ]


def test_bars_are_as_long_as_their_texts_say() -> None:
    seconds = {SDPA: 2.0, f"{SDPA}, compiled": 1.6, OURS: 0.5}
    figure = report.headline(empty_run(rows=[model_row(seconds)]))
    assert figure is not None
    assert bars(figure) == [("4.00 x", 4.0), ("1.25 x", 1.25)]
    figure = report.ceiling(small_run())
    assert figure is not None
    assert bars(figure) == [("50%", 0.5), ("25% PyTorch", 0.25), ("25%", 0.25), ("50% SDPA", 0.5)]


def test_rates_are_drawn_against_length_and_batch() -> None:
    rows = [
        model_row({OURS: 1.0}, tokens=n, lengths="full", S=S, batch=1) for S, n in ((512, 40), (128, 10), (384, 30))
    ]
    rows += [model_row({OURS: 2.0}, tokens=n, lengths="full", S=128, batch=n // 10) for n in (20, 80)]
    figure = report.tokens(empty_run(rows=rows[::-1]))
    assert figure is not None
    length, batch = ([tuple(map(float, point)) for point in ax.lines[0].get_xydata()] for ax in figure.axes)
    assert length == [(128, 40), (384, 30), (512, 40)]  # of 128 the largest batch
    assert batch == [(1, 10), (2, 10), (8, 40)]


def op_row(n: Any = 1, failures: dict[str, str] | None = None, **timings: Timing) -> Row:
    return Row("op", {"n": n}, Work(), timings, failures or {})


@pytest.mark.parametrize(
    ("after", "ratio"),
    [
        (Timing(1.5, 1.4, 1.6, 9, "clock"), 1.5),
        (Timing(0.5, 0.4, 0.6, 9, "clock"), 0.5),
        (Timing(1.5, 1.05, 1.6, 9, "clock"), None),  # the intervals meet
        (Timing(0.5, 0.4, 0.95, 9, "clock"), None),
    ],
)
def test_only_what_moved_beyond_its_spread_is_a_change(after: Timing, ratio: float | None) -> None:
    before = empty_run(rows=[op_row(fastbert=Timing(1.0, 0.9, 1.1, 9, "clock"))])
    changes = compare(before, empty_run(rows=[op_row(fastbert=after)]))
    assert [change.ratio for change in changes] == ([] if ratio is None else [ratio])


def test_little_is_no_change_however_small_its_spread() -> None:
    before = empty_run(rows=[op_row(fastbert=timing(1.0, 0.0), rival=timing(1.0, 0.0))])
    after = empty_run(rows=[op_row(fastbert=timing(1.019, 0.0), rival=timing(1.021, 0.0))])
    assert [change.provider for change in compare(before, after)] == ["rival"]


def test_the_largest_change_comes_first() -> None:
    seconds = {"a": 1.5, "b": 0.25, "c": 3.0}
    before = empty_run(rows=[op_row(**dict.fromkeys(seconds, timing(1.0)))])
    after = empty_run(rows=[op_row(**{name: timing(s) for name, s in seconds.items()})])
    assert [change.provider for change in compare(before, after)] == ["b", "c", "a"]


def run_compare(tmp_path: Path, before: Run, after: Run) -> int:
    before.write(tmp_path / "before.json")
    after.write(tmp_path / "after.json")
    return compare_main(tmp_path / "before.json", tmp_path / "after.json")


def test_a_comparison_is_read_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = empty_run(rows=[op_row("[b]", fastbert=timing(1.0), rival=timing(1.0), gone=timing(1.0)), op_row(2)])
    row = op_row(
        "[b]", fastbert=timing(2.0), rival=timing(0.5), failures={"gone": "RuntimeError: [x]", "new": "absent"}
    )
    assert run_compare(tmp_path, before, empty_run(rows=[row, op_row(3)])) == 1
    text = capsys.readouterr().out
    assert f"before  {CPU}, 2 threads, 2030-01-02T03:04:05+00:00, commit abc1234" in text
    assert text.index("fastbert: slower or larger") < text.index("others: faster or smaller")
    (line,) = [line for line in text.splitlines() if "│ fastbert │" in line]
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells == ["op [b]", "fastbert", "1 s (980 ms to 1.02 s)", "2 s (1.96 s to 2.04 s)", "+100.0%"]
    assert "-50.0%" in text
    assert "fails now: gone, op [b]: RuntimeError: [x]" in text
    assert "new" not in text
    assert "only before: 1 cases\n  op 2\n" in text
    assert "only after: 1 cases\n  op 3\n" in text
    assert "NOT ALIKE" not in text


@pytest.mark.parametrize(
    ("row", "status"),
    [
        (op_row(fastbert=timing(1.0), rival=timing(1.0)), 0),
        (op_row(fastbert=timing(0.5), rival=timing(2.0)), 0),
        (op_row(fastbert=timing(1.5), rival=timing(1.0)), 1),
        (op_row(rival=timing(1.0), failures={OURS: "wrong: off"}), 1),
        (op_row(rival=timing(1.0), failures={OURS: "not measured: the time was over"}), 0),
        (op_row(fastbert=timing(1.0), failures={"rival": "wrong: off"}), 0),
    ],
)
def test_the_exit_status_is_about_fastbert(row: Row, status: int, tmp_path: Path) -> None:
    before = empty_run(rows=[op_row(fastbert=timing(1.0), rival=timing(1.0))])
    assert run_compare(tmp_path, before, empty_run(rows=[row])) == status


def test_more_memory_is_a_change_for_the_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = (
        empty_run(rows=[Row("memory", {"hidden": 768}, values={SDPA: 200.0, OURS: kept})]) for kept in (100.0, 110.0)
    )
    assert run_compare(tmp_path, before, after) == 1
    assert "110 B" in capsys.readouterr().out
    assert run_compare(tmp_path, after, before) == 0


def test_other_machines_versions_and_clocks_are_loud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(sm: str, temperature: str, **changes: Any) -> Run:
        clocks = {"clocks.sm": sm, "clocks.mem": "[N/A]", "temperature.gpu": temperature}
        return empty_run("cuda", clocks={"before": None, "after": clocks}, **changes)

    before = run("1980 MHz", "40")
    assert differences(before, run("1965 MHz", "70")) == []
    other = run("1200 MHz", "40", complete=False)
    other.machine["gpu"] = "OTHER GPU"
    other.versions = {**before.versions, "torch": "2.14.0"}
    assert differences(before, other) == [
        "machine: gpu was INVENTED GPU, is OTHER GPU",
        "versions: torch was 2.13.0, is 2.14.0",
        "clocks.sm: was 1980 MHz, is 1200 MHz",
        "2030-01-02T03:04:05+00:00 was cut short",
    ]
    assert run_compare(tmp_path, before, other) == 0
    assert capsys.readouterr().out.count("NOT ALIKE") == 4
