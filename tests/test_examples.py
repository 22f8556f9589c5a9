"""The examples, run as users run them, on models that lie here."""

import csv
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastbert
from tests.checkpoints import minilm, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parents[1] / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """An example with these arguments, in a folder of its own: its stdout. It has patched a model."""

    def run(name: str, *arguments: object) -> str:
        patched = []
        patch = fastbert.patch
        monkeypatch.setattr(fastbert, "patch", lambda model, **how: patched.append(model) or patch(model, **how))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(EXAMPLES / name))["main"]()  # as __main__, every worker of `prepare` would import all of it
        assert patched
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_has_a_test(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 40
    assert f'run("{path.name}"' in Path(__file__).read_text()


def test_embed(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    out = run("embed.py", "--model", minilm())
    assert out.splitlines()[0].endswith("The hare lay down for a nap, and the tortoise walked past him.")
    (tmp_path / "texts.txt").write_text("two and two are four\na cat sleeps\nkittens nap\nthe moon is far\n")
    out = run("embed.py", "a dozing pet", "--model", minilm(), "--texts", "texts.txt")
    assert {line[6:] for line in out.splitlines()[:2]} == {"a cat sleeps", "kittens nap"}


def test_rerank(run: Run, tmp_path: Path) -> None:
    cross_encoder = pytest.importorskip("sentence_transformers").CrossEncoder
    model = tiny_checkpoint(tmp_path / "model", "BertForSequenceClassification", num_labels=1)
    texts = ["the cat sat on the mat", "a dog ran", "red birds sang under a tree"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    out = run("rerank.py", "the cat", "--model", model, "--texts", "texts.txt")
    expected = cross_encoder(model).rank("the cat", texts)
    assert out == "".join(f"{hit['score']:6.2f}  {texts[hit['corpus_id']]}\n" for hit in expected)


def test_fine_tune(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    texts = ["the cat sat", "a small cat", "the red cat ran", "the dog sat", "a small dog", "the red dog ran"]
    with (tmp_path / "rows.csv").open("w") as file:
        csv.writer(file).writerows((int("cat" in text), text) for text in texts)
    model = tiny_checkpoint(tmp_path / "model")
    run("fine_tune.py", "--model", model, "--data", "rows.csv", "--epochs", 25, "--learning-rate", 1e-2)
    trained = AutoModelForSequenceClassification.from_pretrained("fine-tuned")
    batch = AutoTokenizer.from_pretrained(model)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        assert trained(**batch).logits.argmax(-1).tolist() == [1, 1, 1, 0, 0, 0]


def test_pretrain_from_scratch_and_go_on(run: Run, tmp_path: Path) -> None:
    for needed in ("accelerate", "sentencex", "tensorboard", "fastbert._C"):
        pytest.importorskip(needed)
    assert run("pretrain_from_scratch.py", "--steps", 3).splitlines()[-1] == "scratch/run/model"
    transformers.BertForPreTraining.from_pretrained(tmp_path / "scratch/run/model")
    (tmp_path / "notes.txt").write_text("A fox saw a lion. The lion was asleep.\n\nThe fox went away again.\n" * 20)
    arguments = ("notes.txt", "--init-from", "scratch/run/model", "--steps", 2, "--batch-size", 4)
    assert run("continue_pretraining.py", *arguments).splitlines()[-1] == "continued/run/model"
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path / "continued/run/model")
    assert model.config.vocab_size == 600
