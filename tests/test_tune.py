"""`make tune`: what is tried, what is timed, what is proposed, and that it survives what it tries."""

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from bench import answers, clock, tune
from bench.attempts import STOPPED
from bench.record import Recorder, Row, Run, Timing
from bench.tune import Candidate, Question
from fastbert.kernels import _launch, _norm, _product, layer_norm

pytestmark = pytest.mark.kernel
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="on a CPU no kernel is launched")
QUESTIONS = tune.questions("cpu", False)
SMALLEST = {question.case["what"]: question for question in tune.questions("cpu", True)}
NO_LIMIT = clock.Budget(None, time.monotonic)


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(Run.here("cpu"), tmp_path / "tune.json")


def ask(question: Question, recorder: Recorder, device: str = "cpu") -> Row:
    """The row, as it was written."""
    answers.ask(question, recorder, device=device, budget=NO_LIMIT)
    (row,) = Run.read(recorder.path).rows
    return row


def norm(**replacements: Any) -> Question:
    """About the cut of LayerNorm's rows, where another answer is wrong."""
    candidates = {"current": _norm.parts, **replacements}
    return replace(
        SMALLEST["layer_norm forward"],
        attribute="parts",
        candidates={name: Candidate(replacement, "") for name, replacement in candidates.items()},
    )


def raises(error: BaseException) -> Callable[..., Any]:
    def answer(*_: Any) -> Any:
        raise error

    return answer


def label(question: Question) -> str:
    return " ".join(map(str, question.case.values()))


@interpreted
@pytest.mark.parametrize("question", QUESTIONS, ids=label)
def test_the_current_candidate_is_what_the_launcher_takes(question: Question) -> None:
    original, current = getattr(question.module, question.attribute), question.candidates[question.current].replacement
    step = question.ready().step
    if question.case["what"] == "linear_int8":  # which has tiles where TILES has none
        assert not original
        with mock.patch.object(_launch, "launch", side_effect=_launch.launch) as launch:
            for entries, taken in ((original, current), *((c.replacement,) * 2 for c in question.candidates.values())):
                with mock.patch.object(_product, "TILES", entries):
                    step()
                (tiles,) = taken.values()
                meta = launch.call_args.kwargs
                assert [meta[f"BLOCK_{axis}"] for axis in "MNK"] == [tiles.M, tiles.N, tiles.K]
                assert (meta["num_warps"], meta["num_stages"]) == (tiles.num_warps, tiles.num_stages)
        return
    if question.attribute == "TILES":
        assert current == original
        with mock.patch.object(_product, "launch", side_effect=_product.launch) as launch:
            step()
            assert not launch.called
            for candidate in list(question.candidates.values())[1:]:
                with mock.patch.object(_product, "TILES", candidate.replacement):
                    step()
                (tiles,) = candidate.replacement.values()
                assert launch.call_args.args[-1] == tiles
        return
    if not callable(original):
        assert current == original
        with mock.patch.object(question.module, question.attribute, 0), pytest.raises(ZeroDivisionError):
            step()
        return
    with mock.patch.object(question.module, question.attribute, side_effect=original) as spy:
        step()
    assert spy.call_args_list
    for call in spy.call_args_list:
        assert current(*call.args) == original(*call.args)
        if question.attribute.endswith("programs_and_warps"):  # of which three rows need three
            assert current(65536, *call.args[1:]) == original(65536, *call.args[1:])


@pytest.mark.parametrize("question", QUESTIONS, ids=label)
def test_pasted_lines_say_what_was_tried(question: Question) -> None:
    run = Run.here("cpu")
    for name, candidate in list(question.candidates.items())[1:]:
        times = {question.current: Timing(2.0, 1.9, 2.1, 9, "clock"), name: Timing(1.0, 0.9, 1.1, 9, "clock")}
        run.rows = [Row("tune", question.case, question.work, times)]
        (pasted,) = re.findall(r"```python\n(.*?)```", answers.page([question], run), re.DOTALL)
        assert f"# {run.name}, {run.date}" in pasted
        assert "100.0%" in pasted
        take = candidate.replacement
        names: dict[str, Any] = {}
        if question.attribute == "CHUNK":
            exec(pasted, names)
            assert names["CHUNK"] == take
            continue
        names = {"_launch": _launch, "torch": torch, "Product": _product.Product, "Tiles": _product.Tiles}
        ((key, value),) = eval("{" + pasted + "}", names).items()
        if question.attribute == "TILES":
            assert {key: value} == take
            continue
        chip = _launch.Chip((9, 0), 132)
        if question.attribute == "blocks":
            assert value == take(key, question.case["head_dim"], torch.bfloat16, 512, chip)
        elif question.attribute == "rows_and_warps":
            assert (key, value) == (question.case["hidden"], take(key))
        else:
            assert (key, 132 * value[0], value[1]) == (question.case["hidden"], *take(65536, key, chip, 4))


def test_on_a_gpu_the_questions_are_about_what_models_do(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = _launch.Chip((9, 0), 132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "chip", lambda device: hopper)
    asked = tune.questions("cuda", False)
    assert [question.case for question in asked] == list({label(it): it.case for it in asked}.values())  # no two alike
    first = asked[0]
    assert (first.case["what"], first.case["tokens"], first.current) == ("attention fwd", 65536, "128x64 w8 s3 r128")
    assert {it.case["hidden"] for it in asked if "hidden" in it.case} == {768, 1024}
    for question in asked:
        assert len(question.candidates) > 1, question.case
    kinds = {question.case["what"] for question in asked}
    assert {question.case["what"] for question in tune.questions("cuda", True)} == kinds


def timing(low: float, median: float, high: float) -> Timing:
    return Timing(median, low, high, 9, "clock")


@pytest.mark.parametrize(
    ("others", "failed", "expected"),
    [
        ({"b": timing(7, 8, 8.9)}, [], "b"),
        ({"b": timing(7, 8, 9.1)}, [], None),  # within the spread
        ({"b": timing(11, 12, 13)}, [], None),  # slower
        ({"b": timing(1, 7, 10), "c": timing(8, 8.1, 8.2)}, [], "c"),  # b is faster, but not surely
        ({"b": timing(7, 8, 8.9), "c": timing(5, 6, 7)}, [], "c"),
        ({"b": timing(7, 8, 8.9), "c": timing(5, 6, 7)}, ["c"], "b"),  # c is wrong
        ({"b": timing(11, 12, 13)}, ["current"], "b"),
        ({}, [], None),
        ({}, ["current"], None),
    ],
)
def test_only_what_is_faster_beyond_the_spread_wins(
    others: dict[str, Timing], failed: list[str], expected: str | None
) -> None:
    row = Row("tune", {}, timings={"current": timing(9, 10, 11), **others}, failures=dict.fromkeys(failed, "why"))
    assert answers.winner(row, "current") == expected


@interpreted
def test_what_is_wrong_is_reported_and_not_timed(recorder: Recorder) -> None:
    row = ask(norm(half=lambda N: (N // 3 * 2, 0), right=lambda N: (64, 0)), recorder)
    assert set(row.timings) == {"current", "right"}
    assert set(row.failures) == {"half"}
    assert row.failures["half"].startswith("wrong: off by")


@interpreted
def test_the_current_candidate_when_wrong_is_not_timed_either(recorder: Recorder) -> None:
    question = norm(right=_norm.parts)
    question.candidates["current"] = Candidate(lambda N: (N // 3 * 2, 0), "")
    row = ask(question, recorder)
    assert set(row.timings) == {"right"}
    assert answers.winner(row, "current") == "right"
    assert "failed" in answers.page([question], recorder.run).splitlines()[-3]


@interpreted
def test_what_fails_is_reported_and_the_launchers_answer_is_back(recorder: Recorder) -> None:
    small = OutOfResources(300000, 232448, "shared memory")
    row = ask(norm(large=raises(small), broken=raises(ValueError("a story\nand more")), right=_norm.parts), recorder)
    assert row.failures == {
        "large": "does not fit: shared memory, 300000 of 232448",
        "broken": "ValueError: a story",
    }
    assert set(row.timings) == {"current", "right"}
    assert layer_norm.parts is _norm.parts


@interpreted
def test_a_candidate_that_ended_its_process_is_not_tried_again(recorder: Recorder) -> None:
    question = norm(deadly=raises(KeyboardInterrupt()), right=_norm.parts)
    with pytest.raises(KeyboardInterrupt):
        ask(question, recorder)
    assert layer_norm.parts is _norm.parts
    (row,) = Run.read(recorder.path).rows
    assert (set(row.timings), row.failures) == ({"current"}, {"deadly": STOPPED})
    row = ask(question, Recorder(Run.read(recorder.path), recorder.path))
    assert (set(row.timings), row.failures) == ({"current", "right"}, {"deadly": STOPPED})
    answered = replace(question, ready=raises(AssertionError("asked again")))
    assert ask(answered, Recorder(Run.read(recorder.path), recorder.path)) == row


@interpreted
def test_a_question_without_tensors_is_reported(recorder: Recorder) -> None:
    row = ask(replace(norm(), ready=raises(torch.OutOfMemoryError("too many"))), recorder)
    assert row.failures == {"current": "OutOfMemoryError: too many"}


@interpreted
def test_a_gpu_replays_graphs_in_turn_and_a_broken_one_ends_the_process(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, names = [], ["a", "b"]

    class Clock:
        def times(self, run: Callable[[], Any], seconds: float) -> list[float]:
            run()
            return [seconds]

    def captured(steps: list[Callable[[], Any]]) -> Callable[[], None]:
        steps[0]()
        name = names.pop(0)
        return lambda: log.append(name)

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(clock, "CudaClock", Clock)
    monkeypatch.setattr(clock, "captured", captured)
    monkeypatch.setattr(clock, "check", lambda: None)
    question = norm(right=lambda N: (64, 0))
    with mock.patch.object(answers, "_timed", wraps=answers._timed) as timed:
        row = ask(question, recorder, "cuda")
    assert [list(call.args[0]) for call in timed.call_args_list] == [["current"], ["right"], ["current", "right"]]
    assert row.timings["right"].how == "graph"
    assert log == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3

    monkeypatch.setattr(clock, "check", broken)
    other = replace(norm(bad=raises(RuntimeError("an illegal memory access"))), case={"dtype": "bfloat16"})
    del other.candidates["current"]
    with pytest.raises(RuntimeError, match="illegal memory access was encountered"):
        answers.ask(other, recorder, device="cuda", budget=NO_LIMIT)
    assert Run.read(recorder.path).rows[1].failures == {"bad": "RuntimeError: an illegal memory access"}


@interpreted
@pytest.mark.parametrize(
    ("lefts", "tried", "complete"),
    [
        ([9] * 9, [2, 2], True),
        ([9] * 8 + [0], [2, 2], False),
        ([9] * 6 + [0, 0], [2, 1], False),
        ([9] * 3 + [0, 0], [2], False),
        ([9] * 2 + [0, 0], [1], False),
        ([0], [], False),
    ],
)
def test_work_keeps_to_its_time(
    lefts: list[float], tried: list[int], complete: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [SMALLEST["layer_norm forward"], SMALLEST["embedding forward"]]
    monkeypatch.setattr(answers, "questions", lambda device, smallest: asked)
    monkeypatch.setattr(clock, "Budget", lambda *_: SimpleNamespace(left=lambda: lefts.pop(0)))
    figures = tmp_path / "tune.json"
    Run.here("cpu").write(figures)
    answers.work(device="cpu", figures=figures, until=0.0, smallest=True)
    run = Run.read(figures)
    assert not lefts
    assert run.complete == complete
    assert [row.case for row in run.rows] == [question.case for question in asked[: len(tried)]]
    assert [len(row.timings) for row in run.rows] == tried
    if complete:
        *_, first, second, _fence = (tmp_path / "tune.md").read_text().splitlines()
        assert first.split()[:8] == ["layer_norm", "forward", "48", "0.1", "bfloat16", "3", "8", "rows"]
        assert second.split()[:8] == ["embedding", "forward", "48", "0.1", "bfloat16", "3", "8", "rows"]


def run_main(tmp_path: Path, budget: float = 60, ahead_failed: bool = False) -> int:
    ahead = mock.MagicMock()
    ahead.__enter__.return_value = SimpleNamespace(said=lambda: "3 kernels compiled ahead", failed=ahead_failed)
    with mock.patch.object(answers, "Ahead", return_value=ahead):
        return answers.main(device="cpu", results=tmp_path / "new" / "folder", budget=budget, smallest=True)


def test_without_time_there_is_a_whole_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(tmp_path, budget=0) == 1
    run = Run.read(tmp_path / "new/folder/tune.json")
    assert (run.rows, run.complete) == ([], False)
    assert capsys.readouterr().out.splitlines()[-1].startswith("0 questions in ")


@pytest.mark.parametrize(
    ("failures", "ends", "expected", "calls"),
    [
        ([{}], [0], 0, 1),
        ([{"large": answers.NO_FIT}], [0], 0, 1),
        ([{"a": "wrong: off by 1"}], [0], 1, 1),
        ([{"a": STOPPED}, {"a": STOPPED, "b": answers.NO_FIT}], [None, 0], 1, 2),  # it hung: the next goes on
        ([{"a": STOPPED}, {"a": STOPPED}], [-11, -11], 1, 2),  # it dies again, at nothing new
    ],
)
def test_processes_follow_each_other_as_long_as_they_find_something(
    failures: list[dict[str, str]],
    ends: list[int | None],
    expected: int,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[int | None] = []

    def _work(device: str, figures: Path, seconds: float, smallest: bool) -> int | None:
        run = Run.read(figures)
        run.rows = [Row("tune", {"what": "x"}, timings={"current": timing(1, 2, 3)}, failures=failures[len(done)])]
        run.write(figures)
        (figures.with_name("tune.md")).write_text("the table\n")
        done.append(ends[len(done)])
        return done[-1]

    monkeypatch.setattr(answers, "_work", _work)
    assert run_main(tmp_path) == expected
    assert len(done) == calls
    assert capsys.readouterr().out.splitlines()[-4:-1] == ["the table", "", "3 kernels compiled ahead"]


def test_a_rehearsal_in_which_nothing_can_be_compiled_ahead_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _work(device: str, figures: Path, seconds: float, smallest: bool) -> int:
        run = Run.read(figures)
        run.rows = [Row("tune", {"what": "x"}, timings={"current": timing(1, 2, 3)})]
        run.write(figures)
        return 0

    monkeypatch.setattr(answers, "_work", _work)
    assert run_main(tmp_path) == 0
    assert run_main(tmp_path, ahead_failed=True) == 1


Started = list[tuple[subprocess.Popen[bytes], dict[str, str]]]


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """The processes that are started, with their environments, to go on with an empty run."""
    Run.here("cpu").write(tmp_path / "tune.json")
    processes: Started = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes.append((popen(*arguments, **options), options["env"]))
        return processes[-1][0]

    monkeypatch.setattr(subprocess, "Popen", start)
    return processes


def test_a_process_without_news_is_stopped(started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "STUCK_SECONDS", 0.3)
    assert answers._work("cuda", tmp_path / "tune.json", 60.0, True) is None
    ((process, environment),) = started
    assert process.returncode == -9
    assert "TRITON_INTERPRET" not in environment


def test_a_process_ends_by_itself_before_it_is_stopped(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "STOP_SECONDS", 100.0)
    assert answers._work("cpu", tmp_path / "tune.json", 99.0, True) == 0
    assert started[0][1]["TRITON_INTERPRET"] == "1"
