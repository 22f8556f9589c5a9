"""Evaluation on held-out text: what it says, that it disturbs nothing, what is kept of it, and the command.

By several processes: test_pretrain.py, and sharded, test_checkpoints.py.
"""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

pytest.importorskip("accelerate")
pytest.importorskip("sentencex")
pytest.importorskip("tensorboard")
pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

from fastbert import cli
from fastbert.data.pretraining import Sampling, fixed_batches
from fastbert.data.store import HELD_OUT, Store
from fastbert.errors import InputError
from fastbert.training import checkpoints
from fastbert.training.evaluation import Evaluation
from fastbert.training.models import to_evaluate
from fastbert.training.plot import read_log
from fastbert.training.recipe import load_config
from tests.corpora import random_store
from tests.runs import assert_same_weights, hold_out, make_corpus, run

pytestmark = pytest.mark.usefixtures("one_thread")
FIGURES = ("eval_mlm_loss", "eval_mlm_accuracy", "eval_perplexity", "eval_nsp_loss", "eval_nsp_accuracy")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without a held-out part."""
    return make_corpus(tmp_path_factory.mktemp("evaluate") / "corpus")


@pytest.fixture(scope="module")
def corpus(plain: Path) -> Path:
    return hold_out(plain)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps with dropout, evaluated before the first one and every 3."""
    output = tmp_path_factory.mktemp("trained") / "run"
    run(corpus, output, eval_every=3)
    return output


def _evaluations(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: r[key] for key in ("step", *FIGURES)} for r in lines if "eval_mlm_loss" in r]


def _trained_on(output: Path) -> list[dict[str, Any]]:
    clocks = {"time", "tokens_per_second", "sequences_per_second", "data_wait", "peak_memory_gib"}
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: v for key, v in r.items() if key not in clocks} for r in lines if "loss" in r]


def _evaluated(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["fastbert", "evaluate", *arguments, "--device", "cpu"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


def test_the_figures_are_those_of_stock_transformers(corpus: Path, trained: Path) -> None:
    """Each sequence alone, unpadded, by transformers' own model."""
    store = Store.open(corpus / HELD_OUT)
    model, objective = to_evaluate(str(trained / "model"), store)
    assert objective == "mlm+nsp"
    actual = Evaluation(store, objective, 32, 50)(model.train())
    assert model.training, "as it was"
    stock = transformers.BertForPreTraining.from_pretrained(trained / "model").eval()
    loss = right = labels = nsp_loss = nsp_right = pairs = 0.0
    for batch in fixed_batches(store, objective, 32, 50, 64):
        bounds = batch["cu_seq_lens_q"].tolist()
        for i, (start, end) in enumerate(pairwise(bounds)):
            answers = batch["labels"][0, start:end]
            one = {name: batch[name][:, start:end] for name in ("input_ids", "token_type_ids")}
            with torch.no_grad():
                out = stock(**one)
            chosen = answers != -100
            logits = out.prediction_logits[0, chosen]
            loss += F.cross_entropy(logits, answers[chosen], reduction="sum").item()
            right += (logits.argmax(-1) == answers[chosen]).sum().item()
            labels += chosen.sum().item()
            answer = batch["next_sentence_label"][i : i + 1]
            nsp_loss += F.cross_entropy(out.seq_relationship_logits, answer).item()
            nsp_right += (out.seq_relationship_logits.argmax(-1) == answer).sum().item()
            pairs += 1
    assert pairs == 50
    expected = (loss / labels, right / labels, torch.tensor(loss / labels).exp().item(), nsp_loss / 50, nsp_right / 50)
    assert [actual[name] for name in FIGURES] == pytest.approx(expected, rel=1e-5)


def test_training_is_the_same_with_and_without(corpus: Path, trained: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout."""
    run(corpus, tmp_path / "run", eval_every=0)
    assert_same_weights(tmp_path / "run", trained)
    assert _trained_on(tmp_path / "run") == _trained_on(trained)
    assert _evaluations(tmp_path / "run") == []
    assert not (tmp_path / "run/best").exists()
    assert [r["step"] for r in _evaluations(trained)] == [0, 3, 6, 9, 12]
    assert list(read_log(trained)[-1].keys() & set(FIGURES)), "curves have them"


def test_masks_are_the_same_whatever_the_run(corpus: Path, trained: Path, tmp_path: Path) -> None:
    first = []
    for seed, batch in ((1, 4), (2, 8)):
        sampling = Sampling(batch_size=batch, seed=seed, masking="whole-word", mask_rate=0.3)
        begun = {"config": None, "init_from": str(trained / "model"), "sampling": sampling, "save_every": 12}
        run(corpus, tmp_path / f"{seed}", eval_every=12, **begun)
        first.append(_evaluations(tmp_path / f"{seed}")[0])
    assert first[0] == first[1]
    assert first[0] == {**_evaluations(trained)[-1], "step": 0}


class TestBest:
    LOSSES = (9.0, 5.0, 3.0, 4.0, 3.5)  # at the start, and every 3 steps

    @pytest.fixture
    def scripted(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """What evaluations will find."""
        losses = list(self.LOSSES)

        def found(self: Evaluation, model: Any) -> dict[str, float]:
            return dict.fromkeys(FIGURES, 0.5) | {"eval_mlm_loss": losses.pop(0)}

        monkeypatch.setattr(Evaluation, "__call__", found)
        return losses

    def test_the_best_model_is_kept_beside_the_last_ones(
        self, scripted: list[float], corpus: Path, tmp_path: Path
    ) -> None:
        run(corpus, tmp_path / "run", eval_every=3, save_every=6, keep=9)
        assert scripted == []
        about = json.loads((tmp_path / "run/best/evaluation.json").read_text())
        assert (about["step"], about["eval_mlm_loss"]) == (6, 3.0)
        kept = transformers.BertForPreTraining.from_pretrained(tmp_path / "run/best").state_dict()
        then = transformers.BertForPreTraining.from_pretrained(tmp_path / "run/checkpoint-6").state_dict()
        assert all(torch.equal(t, then[name]) for name, t in kept.items())
        assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12"}
        assert not list((tmp_path / "run/best").glob("*training_args*"))

    def test_a_resumed_run_knows_it(
        self, scripted: list[float], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save = checkpoints.rotate

        def stop(output: Path, keep: int) -> None:
            save(output, keep)
            if (output / "checkpoint-8").exists():
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "rotate", stop)
            with pytest.raises(KeyboardInterrupt):
                run(corpus, tmp_path / "run", eval_every=3)
        run(corpus, tmp_path / "run", eval_every=3)
        assert scripted == []
        assert json.loads((tmp_path / "run/best/evaluation.json").read_text())["step"] == 6

    def test_one_that_was_replaced_when_the_run_was_killed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = os.rename
        best, draft = tmp_path / "best", tmp_path / checkpoints.DRAFTS / "best"
        for path in (best, draft):
            path.mkdir(parents=True)
            (path / "from").write_text(path.parent.name)

        class Killed(Exception):
            pass

        def killed(source: Path, target: Path) -> None:
            if source == draft:
                raise Killed
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", killed)
            with pytest.raises(Killed):
                checkpoints.publish(draft, best)
        assert not best.exists()
        checkpoints.remove_drafts(tmp_path)
        assert (best / "from").read_text() == tmp_path.name
        assert [path.name for path in tmp_path.iterdir()] == ["best"]


class TestCommand:
    def test_of_a_run_it_says_what_the_trainer_said(
        self, corpus: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        last = _evaluations(trained)[-1]
        for name, model in ((trained, "model"), (trained / "checkpoint-12", ""), (trained / "best", "")):
            assert _evaluated(str(name), "--data", str(corpus), "--json", monkeypatch=monkeypatch) == 0
            out, error = capfd.readouterr()
            found = json.loads(out)
            assert error == ""
            assert {name: found[name] for name in FIGURES} == {name: last[name] for name in FIGURES}
            assert found["model"] == str(name / model)
            assert (found["held_out"], found["max_length"]) == (True, 32)
        assert _evaluated(str(trained), "--data", str(corpus), "--sequences", "20", monkeypatch=monkeypatch) == 0
        out = capfd.readouterr().out
        assert "20 sentence pairs of up to 32 tokens" in out
        assert "masked LM" in out
        assert "next sentence" in out

    @pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertLMHeadModel"])
    def test_without_a_next_sentence_head(
        self,
        kind: str,
        plain: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Of a checkpoint of somebody else, without a tokenizer, on a store without a held-out part."""
        config = load_config(str(plain.parent / "config.json"), Store.open(plain))
        config.is_decoder = kind == "BertLMHeadModel"
        getattr(transformers, kind)(config).save_pretrained(tmp_path / "theirs")
        assert _evaluated(str(tmp_path / "theirs"), "--data", str(plain), "--json", monkeypatch=monkeypatch) == 0
        out, error = capfd.readouterr()
        assert error == (
            f"fastbert: {plain} has no held-out part: evaluating on all of it, which the model may have been trained"
            " on\n"
        )
        found = json.loads(out)
        assert found["objective"] == ("mlm" if kind == "BertForMaskedLM" else "left-to-right")
        assert found["max_length"] == 64
        assert found["eval_mlm_loss"] == pytest.approx(6.4, abs=0.1), "nothing is learnt: the vocabulary's logarithm"
        assert "eval_nsp_loss" not in found

    def test_what_cannot_be(
        self,
        corpus: Path,
        trained: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        other = tmp_path / "other"
        stock = transformers.BertForPreTraining.from_pretrained(trained / "model")
        stock.save_pretrained(other)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            text = (trained / "model" / file).read_text(encoding="utf-8")
            (other / file).write_text(text.replace('"the":', '"zhe":'), encoding="utf-8")
        stock.bert.save_pretrained(tmp_path / "encoder")
        (tmp_path / "run").mkdir()
        (tmp_path / "run/run.json").write_text("{}")
        (tmp_path / "stopped/best").mkdir(parents=True)
        (tmp_path / "stopped/run.json").write_text("{}")
        for arguments, message in (
            ([str(other)], "has another vocabulary than"),
            ([str(tmp_path / "encoder")], "predicts no words: it lacks 6 weights, cls.predictions"),
            ([str(tmp_path / "run")], "has no model yet, and no checkpoint"),
            ([str(tmp_path / "stopped")], "and no checkpoint: its best so far is "),
            ([str(trained), "--max-length", "65"], "takes at most 64 tokens"),
            ([str(tmp_path / "none")], "no such directory"),
            ([str(trained), "--data", str(tmp_path / "none")], "no such folder"),
        ):
            assert _evaluated("--data", str(corpus), *arguments, monkeypatch=monkeypatch) == 1
            error = capfd.readouterr().err.splitlines()[-1]
            assert message in error
            assert error.startswith("fastbert: ")


def test_a_corpus_that_cannot_be_evaluated_on(plain: Path, tmp_path: Path) -> None:
    one: Any = random_store(1, parts=1)
    with pytest.raises(InputError, match=r"memory cannot be evaluated on: .*two documents"):
        Evaluation(one, "mlm+nsp", 32, 8)
    with pytest.raises(InputError, match=r"no held-out part to evaluate on: fastbert prepare --held-out"):
        run(plain, tmp_path / "run", eval_every=3)
    assert not (tmp_path / "run").exists()
