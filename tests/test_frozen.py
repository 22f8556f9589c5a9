"""A BiLSTM over a frozen encoder: its input against transformers' hidden states, and runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig

from fastbert.errors import InputError
from fastbert.inference.engine import Engine
from fastbert.tasks import registry
from fastbert.tasks.features import Tokenizing
from fastbert.tasks.tagging import words
from fastbert.tasks.tagging.frozen import FEATURES, About, Vectors, WordLSTM, encoder_of, layers_of, scored, vectors
from fastbert.tasks.task import DEV, Given
from fastbert.training.frozen import FrozenRun
from fastbert.training.tuning import Tuning
from tests.checkpoints import tiny_checkpoint
from tests.command import runner
from tests.test_tagging import made_up

pytest.importorskip("seqeval")
pytest.importorskip("pyarrow")

SENTENCES = [["the", "cats", "sat"], [], ["\u200b"], ["a", "dog", "\u200b", "ran"], ["on", "birds"] * 12]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("encoder"), num_hidden_layers=5)


@pytest.mark.parametrize("features", FEATURES)
def test_vectors_are_the_hidden_states_of_first_pieces(encoder: str, features: str) -> None:
    model, tokenizer = encoder_of(encoder, torch.device("cpu")), AutoTokenizer.from_pretrained(encoder)
    engine = Engine(model, tokenizer, batch_tokens=30)
    read = words.encode(SENTENCES, Tokenizing(tokenizer, 48, types=False))
    found = vectors(engine, read.tokens, layers_of(features, model.config))
    assert found.lengths.tolist() == [3, 0, 0, 3, 24]

    stock = AutoModel.from_pretrained(encoder).eval()
    chosen = {
        "embeddings": [0],
        "second-to-last": [-2],
        "last": [-1],
        "weighted-sum": [1, 2, 3, 4, 5],
        "last-4-sum": [-4, -3, -2, -1],
        "last-4-concat": [-4, -3, -2, -1],
    }[features]
    expected = []
    for sentence in SENTENCES:
        encoded = tokenizer(sentence, is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            states = stock(**encoded, output_hidden_states=True).hidden_states
        before = None
        for place, word in enumerate(encoded.word_ids()):
            if word is not None and word != before:
                expected.append(torch.stack([states[i][0, place] for i in chosen]))
            before = word
    np.testing.assert_allclose(found.values, torch.stack(expected).numpy(), atol=4e-3, rtol=0)


@pytest.mark.parametrize("features", ["last", "last-4-sum", "last-4-concat"])
def test_packed_sentences_are_those_one_by_one(features: str) -> None:
    torch.manual_seed(0)
    model = WordLSTM(About("x", features, ["O", "B-X"], kept=1 if features == "last" else 4, hidden=6, size=8)).eval()
    if model.sums:
        torch.nn.init.normal_(model.weights)
    lengths = [3, 1, 7, 3]
    x = torch.randn(14, model.about.kept, 6)
    inputs = x.flatten(1)
    if model.sums:
        inputs = model.scale * sum(w * x[:, k] for k, w in enumerate(model.weights.softmax(0)))
    one_by_one = [model.classifier(model.lstm(each[:, None])[0][:, 0]) for each in inputs.split(lengths)]
    torch.testing.assert_close(model(x, lengths), torch.cat(one_by_one))


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = WordLSTM(About("x", "last-4-sum", ["O", "B-X"], kept=4, hidden=6)).eval()
    model.save(tmp_path)
    x = torch.randn(5, 4, 6)
    assert torch.equal(WordLSTM.load(tmp_path)(x, [2, 3]), model(x, [2, 3]))
    assert model.lstm.num_layers == 2
    assert 2 * model.lstm.hidden_size == 768
    (tmp_path / "bilstm.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match="has no BiLSTM that can be read"):
        WordLSTM.load(tmp_path)


def test_scores_are_in_the_order_of_the_sentences() -> None:
    """Longest first in the BiLSTM; sentences and words without tokens get nothing."""

    class Judged:
        tokens = type("T", (), {"ids": np.zeros(12)})
        width = 2

        @staticmethod
        def score(logits: Any) -> Any:
            return logits

    model = WordLSTM(About("x", "last", ["O", "B-X"], kept=1, hidden=4, size=8))
    read = Vectors(
        np.random.default_rng(0).normal(size=(5, 1, 4)).astype(np.float16),
        np.array([1, 5, 6, 7, 10]),
        np.array([1, 0, 3, 1]),
    )
    found: Any = scored(model, Judged(), read)  # type: ignore[arg-type]
    expected = model(torch.from_numpy(read.values).float(), [1, 3, 1]).detach().numpy()
    np.testing.assert_allclose(found[read.at], expected, atol=1e-6)
    assert not found[[0, 2, 3, 4, 8, 9, 11]].any()


def test_layers_that_are_not_there() -> None:
    with pytest.raises(InputError, match="--features last-4-sum: the encoder has 3 layers"):
        layers_of("last-4-sum", BertConfig(num_hidden_layers=3))
    with pytest.raises(InputError, match=r"--features must be one of embeddings, second-to-last, .* but is 'first'"):
        layers_of("first", BertConfig())


def run_of(folder: Path, encoder: str, features: str, **options: Any) -> FrozenRun:
    made = registry.make("ner", Given(train=str(folder / "train.txt"), dev=str(folder / "dev.txt")))
    tuning = Tuning(encoder, epochs=8, batch_size=8, learning_rates=(3e-3,), max_length=16, doc_stride=4, seeds=(1, 2))
    return FrozenRun(made, tuning, folder / f"run-{features}", features, device=torch.device("cpu"), **options)


def test_a_run(
    tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(tmp_path, "train.txt", 96, 0)
    made_up(tmp_path, "dev.txt", 24, 1)
    model = run_of(tmp_path, encoder, "embeddings")()  # further up a random encoder knows no words
    run = model.parent
    results = json.loads((run / "results.json").read_text())
    metrics = results["splits"][DEV]["metrics"]
    assert metrics["f1"] > 0.7
    assert len((run / "dev-predictions.jsonl").read_text().splitlines()) == 24
    log = [json.loads(line) for line in (run / "runs" / results["training"] / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    assert log[-1]["eval_f1"] == metrics["f1"]
    assert sorted(file.name for file in model.iterdir()) == ["bilstm.safetensors", "fastbert_task.json", "frozen.json"]
    assert json.loads((model / "frozen.json").read_text())["encoder"] == encoder

    command = runner(capsys, monkeypatch)
    status, out, _ = command("evaluate", run, "--data", tmp_path / "dev.txt", "--device", "cpu", "--json")
    assert status == 0
    assert json.loads(out)["splits"][DEV]["metrics"] == metrics
    sentences = registry.make("ner", Given(dev=str(tmp_path / "dev.txt"))).read(DEV)[DEV].inputs
    (tmp_path / "words.jsonl").write_text("".join(json.dumps({"words": list(words)}) + "\n" for words in sentences))
    status, _, err = command("predict", run, tmp_path / "words.jsonl", "--text", "words", "-o", tmp_path / "x.jsonl")
    assert status == 0, err
    said, judged = (
        [
            [(entity["type"], entity["text"]) for entity in json.loads(line)["entities"]]
            for line in path.read_text().splitlines()
        ]
        for path in (tmp_path / "x.jsonl", run / "dev-predictions.jsonl")
    )
    assert said == judged
    assert sum(map(len, said)) > 20

    before = (run / "results.json").stat().st_mtime_ns
    assert run_of(tmp_path, encoder, "embeddings")() == model
    assert (run / "results.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="features was embeddings, and is last"):
        FrozenRun.__call__(_moved(run_of(tmp_path, encoder, "last"), run))


@pytest.mark.parametrize("at", [1, 12, 13, 31, 96])
def test_a_training_that_was_cut_off_ends_as_if_it_was_not(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """To the bit; also where a log has losses of before and behind the cut."""
    made_up(tmp_path, "train.txt", 96, 0)
    made_up(tmp_path, "dev.txt", 24, 1)
    made = registry.make("ner", Given(train=str(tmp_path / "train.txt"), dev=str(tmp_path / "dev.txt")))
    tuning = Tuning(encoder, batch_size=8, epochs=8, learning_rates=(3e-3,), save_every=5, log_every=7)
    device, backward, steps = torch.device("cpu"), FrozenRun._backward, iter(range(1, 1000))

    def cut(self: FrozenRun, *inputs: Any) -> Any:
        if next(steps) == at:
            raise KeyboardInterrupt
        return backward(self, *inputs)

    whole = FrozenRun(made, tuning, tmp_path / "whole", "embeddings", device=device)()
    monkeypatch.setattr(FrozenRun, "_backward", cut)
    with pytest.raises(KeyboardInterrupt):
        FrozenRun(made, tuning, tmp_path / "cut", "embeddings", device=device)()
    resumed = FrozenRun(made, tuning, tmp_path / "cut", "embeddings", device=device)()
    assert next(steps) == 96 + 1 + (at - 1) % 5 + 1
    assert (whole / "bilstm.safetensors").read_bytes() == (resumed / "bilstm.safetensors").read_bytes()

    def log_of(model: Path) -> list[dict[str, Any]]:
        lines = (model.parent / "runs" / "lr-0.003-seed-1" / "log.jsonl").read_text().splitlines()
        return [{name: value for name, value in json.loads(line).items() if name != "time"} for line in lines]

    assert log_of(whole) == log_of(resumed)
    assert not list((resumed.parent / "runs" / "lr-0.003-seed-1").glob("checkpoint-*"))


def test_a_damaged_checkpoint_is_said(tmp_path: Path, encoder: str) -> None:
    for name in ("train.txt", "dev.txt"):
        made_up(tmp_path, name, 8, len(name))
    run = run_of(tmp_path, encoder, "last")
    damaged = tmp_path / "run-last" / "runs" / "lr-0.003-seed-1" / "checkpoint-3"
    damaged.mkdir(parents=True)
    (damaged / "state.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="checkpoint-3 is damaged: remove it"):
        run()


def _moved(run: FrozenRun, output: Path) -> FrozenRun:
    run.output = output
    return run


def test_memory_is_said_and_bounded(tmp_path: Path, encoder: str) -> None:
    for name in ("train.txt", "dev.txt"):
        made_up(tmp_path, name, 8, len(name))
    run = run_of(tmp_path, encoder, "weighted-sum", memory=1e-6)
    with pytest.raises(InputError, match=r"--features weighted-sum: \d+ words x 5 x 32, .* GiB, is more than"):
        run()


def test_only_for_words(tmp_path: Path, encoder: str) -> None:
    made = registry.make("classify", Given(train="x.csv"))
    with pytest.raises(InputError, match="--features is for tasks with a tag a word, as ner, and classify is none"):
        FrozenRun(made, Tuning(encoder), tmp_path, "last")
