"""fastbert finetune on files of one's own: training, resuming, grids, and the model that comes out."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

pytest.importorskip("accelerate")
pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")
pytest.importorskip("tensorboard")

import fastbert
from fastbert.training import checkpoints, finetuning, plot_finetuning
from fastbert.training.evaluation import Evaluate
from tests.checkpoints import tiny_checkpoint
from tests.command import Run, is_one_line

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("cat", "dog", "bird")
ENDS = ("sat on the mat", "ran", "sang under a tree", "and the house", "on a red mat", "sang and ran")
OPTIONS = ("--epochs", 3, "--batch-size", 8, "--learning-rate", "2e-3", "--log-every", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def write_rows(path: Path) -> Path:
    """Whose tale it is, by its text, as CSV."""
    rows = [
        f"{article} {size}{name} {end},{name}s\n"
        for article in ("the", "a")
        for size in ("", "big ", "small ")
        for end in ENDS
        for name in NAMES
    ]
    path.write_text("text,animal\n" + "".join(rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "tales.csv")


def finetune(run: Run, model: str, data: Path, output: Path, *more: object) -> tuple[int, str, str]:
    words = ("finetune", "classify", "--model", model, "--data", data, "--label", "animal", "-o", output)
    return run(*words, *OPTIONS, *more)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def log(run: Path) -> list[dict[str, Any]]:
    """Every training's, without what depends on the clock."""
    lines = [line for path in sorted(run.glob("runs/*/log.jsonl")) for line in path.read_text().splitlines()]
    clocks = ("time", "peak_memory_gib", "tokens_per_second", "sequences_per_second", "data_wait")
    return [{key: v for key, v in json.loads(line).items() if key not in clocks} for line in lines]


def results(run: Path) -> dict[str, Any]:
    found = json.loads((run / "results.json").read_text())
    del found["seconds"], found["training_seconds"]
    return dict(found)


def test_from_a_file_to_predictions(run: Run, model: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, _, err = finetune(run, model, data, output)
    assert status == 0, err
    assert "3 labels, birds, cats, dogs" in err
    assert "no dev data was given: 12 examples of the training data are set aside" in err
    assert sorted(path.name for path in output.iterdir()) == [
        "dev-predictions.jsonl", "features.arrow", "model", "results.json", "run.json", "runs",
    ]  # fmt: skip
    (training,) = (output / "runs").iterdir()
    assert sorted(path.name for path in training.iterdir()) == ["log.jsonl", "result.json", "tensorboard"]
    found = results(output)["splits"]["dev"]
    assert found["metrics"]["accuracy"] == 1
    assert found["classes"] == ["birds", "cats", "dogs"]
    predictions = [json.loads(line) for line in (output / "dev-predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == found["examples"] == 12
    assert all(it["label"] == it["true"] for it in predictions)

    for place in (output, output / "model"):
        status, out, err = run("evaluate", place, "--data", data, "--json", "--device", "cpu")
        assert status == 0, err
        assert json.loads(out)["splits"]["dev"]["examples"] == 108
    status, out, _ = run("evaluate", output, "--data", data, "--device", "cpu")
    assert status == 0
    assert "always birds, the most frequent class, has accuracy 33.33" in " ".join(out.split())

    (tmp_path / "new.txt").write_text("a small red bird ran\nthe dog sang and sat\n")
    (tmp_path / "new.csv").write_text("text\na small red bird ran\nthe dog sang and sat\n")
    for place, texts in ((output, "new.txt"), (output / "model", "new.csv")):
        told = tmp_path / f"{texts}.jsonl"
        assert run("predict", place, tmp_path / texts, "-o", told, "--device", "cpu")[0] == 0
        said = [json.loads(line) for line in told.read_text().splitlines()]
        assert [it["label"] for it in said] == ["birds", "dogs"]
        assert sum(said[0]["scores"].values()) == pytest.approx(1)


def test_the_model_is_transformers_own(run: Run, model: str, data: Path, tmp_path: Path) -> None:
    assert finetune(run, model, data, tmp_path / "run")[0] == 0
    folder = str(tmp_path / "run" / "model")
    stock, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(stock).__module__.startswith("transformers.")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert stock.config.id2label == {0: "birds", 1: "cats", 2: "dogs"}
    assert stock.config.problem_type == "single_label_classification"
    pipeline = transformers.pipeline("text-classification", model=folder, device="cpu", top_k=None)
    ours = fastbert.Classifier.from_pretrained(folder).predict(["the big cat ran"])[0]
    (theirs,) = pipeline(["the big cat ran"])
    assert {it["label"]: it["score"] for it in theirs} == pytest.approx(ours.scores, abs=1e-5)


class Killed(BaseException):
    """As kill -9: nothing catches it."""


def at(function: Callable[..., Any], when: Callable[..., bool], *, after: bool = False) -> Callable[..., Any]:
    def killed(*arguments: Any, **options: Any) -> Any:
        if not after and when(*arguments):
            raise Killed
        result = function(*arguments, **options)
        if after and when(*arguments):
            raise Killed
        return result

    return killed


PLACES: dict[str, tuple[Any, str, Callable[..., bool], bool]] = {
    "in the first epoch": (Evaluate, "on_step_end", lambda _, args, state, control: state.global_step == 7, True),
    "in the second epoch": (Evaluate, "on_step_end", lambda _, args, state, control: state.global_step == 17, True),
    "before a checkpoint has its name": (checkpoints, "publish", lambda _, to: to.name == "checkpoint-24", False),
    "before the model has its name": (checkpoints, "publish", lambda _, to: to.parent.name == "run", False),
    "after the model has its name": (checkpoints, "publish", lambda _, to: to.parent.name == "run", True),
    "before it is said that it is done": (finetuning, "write_json", lambda path, _: path.name == "result.json", False),
    "after that": (finetuning, "write_json", lambda path, _: path.name == "result.json", True),
}


@pytest.fixture(scope="module")
def undisturbed(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    from typer.testing import CliRunner

    from fastbert import cli

    folder = tmp_path_factory.mktemp("undisturbed")
    data = write_rows(folder / "tales.csv")
    words = (
        "finetune",
        "classify",
        "--model",
        model,
        "--data",
        data,
        "--label",
        "animal",
        "-o",
        folder / "run",
        *OPTIONS,
    )
    assert CliRunner().invoke(cli.app, [*map(str, words)], catch_exceptions=False).exit_code == 0
    return folder / "run"


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_ends_as_an_undisturbed_one(
    place: str, run: Run, model: str, data: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, when, after = PLACES[place]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, at(getattr(owner, name), when, after=after))
        with pytest.raises(Killed):
            finetune(run, model, data, tmp_path / "run")
    status, _, err = finetune(run, model, data, tmp_path / "run")
    assert status == 0, err
    ours, theirs = weights(tmp_path / "run"), weights(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert log(tmp_path / "run") == log(undisturbed)
    assert results(tmp_path / "run") == results(undisturbed)
    left = {
        path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if "tensorboard" not in str(path)
    }
    assert left == {path.relative_to(undisturbed) for path in undisturbed.rglob("*") if "tensorboard" not in str(path)}


def test_the_best_of_a_grid_is_kept(run: Run, model: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    status, _, err = finetune(run, model, data, output, "--learning-rate", "1e-7,2e-3", "--seeds", 2)
    assert status == 0, err
    told = {folder.name: json.loads((folder / "result.json").read_text()) for folder in (output / "runs").iterdir()}
    assert sorted(told) == ["lr-0.002-seed-1", "lr-0.002-seed-2", "lr-1e-07-seed-1", "lr-1e-07-seed-2"]
    accuracies = {name: it["metrics"]["accuracy"] for name, it in told.items()}
    best = results(output)["training"]
    assert best.startswith("lr-0.002")
    assert accuracies[best] == max(accuracies.values()) > accuracies["lr-1e-07-seed-1"]
    assert json.loads((output / "model" / "fastbert_task.json").read_text())["training"] == best
    (marked,) = [line for line in err.splitlines() if line.endswith("<- best")]
    assert marked.split()[:2] == ["0.002", best[-1]]
    before = weights(output)
    trained = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/result.json")}
    status, _, err = finetune(run, model, data, output, "--learning-rate", "1e-7,2e-3,1e-8", "--seeds", 2)
    assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in trained} == trained  # only what is new is trained
    assert len(list(output.glob("runs/*/result.json"))) == 6
    assert all(torch.equal(weights(output)[key], before[key]) for key in before)
    assert plot_finetuning.is_finetuning(output)


def test_what_is_refused(run: Run, model: str, data: Path, tmp_path: Path) -> None:
    """Each with one line, and nothing of the run is changed."""
    output = tmp_path / "run"
    assert finetune(run, model, data, output, "--epochs", 1)[0] == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    other = tmp_path / "other.csv"
    shutil.copy(data, other)
    with other.open("a") as file:
        file.write("a cat,cats\n")
    unseen = tmp_path / "unseen.csv"
    unseen.write_text("text,animal\na cat,cats\na mat,mats\n")
    for words, said in (
        ((model, other, output, "--epochs", 1), "is another run: "),
        ((model, data, output, "--epochs", 2), "epochs was 1.0, and is 2.0"),
        ((model, data, tmp_path / "a", "--text", "txt"), "no column 'txt'"),
        ((model, data, tmp_path / "a", "--label", "beast"), "no column 'beast'"),
        ((model, data, tmp_path / "a", "--dev", data), "dev data must be other data"),
        ((model, data, tmp_path / "a", "--dev", unseen), "unseen.csv, line 3: the label 'mats' is none of those"),
        ((model, tmp_path / "none.csv", tmp_path / "a"), "none.csv"),
        ((model, data, tmp_path / "a", "--separator", ";", "--batch-size", -1), "batch_size must be at least 1"),
        ((model, data, tmp_path / "a", "--learning-rate", "1e-3,1e-3"), "a learning rate is given twice"),
        ((model, data, tmp_path / "a", "--dev-share", 1.5), "must be in (0, 1), but is 1.5"),
        ((model, data, tmp_path / "a", "--max-length", 900), "max_length is 900, but the model takes at most 48"),
        ((tmp_path / "none", data, tmp_path / "a"), "none"),
    ):
        status, _, err = finetune(run, str(words[0]), *words[1:])  # type: ignore[arg-type]
        assert status == 1, words
        assert is_one_line(err), err
        assert said in err
    status, _, err = run("finetune", "clasify", "--model", model, "--data", data, "-o", tmp_path / "a")
    assert (status, is_one_line(err)) == (1, True)
    assert "perhaps classify" in err
    assert not (tmp_path / "a").exists()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_what_is_odd_is_counted_and_named(run: Run, model: str, data: Path, tmp_path: Path) -> None:
    with data.open("a") as file:
        file.write('the cat,\n,dogs\n"a ""big"" dog, and a\ttree",dogs\nthe bird,birds,and more\n')
    status, _, err = finetune(run, model, data, tmp_path / "run", "--epochs", 1)
    assert status == 0, err
    assert "1 x no label at 'animal' (left out), as " in err
    assert "1 x an empty text (kept), as " in err
    assert "110 examples" in err or "98 examples" in err  # without the two that are left out
    assert "(left out), as" in err


def test_two_processes_train_and_judge_as_one(model: str, data: Path, tmp_path: Path) -> None:
    """Without dropout: each has half of a step's examples, and of the dev data."""
    logs = []
    for launch in ([], ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]):
        output = tmp_path / f"run-{len(logs)}"
        words = ["finetune", "classify", "--model", model, "--data", data, "--label", "animal", "-o", output, *OPTIONS]
        command = [
            sys.executable,
            "-m",
            *launch,
            "fastbert",
            *words,
            "--dropout",
            0,
            "--epochs",
            1,
            "--accumulation",
            2,
        ]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr
        logs.append(log(output))
    for ours, theirs in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
            assert (key in ours) == (key in theirs)
            if key in ours:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
