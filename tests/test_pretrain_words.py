"""What a pretraining run says, what it chooses where it goes on from a checkpoint, and what it writes for others."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import integration_utils

pytest.importorskip("accelerate")
pytest.importorskip("sentencex")
pytest.importorskip("tensorboard")
pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

from fastbert import cli
from fastbert.data.pretraining import Phase, PretrainingBatches, Sampling
from fastbert.data.store import Store
from fastbert.errors import InputError
from fastbert.training import checkpoints, continued
from fastbert.training.live import Terminal, of_pretraining
from fastbert.training.pretraining_trainer import PretrainingTrainer
from fastbert.training.recipe import load_config
from fastbert.training.summary import tokens_of_steps
from tests.corpora import random_store
from tests.runs import assert_same_weights, hold_out, make_corpus, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hold_out(make_corpus(tmp_path_factory.mktemp("words") / "corpus"))


@pytest.fixture
def warnings_of_others() -> Iterator[list[str]]:
    """What transformers logs."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(listener)
    yield said
    logger.removeHandler(listener)


def _checkpoint(kind: str, corpus: Path, folder: Path, **changes: Any) -> str:
    config = load_config(str(corpus.parent / "config.json"), Store.open(corpus))
    config.update(changes)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return str(folder)


class TestWords:
    def test_of_a_run_its_resume_and_its_end(
        self,
        corpus: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        warnings_of_others: list[str],
    ) -> None:
        output = tmp_path / "run"
        run(corpus, output, log_every=4, eval_every=6)
        lines = capfd.readouterr().err.splitlines()
        assert lines[0] == f"fastbert: pretraining in {output}"
        summary = {line[:17].strip(): line[17:] for line in lines if line.startswith("  ")}
        assert list(summary) == [
            *("model", "objective", "corpus", "held out", "steps", "tokens", "learning rate", "device"),
        ]
        assert "41,306 parameters, 2 layers of 32, vocabulary of 600" in summary["model"]
        assert summary["held out"].endswith("sequences of up to 32 tokens, every 6 steps")
        assert summary["steps"] == ("12 of 8 sequences; 7 steps of up to 32 tokens, then 5 steps of up to 64 tokens")
        assert summary["tokens"].startswith("at most 4,352, ")
        assert summary["device"].startswith("CPU, 1 thread; fp32")
        steps = [line.split(":")[0] for line in lines if line.startswith("step ")]
        assert steps == ["step 0", "step 4", "step 6", "step 8", "step 12", "step 12"]
        (eighth,) = (line for line in lines if line.startswith("step 8:"))
        for unit in (
            " nats, masked-LM loss ",
            "gradient norm",
            " tokens/s, ",
            " of the time waiting",
            " GiB ",
            " left",
        ):
            assert unit in eighth
        assert "held out: masked-LM loss" in next(line for line in lines if line.startswith("step 6:"))
        assert lines[-1] == f"fastbert: {output}/model is the model, for from_pretrained of transformers or fastbert"

        run(corpus, output)
        (line,) = capfd.readouterr().err.splitlines()
        assert line == (
            f"fastbert: already finished: 12 steps, {output}/model; to train on after the end, begin another run with"
            f" --init-from {output}/model"
        )

        (output / "model").rename(tmp_path / "model")  # as if it was killed before that was written
        run(corpus, output)
        lines = capfd.readouterr().err.splitlines()
        assert "fastbert: resumed at step 12 of 12, of checkpoint-12" in lines
        (tmp_path / "whole").mkdir()
        (tmp_path / "model").rename(tmp_path / "whole/model")
        assert_same_weights(output, tmp_path / "whole")
        assert warnings_of_others == []

    def test_what_may_change_when_a_run_goes_on(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_others: list[str]
    ) -> None:
        rotate = checkpoints.rotate

        def stop(output: Path, keep: int) -> None:
            rotate(output, keep)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "rotate", stop)
            with pytest.raises(KeyboardInterrupt):
                run(corpus, tmp_path / "run", eval_every=0)
        run(corpus, tmp_path / "run", log_every=2, save_every=3, eval_every=5, keep=9)
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in lines if "loss" in r] == [1, 2, 3, 4, 6, 8, 10, 12]
        assert [r["step"] for r in lines if "eval_mlm_loss" in r] == [5, 10, 12]
        saved = {int(path.name.split("-")[1]) for path in (tmp_path / "run").glob("checkpoint-*")}
        assert saved == {4, 6, 9, 12}
        assert warnings_of_others == []

    def test_a_run_shorter_than_its_logs_has_figures(self, corpus: Path, tmp_path: Path) -> None:
        """Those of all its steps; and a longer one those of its last steps. Accuracy is the last step's."""
        for log_every, logged in ((100, [3]), (2, [2, 3])):
            output = tmp_path / str(log_every)
            run(corpus, output, steps=3, warmup=1, log_every=log_every, eval_every=0)
            lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
            assert [record["step"] for record in lines] == logged
            assert all({"loss", "mlm_accuracy", "tokens_per_second"} <= record.keys() for record in lines)

    def test_phases_that_have_a_step(
        self, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(corpus, tmp_path / "run", steps=2, warmup=1, phases=((32, 0.99), (64, 0.01)), eval_every=1)
        error = capfd.readouterr().err
        assert "  steps          2 of 8 sequences; all of up to 32 tokens\n" in error
        assert "of up to 32 tokens, every step\n" in error
        assert "after a warm-up of 1 step, " in error

    @pytest.mark.parametrize("checkpoint", [None, 4])
    def test_ctrl_c(
        self,
        corpus: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        checkpoint: int | None,
    ) -> None:
        def stop(trainer: PretrainingTrainer, *args: Any, **options: Any) -> Any:
            if trainer.state.global_step == (checkpoint or 0) + 1:
                raise KeyboardInterrupt
            return loss(trainer, *args, **options)

        loss, output = PretrainingTrainer.compute_loss, tmp_path / "run"
        options = {"config": corpus.parent / "config.json", "data": corpus, "output": output, "steps": 12}
        options |= {"batch-size": 8, "phases": "32:1", "save-every": 4, "eval-every": 0, "device": "cpu"}
        monkeypatch.setattr("sys.argv", ["fastbert", "pretrain", *(f"--{k}={v}" for k, v in options.items())])
        monkeypatch.setattr(PretrainingTrainer, "compute_loss", stop)
        with pytest.raises(SystemExit, match="130"):
            cli.main()
        kept = " before the first checkpoint (--save-every): the same command begins anew"
        if checkpoint:
            kept = f"; {output}/checkpoint-{checkpoint} is whole: the same command goes on from there"
        assert capfd.readouterr().err.splitlines()[-1] == f"fastbert: stopped{kept}"
        monkeypatch.setattr(PretrainingTrainer, "compute_loss", loss)
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        assert (f"resumed at step {checkpoint} of 12" in capfd.readouterr().err) == (checkpoint is not None)

    def test_of_a_new_head(
        self, corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], warnings_of_others: list[str]
    ) -> None:
        theirs = _checkpoint("BertForMaskedLM", corpus, tmp_path / "theirs")
        capfd.readouterr()
        run(corpus, tmp_path / "run", config=None, init_from=theirs, eval_every=0)
        error = capfd.readouterr().err
        assert f"  new            next-sentence head and pooler, of which {theirs} has none: random at first" in error
        assert warnings_of_others == []
        assert "MISSING" not in error

    def test_no_gpu(self, corpus: Path, tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        from fastbert.training.pretraining import pretrain
        from tests.runs import recipe

        with pytest.raises(InputError, match="no GPU"):
            pretrain(recipe(corpus), corpus, tmp_path / "run", device=torch.device("cuda"))


class TestTerminal:
    @staticmethod
    def _told(*logs: tuple[int, dict[str, Any]], terminal: bool, rank: int = 0) -> tuple[Terminal, str]:
        phases = Phase(32, 500_000), Phase(128, 500_000)
        said = Terminal(of_pretraining("masked LM"), 1_000_000, partial(tokens_of_steps, phases))
        file = io.StringIO()
        said._console = Console(file=file, force_terminal=terminal, width=80)
        state: Any = SimpleNamespace(is_world_process_zero=rank == 0, global_step=0)
        args: Any = None
        said.on_train_begin(args, state, args)
        for step, figures in logs:
            state.global_step = step
            said.on_step_end(args, state, args)
            said.on_log(args, state, args, figures)
        said.close()
        return said, file.getvalue()

    LOGS = (
        (
            100_000,
            {"loss": 7.0, "mlm_loss": 6.3, "mlm_accuracy": 0.03, "nsp_loss": 0.7, "nsp_accuracy": 0.58, "epoch": 1},
        ),
        (100_000, {"eval_mlm_loss": 6.1, "eval_mlm_accuracy": 0.1, "eval_perplexity": 445.86, "eval_nsp_loss": 0.6}),
        (200_000, {"eval_mlm_loss": 6.2, "eval_mlm_accuracy": 0.1, "eval_perplexity": 492.75, "eval_nsp_loss": 0.6}),
        (200_000, {"train_runtime": 9.0}),
    )

    def test_it_is_updated_in_place_and_aligned(self) -> None:
        told, written = self._told(*self.LOGS, terminal=True)
        assert "\x1b[1A" in written, "the cursor goes up"
        console = Console(file=io.StringIO(), width=80)
        console.print(told._shown())
        shown = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        bar, head, trained, held_out, best = (line.rstrip() for line in shown)
        assert bar.startswith("step   200,000 of 1,000,000 ")
        assert "20%" in bar
        assert bar.endswith(" left")
        assert held_out.split() == ["held", "out", "200,000", "6.2000", "10.0%", "492.8", "0.6000"]
        assert trained.split() == ["training", "100,000", "6.3000", "3.0%", "0.7000", "58.0%"]
        for column, cells in (("masked LM", ("6.3000", "6.2000")), ("next sentence", ("0.7000", "0.6000"))):
            end = head.index(column) + len(column)
            assert [line[:end].split()[-1] for line in (trained, held_out)] == list(cells)
        assert best == "best held out: step 100,000, 6.1000"

    def test_time_that_is_left_goes_by_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A second a step of 32 tokens is four of 128."""
        clock = iter([0.0, 250_000.0, 250_000.0])
        monkeypatch.setattr("fastbert.training.live.time", SimpleNamespace(perf_counter=lambda: next(clock)))
        logs = {"loss": 7.0, "mlm_loss": 7.0}
        _, written = self._told((0, logs), (250_000, logs), terminal=False)
        assert written.splitlines()[-1].endswith(" 26 days, 1:00:00 left")

    def test_one_process_speaks(self) -> None:
        for terminal in (True, False):
            assert self._told(*self.LOGS, terminal=terminal, rank=1)[1] == ""

    def test_lines_where_it_is_none(self) -> None:
        _, written = self._told(*self.LOGS, terminal=False)
        lines = written.splitlines()
        assert len(lines) == 3
        assert "\x1b" not in written
        assert lines[1] == (
            "step 100,000: held out: masked-LM loss 6.1000 nats, accuracy 10.0%, perplexity 445.9,"
            " next-sentence loss 0.6000 nats, the best so far"
        )
        assert "best" not in lines[2]


class TestContinued:
    SAMPLING = Sampling(batch_size=8)
    NONE: dict[str, Any] = dict.fromkeys(("objective", "phases", "steps", "learning_rate", "warmup"))

    @pytest.mark.parametrize(
        ("kind", "positions", "objective", "phases"),
        [
            ("BertForPreTraining", 64, "mlm+nsp", ((64, 1.0),)),
            ("BertForMaskedLM", 256, "mlm", ((128, 0.9), (256, 0.1))),
            ("BertModel", 1024, "mlm", ((128, 0.9), (512, 0.1))),
        ],
    )
    def test_what_is_chosen(
        self, kind: str, positions: int, objective: str, phases: object, corpus: Path, tmp_path: Path
    ) -> None:
        name = _checkpoint(kind, corpus, tmp_path / "theirs", max_position_embeddings=positions)
        store = Store.open(corpus)
        options, notes = continued.choose(name, store, self.SAMPLING, self.NONE)
        assert (options["objective"], options["phases"], options["learning_rate"]) == (objective, phases, 5e-5)
        tokens = options["steps"] * 8 * sum(n * share for n, share in options["phases"])
        assert tokens == pytest.approx(40 * store.tokens, rel=1e-2)
        assert options["warmup"] == round(0.06 * options["steps"])
        assert len(notes) == 5
        large = replace(store, tokens=10**9)
        assert continued.choose(name, large, self.SAMPLING, self.NONE)[0]["steps"] == 10_000

    def test_what_is_given_wins(self, corpus: Path, tmp_path: Path) -> None:
        name = _checkpoint("BertForMaskedLM", corpus, tmp_path / "theirs")
        given = {"objective": "mlm+nsp", "phases": ((9, 1.0),), "steps": 3, "learning_rate": 1.0, "warmup": 0}
        assert continued.choose(name, Store.open(corpus), self.SAMPLING, given) == (given, [])

    def test_the_command(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        name = _checkpoint("BertForMaskedLM", corpus, tmp_path / "theirs")
        command = ["pretrain", "--init-from", name, "--data", str(corpus), "--output", str(tmp_path / "run")]
        command += ["--steps", "5", "--batch-size", "4", "--device", "cpu", "--threads", "1", "--eval-every", "0"]
        monkeypatch.setattr(sys, "argv", ["fastbert", *command])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        error = capfd.readouterr().err
        assert not exit_.value.code, error
        assert f"  chosen         --objective mlm: {name} has no next-sentence head\n" in error
        assert "--phases 64:1: the model takes 64 tokens\n" in error
        assert "--steps 5" not in error, "that was not chosen"
        fixed = json.loads((tmp_path / "run/run.json").read_text())["fixed"]
        assert (fixed["sampling"]["objective"], fixed["phases"], fixed["warmup"]) == ("mlm", [[64, 1.0]], 0)
        free = json.loads((tmp_path / "run/run.json").read_text())["free"]
        assert free["save_every"] == 1, "a fifth of the steps: a run that is stopped has lost no more"
        assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{i}" for i in (3, 4, 5)}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--init-from", "theirs", "--config", "tiny"], "give it or --config, not both"),
            (["--init-from", "run"], "run is a run's folder: give its model, best, or a checkpoint in there"),
            (
                ["--config", "tiny", "--output", "run"],
                "run is another run: config was none, and is tiny; corpus is another",
            ),
        ],
    )
    def test_what_cannot_be(
        self,
        corpus: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        options: list[str],
        message: str,
    ) -> None:
        _checkpoint("BertForMaskedLM", corpus, tmp_path / "theirs")
        (tmp_path / "run").mkdir()
        fixed = {"beta1": 0.9, "beta2": 0.999, "clip": 1.0, "config": None, "corpus": "0" * 64}
        (tmp_path / "run/run.json").write_text(json.dumps({"fixed": fixed}))
        monkeypatch.chdir(tmp_path)
        command = ["pretrain", "--data", str(corpus), "--output", "new", "--steps", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["fastbert", *command, "--phases", "32:1", *options])
        with pytest.raises(SystemExit, match="1"):
            cli.main()
        assert message in capfd.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "new").exists()


def test_checkpoints_of_another_vocabulary_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Also where it has as many words."""
    name = _checkpoint("BertForMaskedLM", corpus, tmp_path / "theirs")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (corpus / file).read_text(encoding="utf-8")
        (tmp_path / "theirs" / file).write_text(text.replace('"the":', '"zhe":'), encoding="utf-8")
    with pytest.raises(InputError, match=r"another vocabulary than .*theirs: 2 tokens differ, as 'the'"):
        run(corpus, tmp_path / "run", config=None, init_from=name)
    transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=600, num_hidden_layers=1)).save_pretrained(
        tmp_path / "roberta"
    )
    with pytest.raises(InputError, match="'roberta'"):
        run(corpus, tmp_path / "run", config=None, init_from=str(tmp_path / "roberta"))
    assert not (tmp_path / "run").exists()


def test_tokenizers_that_are_written_know_what_the_model_takes(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "run", eval_every=6)
    text = "the fox and the lion " * 50
    for name in ("model", "best", "checkpoint-12"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        assert tokenizer.model_max_length == 64
        assert len(tokenizer(text, truncation=True)["input_ids"]) == 64
    pipeline = transformers.pipeline("feature-extraction", str(tmp_path / "run/model"), device="cpu")
    assert len(pipeline(text, tokenize_kwargs={"truncation": True})[0]) == 64


class TestReportTo:
    def test_integrations_get_the_figures(self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        got: list[dict[str, Any]] = []

        class Tracker(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                got.append({"step": state.global_step, **logs})

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker", Tracker)
        run(corpus, tmp_path / "run", eval_every=6, report_to=("tracker", "tensorboard"))
        lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        assert [r for r in got if "train_runtime" not in r] == [
            r | {"epoch": mine["epoch"]} for r, mine in zip(lines, got, strict=False)
        ]
        assert sum("eval_mlm_loss" in r for r in got) == 3

    @pytest.mark.parametrize(("name", "message"), [("wandbee", "there is no 'wandbee', but .*wandb"), ("mine", "pip")])
    def test_what_cannot_be(
        self, name: str, message: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing() -> None:
            raise RuntimeError("Mine requires mine to be installed. Run `pip install mine`.\nmore")

        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", missing)
        with pytest.raises(InputError, match=message) as caught:
            run(corpus, tmp_path / "run", report_to=(name,))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_a_step_of_two_processes_is_that_of_one(objective: str) -> None:
    """The same sequences with the same masks, only divided: masks depend on no process."""

    def rows(**options: int) -> list[list[tuple[Any, ...]]]:
        batches = PretrainingBatches(
            random_store(),  # type: ignore[arg-type]
            Sampling(objective, batch_size=16, window_tokens=3000),
            [Phase(32, 5), Phase(64, 5)],
            **options,
        )
        steps = []
        for batch in batches:
            ends = batch["cu_seq_lens_q"].tolist()
            parts = [batch[name][0].tensor_split(ends[1:-1]) for name in ("input_ids", "labels")]
            steps.append([tuple(map(tuple, (t.tolist() for t in row))) for row in zip(*parts, strict=True)])
        return steps

    one, first, second = rows(), rows(rank=0, world_size=2), rows(rank=1, world_size=2)
    assert len(one) == 10
    for whole, a, b in zip(one, first, second, strict=True):
        assert len(a) == len(b) == 8
        assert sorted(a + b) == sorted(whole)
        assert any(label != -100 for _, labels in whole for label in labels)
