"""Pretraining through losses and gradients that are not finite, and through steps with nothing to predict."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("sentencex")
pytest.importorskip("tensorboard")
pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import cli
from fastbert.data.pretraining import Sampling
from fastbert.data.store import Store
from fastbert.errors import CommonError, InputError
from fastbert.training.checkpoints import DRAFTS
from fastbert.training.plot import plot, read_log
from fastbert.training.pretraining_trainer import PretrainingTrainer
from fastbert.training.recipe import load_config
from tests.optional import needs
from tests.runs import (
    BREAKS,
    CONFIG,
    assert_same_weights,
    make_corpus,
    not_finite,
    run,
    run_in_two_processes,
    weights,
)
from tests.stores import make_store, write_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("finite") / "corpus")


def _saved(output: Path) -> set[str]:
    assert not list((output / DRAFTS).glob("*"))
    return {path.name for path in output.iterdir()} - {"tensorboard", "log.jsonl", "run.json", DRAFTS}


def _log(output: Path) -> list[dict[str, Any]]:
    """Every line is JSON, in which there is no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in the log")

    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


class TestStop:
    @pytest.mark.parametrize("what", BREAKS)
    def test_after_the_last_good_checkpoint(self, corpus: Path, tmp_path: Path, what: str) -> None:
        output = tmp_path / "run"
        bad = {
            "the loss": r"loss is nan, .* norm \d",
            "the gradient": r"loss is \d.* norm (inf|nan)",
            "both": "loss is inf",
        }
        last = output / "checkpoint-4"
        said = rf"step 6 is not finite: its {bad[what]}.* {last} was saved before, and nothing after"
        for _ in range(2):  # and again when it has gone on
            with not_finite(what, 6), pytest.raises(InputError, match=said) as caught:
                run(corpus, output)
            assert "\n" not in str(caught.value)
            assert "--non-finite-loss continue leaves such steps out" in str(caught.value)
            assert f"begin another run, with --init-from {last} and a lower" in str(caught.value)
            assert _saved(output) == {"checkpoint-4"}
            assert [record["step"] for record in _log(output)] == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize(("step", "last"), [(1, None), (4, None), (5, 4), (8, 4), (9, 8), (12, 8)])
    def test_before_the_next_checkpoint_where_nothing_is_logged(
        self, corpus: Path, tmp_path: Path, step: int, last: int | None
    ) -> None:
        """It names the first of several."""
        kept = "Nothing was saved before" if last is None else f"checkpoint-{last} was saved before"
        said = rf"^step {step} is not finite: its loss is inf.*{kept}"
        with (
            not_finite("both", step),
            not_finite("the loss", step + 1),
            pytest.raises(InputError, match=said),
        ):
            run(corpus, tmp_path / "run", log_every=100)
        assert _saved(tmp_path / "run") == (set() if last is None else {f"checkpoint-{last}"})

    @pytest.mark.parametrize("part", [0, 1])
    @pytest.mark.parametrize("what", BREAKS)
    def test_in_any_accumulated_batch(self, corpus: Path, tmp_path: Path, what: str, part: int) -> None:
        with not_finite(what, 3, part=part), pytest.raises(InputError, match="step 3 is not finite"):
            run(corpus, tmp_path / "run", accumulation=2)
        assert _saved(tmp_path / "run") == set()

    @pytest.mark.parametrize("fsdp", [False, True])
    @pytest.mark.parametrize("what", ["the loss", "both"])
    def test_all_processes(self, corpus: Path, tmp_path: Path, what: str, fsdp: bool) -> None:
        """None waits for the others, and they say the same, though it is the loss of one only."""
        output = tmp_path / "run"
        options: dict[str, Any] = {"fsdp": fsdp, "log_every": 3, "accumulation": 2}
        statuses, said = run_in_two_processes(corpus, output, broken=(what, 5, 1), **options)
        assert statuses == [1, 1], said[-3000:]
        errors = [line for line in said.splitlines() if "CommonError: step 5 is not finite: its loss is " in line]
        assert len(errors) == 2
        assert errors[0] == errors[1]
        assert _saved(output) == {"checkpoint-4"}

    def test_weights_that_are_not_finite_after_the_last_update(self, corpus: Path, tmp_path: Path) -> None:
        """No loss shows them."""
        with pytest.raises(InputError, match=r"the weights after step 1 are not finite\. Nothing was saved before"):
            run(corpus, tmp_path / "run", steps=1, warmup=0, learning_rate=1e39, phases=((32, 1.0),))
        assert _saved(tmp_path / "run") == set()

    def test_a_weight_that_no_loss_depends_on(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last position, of which there is no token. Neither a checkpoint nor the model."""
        for method, left in (("_save_checkpoint", set()), ("save_final", {"checkpoint-12"})):
            stock = getattr(PretrainingTrainer, method)

            def broken(self: Any, *args: Any, stock: Any = stock) -> Any:
                with torch.no_grad():
                    self._plain.bert.embeddings.position_embeddings.weight[63] = torch.nan
                return stock(self, *args)

            with monkeypatch.context() as patch:
                patch.setattr(PretrainingTrainer, method, broken)
                with pytest.raises(InputError, match=r"the weights after step \d+ are not finite"):
                    run(corpus, tmp_path / method, phases=((32, 1.0),))
            assert _saved(tmp_path / method) == left

    def test_weights_to_begin_with(self, corpus: Path, tmp_path: Path) -> None:
        config = load_config(str(corpus.parent / "config.json"), Store.open(corpus))
        model = transformers.BertForPreTraining(config)
        with torch.no_grad():
            model.bert.embeddings.position_embeddings.weight[63, 0] = torch.nan
        model.save_pretrained(tmp_path / "theirs")
        with pytest.raises(InputError, match=r"theirs has weights that are not finite: bert\.embeddings\.position"):
            run(corpus, tmp_path / "run", config=None, init_from=str(tmp_path / "theirs"))
        assert not (tmp_path / "run").exists()


class TestContinue:
    def test_the_step_changes_nothing(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Weights bit for bit, with dropout, as if the optimiser had not been called; the schedule goes on."""
        look = torch.optim.AdamW.step
        calls = 0

        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return None if calls in (1, 6) else look(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", step)
            run(corpus, tmp_path / "expected", warmup=0)
        capfd.readouterr()
        for what in BREAKS:
            output = tmp_path / what
            with not_finite(what, 1), not_finite(what, 6):
                run(corpus, output, warmup=0, non_finite_loss="continue")
            assert_same_weights(output, tmp_path / "expected")
            assert "fastbert: steps left out, for their loss or gradient was not finite: 2\n" in capfd.readouterr().err
            assert _saved(output) == {"checkpoint-12", "model"}
            for actual, expected in zip(_log(output), _log(tmp_path / "expected"), strict=True):
                assert actual["learning_rate"] == expected["learning_rate"]
                if actual["step"] in (1, 6):
                    assert actual["left_out"] == 1
                    assert actual["loss"] is None
                    assert "mlm_loss" not in actual
                    assert ("grad_norm" in actual) == (what == "the loss")
                else:
                    assert "left_out" not in actual
                    for key in ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "grad_norm"):
                        assert actual[key] == expected[key]

    @needs("matplotlib")
    def test_curves_have_a_gap_there(self, tmp_path: Path) -> None:
        records = [{"step": 1, "mlm_loss": 6.0}, {"step": 2, "loss": None, "left_out": 1}, {"step": 3, "mlm_loss": 5.0}]
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        plot([tmp_path], tmp_path / "curves.png")
        assert (tmp_path / "curves.png").stat().st_size > 1000

    def test_the_log_is_of_the_other_steps(
        self, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        options: dict[str, Any] = {"non_finite_loss": "continue", "learning_rate": 1e-12}
        with not_finite("both", 6), not_finite("both", 8):
            run(corpus, tmp_path / "each", **options)
            run(corpus, tmp_path / "some", log_every=4, **options)
        assert "step 8: loss" in capfd.readouterr().err
        each, some = read_log(tmp_path / "each"), read_log(tmp_path / "some")
        assert [record.get("left_out") for record in some] == [None, 2, None]
        for record in some:
            window = [r for r in each if record["step"] - 4 < r["step"] <= record["step"] and r["loss"] is not None]
            for key in ("loss", "mlm_loss", "nsp_loss", "nsp_accuracy"):
                assert record[key] == pytest.approx(sum(r[key] for r in window) / len(window), rel=1e-5)

    def test_it_goes_on_in_the_folder_of_a_run_that_stopped(self, corpus: Path, tmp_path: Path) -> None:
        with not_finite("both", 6):
            run(corpus, tmp_path / "whole", non_finite_loss="continue")
            with pytest.raises(InputError, match="step 6 is not finite"):
                run(corpus, tmp_path / "run")
            run(corpus, tmp_path / "run", non_finite_loss="continue")
        assert_same_weights(tmp_path / "run", tmp_path / "whole")

    @pytest.mark.parametrize("fsdp", [False, True])
    def test_all_processes(self, corpus: Path, tmp_path: Path, fsdp: bool) -> None:
        """Of two the second leaves a step out, and so do both: what comes out is what one process makes."""
        options: dict[str, Any] = {"non_finite_loss": "continue", "dropout": 0.0}
        with not_finite("the loss", 6):
            run(corpus, tmp_path / "one", **options)
        statuses, said = run_in_two_processes(corpus, tmp_path / "two", broken=("the loss", 6, 1), fsdp=fsdp, **options)
        assert statuses == [0, 0], said[-3000:]
        assert said.count("was not finite: 1\n") == 1
        actual, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
        for name, t in expected.items():
            torch.testing.assert_close(actual[name], t, rtol=0.0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
        assert [record.get("left_out") for record in _log(tmp_path / "two")] == [None] * 5 + [1] + [None] * 6


class _WaitsForNothing(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
        assert func._overloadpacket.__name__ not in waits, func
        return func(*args, **(kwargs or {}))


def test_looking_at_a_step_waits_for_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers are read where a line is logged and where something is saved, and nowhere else."""
    stock, looked = PretrainingTrainer._get_grad_norm, 0

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal looked
        looked += 1
        with _WaitsForNothing():
            return stock(self, *args, **kwargs)

    monkeypatch.setattr(PretrainingTrainer, "_get_grad_norm", watched)
    with not_finite("both", 6):
        run(corpus, tmp_path / "run", non_finite_loss="continue")
    assert looked == 12


class TestCommand:
    def test_it_is_one_line(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        command = ["fastbert", "pretrain", "--config", str(corpus.parent / "config.json"), "--data", str(corpus)]
        command += ["--output", str(tmp_path / "run"), "--steps", "6", "--phases", "32:1", "--batch-size", "4"]
        command += ["--save-every", "2", "--device", "cpu", "--threads", "1"]
        for more, status, saved in (
            ([], 1, {"checkpoint-2"}),
            (["--non-finite-loss", "stop"], 1, {"checkpoint-2"}),
            (["--non-finite-loss", "continue"], 0, {"checkpoint-2", "checkpoint-4", "checkpoint-6", "model"}),
        ):
            monkeypatch.setattr(sys, "argv", [*command, *more])
            with not_finite("both", 3), pytest.raises(SystemExit) as exit_:
                cli.main()
            assert (exit_.value.code or 0) == status
            lines = capfd.readouterr().err.splitlines()
            begun = ("fastbert: pretraining in ", "fastbert: resumed at ", "  ")
            ended = [line for line in lines if not line.startswith(begun)]
            assert not any("Traceback" in line for line in lines)
            if status:
                (line,) = ended
                assert line.startswith("fastbert: step 3 is not finite: its loss is inf")
            assert _saved(tmp_path / "run") == saved

    @pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
    def test_one_process_says_it_for_all(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], rank: str | None, lines: int
    ) -> None:
        def fails() -> None:
            raise CommonError("all the same")

        monkeypatch.setattr(cli, "app", fails)
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 1
        assert capfd.readouterr().err == "fastbert: all the same\n" * lines


class TestNothingToPredict:
    """Texts of words that the vocabulary does not have: [UNK] is never masked."""

    def _corpus(self, folder: Path, known: float) -> Path:
        generator = random.Random(0)
        words = ["fox" if i < known * 200 else "\N{SNOWMAN}" for i in range(200)]
        generator.shuffle(words)
        folder.mkdir()
        (folder / "a.txt").write_text("\n\n".join("\n".join([f"{word} {word} {word}."] * 4) for word in words))
        (folder / "config.json").write_text(json.dumps(CONFIG))
        vocabulary = write_vocabulary(folder / "vocab.txt", ["fox", "lion"])
        make_store([folder / "a.txt"], folder / "corpus", vocabulary)
        return folder / "corpus"

    def test_next_sentences_alone(self, tmp_path: Path) -> None:
        corpus = self._corpus(tmp_path / "texts", 0.0)
        run(corpus, tmp_path / "run", accumulation=2)
        for record in _log(tmp_path / "run"):
            assert record["mlm_loss"] == 0
            assert record["loss"] == record["nsp_loss"] > 0
            assert record["grad_norm"] > 0
        run(corpus, tmp_path / "stop", steps=1, warmup=0, phases=((32, 1.0),), learning_rate=1e-12)
        before, after = weights(tmp_path / "stop"), weights(tmp_path / "run")
        moved = {name for name in before if (before[name] - after[name]).abs().max() > 1e-4}
        assert {"cls.seq_relationship.weight", "bert.pooler.dense.weight"} <= moved
        assert "cls.predictions.bias" not in moved

    @pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
    def test_in_some_batches(self, tmp_path: Path, objective: str) -> None:
        """However a step is divided, though parts of it have no label, and some steps have none."""
        corpus = self._corpus(tmp_path / "texts", 0.2)
        options: dict[str, Any] = {"dropout": 0.0, "sampling": Sampling(objective=objective, batch_size=4)}
        run(corpus, tmp_path / "one", **options)
        run(corpus, tmp_path / "four", accumulation=4, **options)
        one, four = _log(tmp_path / "one"), _log(tmp_path / "four")
        without = [record["step"] for record in one if record["mlm_loss"] == 0]
        assert 0 < len(without) < 12
        assert without == [record["step"] for record in four if record["mlm_loss"] == 0]
        for a, b in zip(one, four, strict=True):
            for key in ("loss", "mlm_loss", "grad_norm"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7)
        actual, expected = weights(tmp_path / "four"), weights(tmp_path / "one")
        for name, t in expected.items():
            torch.testing.assert_close(actual[name], t, rtol=0.0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    def test_of_one_process(self, tmp_path: Path) -> None:
        corpus = self._corpus(tmp_path / "texts", 0.2)
        options: dict[str, Any] = {"dropout": 0.0, "sampling": Sampling(batch_size=4)}
        run(corpus, tmp_path / "one", **options)
        statuses, said = run_in_two_processes(corpus, tmp_path / "two", **options)
        assert statuses == [0, 0], said[-3000:]
        actual, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
        for name, t in expected.items():
            torch.testing.assert_close(actual[name], t, rtol=0.0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
