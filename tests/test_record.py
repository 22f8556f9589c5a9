"""Result files and what is computed from them: ceilings, units, the table; lengths; which commit a run is of."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import commit
from bench.record import OURS, Recorder, Roof, Row, Run, Timing, Work, speedup
from bench.shapes import batch_of, tokens_of
from bench.table import beside, duration, rate, terminal_table


def test_quantiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0], "clock")
    assert (timing.median, timing.low, timing.high, timing.rounds) == (3.5, 2.0, 5.0, 6)
    assert Timing.of([7.0], "clock").high == 7.0
    with pytest.raises(ValueError, match="no times"):
        Timing.of([], "clock")


def row(bench: str, case: dict[str, Any], work: Work, **seconds: float) -> Row:
    timings = {name: Timing(s, 0.9 * s, 1.1 * s, 5, "clock") for name, s in seconds.items()}
    return Row(bench, case, work, timings)


ROOF = [
    row("roof", {"what": "copy", "bytes": 50}, Work(bytes=100), PyTorch=2.0),
    row("roof", {"what": "copy", "bytes": 500}, Work(bytes=1000), PyTorch=10.0),
    row(
        "roof",
        {"what": "product", "pass": "square", "tokens": 10, "in": 10, "out": 10, "dtype": "bfloat16"},
        Work(flops=2000, products=(("square", 10, 10, 10),)),
        PyTorch=1.0,
    ),
    row(
        "roof",
        {"what": "product", "pass": "forward", "tokens": 5, "in": 10, "out": 10, "dtype": "bfloat16"},
        Work(flops=1000, products=(("forward", 5, 10, 10),)),
        PyTorch=0.8,
    ),
]


def run_of(rows: list[Row]) -> Run:
    run = Run.here("cpu")
    run.rows = rows
    return run


def test_the_roof_is_the_larger_of_memory_and_arithmetic() -> None:
    roof = Roof(run_of(ROOF))
    bf16 = {"dtype": "bfloat16"}
    assert roof.copy == 100.0
    assert roof.product("bfloat16") == roof.product("autocast") == 2000.0
    assert roof.seconds(row("a", bf16, Work(bytes=300))) == 3.0
    assert roof.seconds(row("a", bf16, Work(bytes=300, flops=8000))) == 4.0
    assert roof.seconds(row("a", bf16, Work(flops=1000, products=(("forward", 5, 10, 10),)))) == 0.8
    assert roof.seconds(row("a", bf16, Work(flops=1000, products=(("dgrad", 5, 10, 10),)))) == 0.5  # not measured alone
    assert roof.seconds(row("a", {"dtype": "float32"}, Work(flops=1000))) is None
    assert Roof(run_of([])).seconds(row("a", bf16, Work(bytes=300))) is None
    it = row("a", bf16, Work(bytes=300, flops=1000), fastbert=4.0, rival=6.0)
    assert roof.share(it, OURS) == 0.75
    assert roof.utilisation(it, OURS) == 0.125
    assert speedup(it, "rival") == 1.5
    assert speedup(it, "absent") is None


def test_what_is_faster_than_its_ceiling_is_the_ceiling() -> None:
    roof = Roof(run_of(ROOF))
    within, beyond = (row("a", {"dtype": "bfloat16"}, Work(bytes=300), fastbert=s, rival=6.0) for s in (4.0, 1.5))
    assert [roof.percent(within, name) for name in (OURS, "rival")] == ["75%", "50%"]
    assert [roof.percent(beyond, name) for name in (OURS, "rival")] == ["100%*", "25%*"]
    assert [roof.exceeded(it) for it in (within, beyond)] == [False, True]
    assert roof.percent(row("a", {"dtype": "float32"}, Work(flops=1), fastbert=1.0), OURS) == ""
    assert terminal_table(run_of([*ROOF, beyond])).splitlines()[-1] == f"* {Roof.EXCEEDED}"
    assert "*" not in terminal_table(run_of([*ROOF, within]))


@pytest.mark.parametrize(
    ("work", "text"),
    [
        (Work(bytes=4_300_000_000), "2.15 GB/s"),
        (Work(bytes=4_300_000_000_000), "2150 GB/s"),
        (Work(flops=5_000), "2.5 kFLOP/s"),
        (Work(flops=800_000_000_000_000, bytes=1), "400 TFLOP/s"),
        (Work(tokens=1_500_000, flops=7), "750 k tokens/s"),
        (Work(), ""),
    ],
)
def test_units(work: Work, text: str) -> None:
    assert rate(row("a", {}, work, fastbert=2.0), OURS) == text


def test_durations() -> None:
    assert [duration(s) for s in (12.0, 0.0123, 4.5e-6)] == ["12 s", "12.3 ms", "4.5 us"]


def test_the_last_table_compares_with_the_best() -> None:
    rows = [*ROOF, row("op", {"n": 3, "dtype": "bfloat16"}, Work(bytes=300), fastbert=4.0, slow=9.0, best=6.0)]
    *_, line = terminal_table(run_of(rows)).splitlines()
    cells = [cell.strip() for cell in line.split("  ") if cell]
    assert cells == ["op 3 bfloat16", "4 s", "3.6 s - 4.4 s", "75 B/s", "75%", "1.50 x best"]


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = run_of(
        [*ROOF, Row("breakdown", {"model": "base"}, values={"gaps": 0.5}, unit="s"), Row("a", {}, failures={"b": "c"})]
    )
    run.write(tmp_path / "deep" / "run.json")
    assert Run.read(tmp_path / "deep" / "run.json") == run
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]
    assert run.find("roof", what="copy") == ROOF[:2]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": [{"bench": "a"}]}', '{"rows": []}'])
def test_no_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="holds no run"):
        Run.read(tmp_path / "run.json")


def test_a_case_that_is_measured_again_takes_its_former_place(tmp_path: Path) -> None:
    recorder = Recorder(Run.here("cpu"), tmp_path / "run.json")
    for seconds, case in ((1.0, "a"), (2.0, "b"), (3.0, "a")):
        recorder.add(row("op", {"case": case}, Work(), fastbert=seconds))
    rows = Run.read(tmp_path / "run.json").rows
    assert [(it.case["case"], it.timings[OURS].median) for it in rows] == [("a", 3.0), ("b", 2.0)]


def test_length_mixes() -> None:
    for mix, S, share in (("wikipedia", 512, 0.5), ("squad", 384, 0.41)):
        lengths = batch_of(mix, 256, S)
        assert lengths == batch_of(mix, 256, S)
        assert 0 < min(lengths) <= max(lengths) <= S
        assert sum(lengths) / (256 * S) == pytest.approx(share, abs=0.01)
        assert sum(tokens_of(mix, 65536)) == pytest.approx(65536, rel=0.02)
    assert max(batch_of("wikipedia", 64, 128)) == 128
    assert batch_of("full", 3, 7) == [7, 7, 7]
    assert tokens_of("128", 16384) == [128] * 128


def test_what_dropout_costs_attention_and_what_has_no_times() -> None:
    case = {"pass": "forward", "lengths": "512", "dtype": "bfloat16"}
    rows = [
        row("attention", {**case, "dropout": 0.0}, Work(), fastbert=2.0, rival=1.0),
        row("attention", {**case, "dropout": 0.1}, Work(), fastbert=2.3, rival=2.0),
        row("attention", {**case, "pass": "backward", "dropout": 0.1}, Work(), fastbert=9.0),
        Row("host", {"what": "graph"}, values={OURS: 127.0, "rival": 300.0}, unit="nodes"),
        Row("first_step", {"model": "base"}, values={"first": 12.0, "second": 0.25}, unit="s"),
        Row("memory", {"hidden": 768}, values={OURS: 127.0}),
    ]
    run = run_of(rows)
    assert beside(run, "attention") == ["attention forward 512 bfloat16 0.1: 1.15 x the time without dropout"]
    assert beside(run, "host") == ["host graph: fastbert 127 nodes, rival 300 nodes"]
    assert beside(run, "first_step") == ["first_step base: first 12 s, second 250 ms"]
    assert beside(run, "memory") == []


class TestCommit:
    @pytest.fixture
    def tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A checkout with one source, committed, and its commit's name in the file that goes along."""
        monkeypatch.delenv("COMMIT", raising=False)
        root = tmp_path / "tree"
        for folder in ("kernels", "bench/results"):
            (root / folder).mkdir(parents=True)
        (root / "kernels/a.py").write_text("a = 1\n")
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
        for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
            subprocess.run(["git", "-C", str(root), *command], check=True)
        assert commit.write(root) == commit.commit(root) == commit._described(root)
        return root

    def test_without_its_history_a_tree_has_it_from_the_file(self, tree: Path) -> None:
        known = commit.commit(tree)
        shutil.rmtree(tree / ".git")
        (tree / "bench/results/new.json").write_text("{}")  # a result is no source
        (tree / "kernels/a.so").write_bytes(b"built there")
        assert commit.commit(tree) == known != commit.UNKNOWN

    @pytest.mark.parametrize("change", [("kernels/a.py", "a = 2\n"), ("kernels/b.py", "")])
    def test_a_tree_that_was_changed_since_does_not_pass_for_it(self, tree: Path, change: tuple[str, str]) -> None:
        known = commit.commit(tree)
        shutil.rmtree(tree / ".git")
        (tree / change[0]).write_text(change[1])
        assert commit.commit(tree) == f"{known}-changed"

    def test_with_its_history_the_file_does_not_count(self, tree: Path) -> None:
        (tree / commit.FILE).write_text("other 0\n")
        assert commit.commit(tree) != "other"

    def test_nobody_knows(self, tree: Path) -> None:
        shutil.rmtree(tree / ".git")
        (tree / commit.FILE).write_text("nonsense")
        assert commit.commit(tree) == commit.UNKNOWN
        (tree / commit.FILE).unlink()
        assert commit.commit(tree) == commit.UNKNOWN
        with pytest.raises(ValueError, match="git knows no commit"):
            commit.write(tree)

    def test_a_folder_of_another_checkout_is_not_taken_for_it(self, tree: Path) -> None:
        inner = tree / "copy"
        inner.mkdir()
        assert commit.commit(inner) == commit.UNKNOWN

    def test_the_environment_comes_first(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COMMIT", "abc1234")
        assert commit.commit(tree) == Run.here("cpu").commit == "abc1234"
