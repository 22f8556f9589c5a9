"""`make gpu`: the order of its stages, their shares of the time, and that it goes on whatever becomes of a process."""

from pathlib import Path
from typing import Any

import pytest

from bench import gpu
from bench.attempts import CANNOT_GO_ON, STOPPED, TIME_OVER
from bench.gpu import STAGES, Stage
from bench.record import BEGUN, LOST, Run
from tests.fake_lease import Call, World, forever, make_world, name_of, row, run_of

ROOT = Path(__file__).parents[1]
MAIN = [stage for stage in STAGES if stage.part == "goals"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return make_world(monkeypatch, tmp_path)


def test_the_order_is_that_of_importance(world: World, tmp_path: Path) -> None:
    status, run = run_of(tmp_path)
    assert (status, run.complete) == (0, True)
    goals = ["roof", "model", "attention", "inference", "layer_norm", "ffn", "cross_entropy", "breakdown", "host"]
    goals.append("first_step")
    assert world.names()[: len(goals) + 2] == ["tests", *goals, "tests"]
    assert world.names()[-1] == "tests"
    parts = [arguments[arguments.index("--part") + 1] for _, arguments in world.calls if "--part" in arguments]
    assert parts == ["goals"] * 10 + ["all"] * 9 + ["rest"] * 7
    first, second, last = (arguments for _, arguments in world.calls if name_of(arguments) == "tests")
    assert first[0] == "tests/test_gpu.py"
    assert "tests/test_linear.py" not in (*first, *second)
    assert "tests/test_linear.py" in last
    assert [it["stage"] for it in run.stages][:3] == ["tests", "roof", "model"]


def test_every_test_file_belongs_to_one_stage() -> None:
    files = [file for stage in STAGES if stage.part == "tests" for file in gpu._test_files(stage.tests)]
    assert sorted(files) == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py"))


def test_every_bench_is_in_a_stage() -> None:
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert {stage.name for stage in STAGES if stage.part != "tests"} == benches
    with_goals = {name for name in benches if "GOALS = " in (ROOT / f"bench/bench_{name}.py").read_text()}
    assert {stage.name for stage in MAIN} == with_goals


def test_no_stage_takes_the_time_of_a_later_one(world: World, tmp_path: Path) -> None:
    for name in ("tests", *(stage.name for stage in MAIN)):
        world.does[name] = forever
    world.news = True
    status, run = run_of(tmp_path)
    assert status == 0
    assert not run.complete
    ends = [it["to"] for it in run.stages[: 1 + len(MAIN)]]
    assert ends == pytest.approx([stage.until for stage in STAGES[: 1 + len(MAIN)]], abs=0.3)
    assert ends[0] <= 120.5
    assert {it["ended"] for it in run.stages[: 1 + len(MAIN)]} == {"the time was over"}
    assert world.now <= 545.0


def test_time_that_is_left_is_the_next_ones(world: World, tmp_path: Path) -> None:
    budgets = {}

    def keep(call: Call) -> tuple[float, int]:
        budgets[name_of(call.arguments)] = call.budget
        return 10.0, 0

    world.does = dict.fromkeys(("roof", "model", "attention"), keep)
    world.does["tests"] = lambda call: (70.0, 0)
    run_of(tmp_path, *STAGES[:4])
    assert budgets == {
        "roof": pytest.approx(165 - 70 - gpu.STOP_SECONDS, abs=1),
        "model": pytest.approx(335 - 80 - gpu.STOP_SECONDS, abs=1),
        "attention": pytest.approx(390 - 90 - gpu.STOP_SECONDS, abs=1),
    }


def test_with_another_budget_all_ends_change_alike(world: World, tmp_path: Path) -> None:
    world.does = {"tests": forever, "roof": forever}
    world.news = True
    _, run = run_of(tmp_path, *STAGES[:2], budget=275.0)
    assert [it["to"] for it in run.stages] == pytest.approx([60.0, 82.5], abs=0.3)


def test_after_the_end_nothing_is_begun(world: World, tmp_path: Path) -> None:
    world.does["roof"] = forever
    world.news = True
    status, run = run_of(tmp_path, Stage("roof", 540), Stage("model", 540), Stage("last", 540, "tests", ("linear",)))
    assert world.names() == ["roof"]
    assert [it["said"] for it in run.stages[1:]] == ["not begun"] * 2
    assert (status, run.complete) == (0, False)


def test_a_process_without_news_is_stopped_and_the_next_goes_on(world: World, tmp_path: Path) -> None:
    def hangs(call: Call) -> tuple[float, int]:
        if call.times == 1:
            call.write(lambda run: run.rows.append(row("rival", STOPPED)))
            return forever(call)
        return 1.0, 0

    world.does["roof"] = hangs
    _, run = run_of(tmp_path, Stage("roof", 540), Stage("model", 540))
    assert world.names() == ["roof", "roof", "model"]
    assert world.called("roof")[1] == pytest.approx(gpu.SILENCE["goals"], abs=1)
    assert run.rows[0].failures == {"rival": STOPPED}  # it was not its time that was over
    assert [it["ended"] for it in run.stages] == ["done", "done"]
    assert "1 processes ended before their time" in run.stages[0]["said"]


@pytest.mark.parametrize("status", [CANNOT_GO_ON, -11, 139])
def test_a_process_that_dies_is_followed_by_one_that_does_not_try_the_same(
    status: int, world: World, tmp_path: Path
) -> None:
    def dies(call: Call) -> tuple[float, int]:
        def change(run: Run) -> None:
            run.uncaptured[f"roof: {call.times}"] = "RuntimeError: no"
            run.nodes["bench_roof.py::test_roof[a]"] = BEGUN

        call.write(change)
        return 1.0, status if call.times < 3 else 0

    world.does["roof"] = dies
    _, run = run_of(tmp_path, Stage("roof", 540))
    assert world.names() == ["roof"] * 3
    assert not run.nodes  # none was lost


def test_what_a_process_died_of_before_a_provider_was_tried_is_lost(world: World, tmp_path: Path, capsys: Any) -> None:
    def dies(call: Call) -> tuple[float, int]:
        node = f"bench_roof.py::test_roof[{call.times}]"
        call.write(lambda run: run.nodes.update({node: BEGUN}))
        return 1.0, -6 if call.times < 3 else 0

    world.does["roof"] = dies
    status, run = run_of(tmp_path, Stage("roof", 540))
    assert run.nodes == {"bench_roof.py::test_roof[1]": LOST, "bench_roof.py::test_roof[2]": LOST}
    assert status == 1
    assert "bench_roof.py::test_roof[2]: its process ended" in capsys.readouterr().out


def test_a_process_that_dies_at_nothing_is_not_followed(world: World, tmp_path: Path) -> None:
    world.does["roof"] = lambda call: (1.0, -9)
    world.does["ffn"] = lambda call: (1.0, 2)  # pytest's own: it could not collect
    status, run = run_of(tmp_path, Stage("roof", 540), Stage("ffn", 540), Stage("model", 540))
    assert world.names() == ["roof", "ffn", "model"]
    assert [it["ended"] for it in run.stages] == ["broken", "broken", "done"]
    assert "see bench.txt" in run.stages[0]["said"]
    assert (status, run.complete) == (1, False)


def test_what_a_process_was_at_as_its_time_was_over_is_not_to_blame(world: World, tmp_path: Path) -> None:
    def slow(call: Call) -> tuple[float, int]:
        def change(run: Run) -> None:
            run.rows += [row("slow", STOPPED), row("dead", STOPPED, "old")]
            run.rows[1].case = {"case": 2}
            run.uncaptured |= {"roof: slow": STOPPED, "roof: refused": "RuntimeError: no"}
            run.nodes["bench_roof.py::test_roof[slow]"] = BEGUN

        call.write(change)
        return forever(call)

    world.does["roof"] = slow
    world.news = True
    _, run = run_of(tmp_path, Stage("roof", 60))
    assert run.rows[0].failures == {"slow": TIME_OVER}
    assert run.uncaptured == {"roof: refused": "RuntimeError: no"}
    assert not run.nodes
