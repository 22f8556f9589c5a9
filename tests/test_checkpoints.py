"""Checkpoints are there whole or not at all: kills, full disks, rotation."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("accelerate")
pytest.importorskip("sentencex")
pytest.importorskip("tensorboard")
pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

import fastbert
from fastbert.data.store import HELD_OUT, Store
from fastbert.errors import InputError
from fastbert.training import checkpoints
from fastbert.training.evaluation import Evaluation
from fastbert.training.plot import read_log
from fastbert.training.pretraining_trainer import PretrainingTrainer
from tests.runs import (
    MOMENTS,
    assert_same_weights,
    full_disk_while_saving,
    hold_out,
    make_corpus,
    run,
    run_in_two_processes,
    run_killed,
    weights,
)
from tests.stores import full_disk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("checkpoints") / "corpus")


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    run(corpus, output)
    return output


def _folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_text(content)
    return path


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"tensorboard", "log.jsonl", "run.json"}


class TestFolder:
    def test_the_last_one_has_the_most_steps(self, tmp_path: Path) -> None:
        assert checkpoints.last_checkpoint(tmp_path) is None
        assert checkpoints.last_checkpoint(tmp_path / "none") is None
        for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-11.tmp", ".writing/checkpoint-12"):
            _folder(tmp_path / name)
        (tmp_path / "checkpoint-13").write_text("a file")
        assert checkpoints.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"

    def test_drafts_are_removed(self, tmp_path: Path) -> None:
        _folder(tmp_path / ".writing/checkpoint-2/part", a="half")
        _folder(tmp_path / "checkpoint-1", a="whole")
        checkpoints.remove_drafts(tmp_path)
        checkpoints.remove_drafts(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]

    def test_all_of_it_is_on_the_disk_before_it_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draft, target = _folder(tmp_path / ".writing/new", a="1", b="2"), tmp_path / "checkpoint-1"
        _folder(draft / "part", c="3")
        events: list[object] = []
        fsync, rename = os.fsync, os.rename

        def recorded_fsync(descriptor: int) -> None:
            events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def recorded_rename(source: Any, name: Any) -> None:
            events.append((source, name))
            rename(source, name)

        monkeypatch.setattr(os, "fsync", recorded_fsync)
        monkeypatch.setattr(os, "rename", recorded_rename)
        checkpoints.publish(draft, target)
        named = events.index((draft, target))
        assert {str(draft / name) for name in ("", "a", "b", "part", "part/c")} <= {f"{e}" for e in events[:named]} | {
            f"{e}/" for e in events[:named]
        }
        assert str(tmp_path) in events[named + 1 :], "the name itself"
        assert {path.name for path in target.rglob("*")} == {"a", "b", "part", "c"}
        assert not draft.exists()

    def test_rotation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """One that is being removed is none any more."""
        for step in (2, 9, 10, 100):
            _folder(tmp_path / f"checkpoint-{step}", a="whole")
        rmtree = shutil.rmtree

        def recorded(folder: Path, *args: Any, **kwargs: Any) -> None:
            assert Path(folder).parent.name == checkpoints.DRAFTS
            rmtree(folder, *args, **kwargs)

        monkeypatch.setattr(shutil, "rmtree", recorded)
        checkpoints.rotate(tmp_path, 2)
        assert _names(tmp_path) - {checkpoints.DRAFTS} == {"checkpoint-10", "checkpoint-100"}
        checkpoints.rotate(tmp_path, 3)
        assert _names(tmp_path) - {checkpoints.DRAFTS} == {"checkpoint-10", "checkpoint-100"}


def test_a_run_leaves_its_last_checkpoint_and_its_model(undisturbed: Path) -> None:
    assert _names(undisturbed) == {"checkpoint-12", "model"}


class TestKilled:
    """kill -9 while a checkpoint is written."""

    @pytest.mark.parametrize(
        ("moment", "step"), [*((moment, 8) for moment in MOMENTS), ("the optimiser is half written", 4)]
    )
    def test_the_last_one_is_whole_and_the_run_goes_on(
        self, corpus: Path, undisturbed: Path, tmp_path: Path, moment: str, step: int
    ) -> None:
        output = tmp_path / "run"
        assert run_killed(moment, step, corpus, output) == -9
        named = moment in ("it has its name", "the one before is half removed")
        last = checkpoints.last_checkpoint(output)
        assert (last.name if last else "checkpoint-0") == f"checkpoint-{step if named else step - 4}"
        if last is not None:
            _, about = transformers.BertForPreTraining.from_pretrained(last, output_loading_info=True)
            assert not about["missing_keys"]
            assert not about["unexpected_keys"]
        run(corpus, output)
        assert _names(output) == {"checkpoint-12", "model"}
        assert_same_weights(output, undisturbed)


def test_fsdp2_equals_one_process_and_goes_on_after_a_kill(corpus: Path, tmp_path: Path) -> None:
    """Two processes, of which each has half of the batch and half of the weights; evaluation on held-out text, too."""
    one, two, corpus = tmp_path / "one", tmp_path / "two", hold_out(corpus)
    options = {"dropout": 0.0, "eval_every": 3}
    run(corpus, one, **options)
    statuses, said = run_in_two_processes(corpus, two, killed_at=6, fsdp=True, **options)
    assert statuses == [-9, 1], said[-3000:]
    assert _names(two) - {checkpoints.DRAFTS} == {"best", "checkpoint-4"}
    statuses, said = run_in_two_processes(corpus, two, fsdp=True, **options)
    assert statuses == [0, 0], said[-3000:]
    evaluations = [[r["eval_mlm_loss"] for r in read_log(output) if "eval_mlm_loss" in r] for output in (one, two)]
    assert len(evaluations[0]) == 5
    assert evaluations[0][0] == pytest.approx(evaluations[1][0], rel=1e-7)  # the same weights; one's layers run at once
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)
    best = json.loads((two / "best/evaluation.json").read_text())
    assert best["eval_mlm_loss"] == min(evaluations[1])
    assert Evaluation(Store.open(corpus / HELD_OUT), "mlm+nsp", 32, 1024)(
        fastbert.BertForPreTraining.from_pretrained(two / "best")
    )["eval_mlm_loss"] == pytest.approx(best["eval_mlm_loss"], rel=1e-6)
    actual, expected = weights(two), weights(one)
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=0.0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    stock, about = transformers.BertForPreTraining.from_pretrained(two / "model", output_loading_info=True)
    assert not about["missing_keys"]
    assert stock.cls.predictions.decoder.weight is stock.bert.embeddings.word_embeddings.weight


class TestFullDisk:
    # What does not fit: any file, the weights (170 kB), the optimiser's state (368 kB).
    @pytest.mark.parametrize("bytes_left", [16, 100_000, 250_000])
    def test_the_one_before_stays(self, corpus: Path, undisturbed: Path, tmp_path: Path, bytes_left: int) -> None:
        output = tmp_path / "run"
        with (
            full_disk_while_saving(bytes_left, 8),
            pytest.raises(InputError, match=r"cannot write checkpoint-8 \(.+\); .*checkpoint-4 is whole") as caught,
        ):
            run(corpus, output)
        assert "\n" not in str(caught.value)
        assert _names(output) == {"checkpoint-4"}
        run(corpus, output)
        assert _names(output) == {"checkpoint-12", "model"}
        assert_same_weights(output, undisturbed)

    def test_there_is_none_before(self, corpus: Path, tmp_path: Path) -> None:
        with (
            full_disk_while_saving(100_000, 4),
            pytest.raises(InputError, match=r"cannot write checkpoint-4 \(.+\); there is none before it"),
        ):
            run(corpus, tmp_path / "run")
        assert _names(tmp_path / "run") == set()

    def test_while_flushing(
        self, corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Some disks say so only then."""
        flush = checkpoints.flush

        def full(path: Path) -> None:
            if path.name == "model.safetensors" and path.parent.name == "checkpoint-8":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(path)

        monkeypatch.setattr(checkpoints, "flush", full)
        with pytest.raises(InputError, match=r"cannot write checkpoint-8 \(.*No space left on device\)"):
            run(corpus, tmp_path / "run")
        assert _names(tmp_path / "run") == {"checkpoint-4"}
        monkeypatch.undo()
        run(corpus, tmp_path / "run")
        assert_same_weights(tmp_path / "run", undisturbed)

    @pytest.mark.parametrize(
        ("rank", "bytes_left", "fsdp"),
        [(0, 100_000, False), (1, 5_000, False), (0, 100_000, True), (0, 255_000, True)],
        ids=["weights", "random numbers", "sharded weights", "sharded optimiser"],
    )
    def test_of_one_process(self, corpus: Path, tmp_path: Path, rank: int, bytes_left: int, fsdp: bool) -> None:
        """All stop, none waits for the others."""
        output, full = tmp_path / "run", (8, rank, bytes_left)
        statuses, said = run_in_two_processes(corpus, output, full=full, fsdp=fsdp)
        assert statuses == [1, 1], said[-3000:]
        assert said.count("InputError: cannot write checkpoint-8 (") == 2
        assert _names(output) == {"checkpoint-4"}

    def test_for_the_model(
        self, corpus: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_final = PretrainingTrainer.save_final

        def full(self: PretrainingTrainer, target: Path) -> None:
            with full_disk(100_000):
                save_final(self, target)

        monkeypatch.setattr(PretrainingTrainer, "save_final", full)
        with pytest.raises(InputError, match=r"cannot write the model \(.+\); .*checkpoint-12 is whole"):
            run(corpus, tmp_path / "run")
        assert _names(tmp_path / "run") == {"checkpoint-12"}
        monkeypatch.undo()
        run(corpus, tmp_path / "run")
        assert_same_weights(tmp_path / "run", undisturbed)
