"""Options of a pretraining run that would train nothing, or cannot be, are refused before anything is written."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")
pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

from fastbert import cli
from fastbert.data.pretraining import Sampling
from fastbert.errors import InputError
from fastbert.training.pretraining import pretrain
from fastbert.training.recipe import Recipe, load_config
from tests.runs import CONFIG

NAN, INF = math.nan, math.inf


def _changed(**changes: Any) -> Recipe:
    sampling = {key: changes.pop(key) for key in list(changes) if hasattr(Sampling(), key)}
    return replace(Recipe(sampling=Sampling(**sampling)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"mask_rate": rate}, r"mask rate must be in \(0, 1\], but is") for rate in (0.0, -0.1, 1.1, NAN)),
        *(({"learning_rate": rate}, "learning rate must be positive and finite") for rate in (0.0, -1e-4, NAN, INF)),
        *(({"weight_decay": rate}, "weight decay must be at least 0 and finite") for rate in (-0.1, NAN, INF)),
        *(({"clip": norm}, "clip must be at least 0, which is for none") for norm in (-1.0, NAN)),
        *(({"dropout": share}, r"dropout must be in \[0, 1\)") for share in (-0.1, 1.0, NAN)),
        *(({name: 1.0}, rf"{name} must be in \[0, 1\)") for name in ("beta1", "beta2")),
        *(({"epsilon": value}, "epsilon must be at least 0") for value in (-1e-6, NAN, INF)),
        *(({"warmup": steps, "steps": 9}, r"warm-up must be in \[0, 9\]") for steps in (-1, 10)),
        ({"warmup": 1, "steps": 1}, "a run of 1 step with a warm-up of 1 trains nothing"),
        *(
            ({name: number}, f"{name} must be at least 1, but is {number}")
            for name in ("steps", "accumulation", "save_every", "keep", "log_every")
            for number in (0, -1)
        ),
        *(({"phases": ((n, 1.0),)}, rf"max_length must be in \[5, 65535\], but is {n}") for n in (-1, 0, 2, 4, 65536)),
        *(({"phases": ((32, 1.0), (64, share))}, "share of the steps that is above 0") for share in (0.0, -0.5, NAN)),
        *(({"phases": phases}, "must add up to 1") for phases in ((), ((32, INF),), ((32, 0.5), (64, 0.6)))),
        *(({"seed": seed}, r"seed must be in \[0, 2\^63\)") for seed in (-1, 1 << 63)),
        ({"non_finite_loss": "ignore"}, "non_finite_loss must be one of stop, continue, but is ignore"),
        ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, but is fp16"),
    ],
    ids=str,
)
def test_what_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        pretrain(_changed(**changes), tmp_path / "none", tmp_path / "run", device=torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask_rate": 1.0},
        {"mask_rate": 0.0, "objective": "left-to-right"},  # where nothing is masked
        {"weight_decay": 0.0, "clip": 0.0, "dropout": 0.0, "beta1": 0.0, "epsilon": 0.0},
        {"clip": INF},
        {"steps": 1, "warmup": 0},
        {"steps": 2, "warmup": 2},
        {"phases": ((5, 0.5), (65535, 0.5))},
        {"phases": ((32, 0.5), (32, 0.5))},
        {"seed": (1 << 63) - 1},
    ],
    ids=str,
)
def test_what_is_not(changes: dict[str, Any]) -> None:
    _changed(**changes).check()


@pytest.mark.parametrize(
    ("key", "value", "bound"),
    [
        *((key, 0, "at least 1") for key in CONFIG),
        ("vocab_size", 0, "at least 1"),
        ("type_vocab_size", -1, "at least 1"),
        *(("hidden_dropout_prob", value, r"in \[0, 1\)") for value in (-0.1, 1.0, NAN)),
        ("attention_probs_dropout_prob", 1.5, r"in \[0, 1\)"),
        *(("layer_norm_eps", value, "at least 0 and finite") for value in (-1e-12, NAN, INF)),
    ],
    ids=str,
)
def test_configurations(key: str, value: float, bound: str, tmp_path: Path) -> None:
    store: Any = SimpleNamespace(vocab_size=600, path=tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert load_config(str(path), store).hidden_size == CONFIG["hidden_size"]
    path.write_text(json.dumps({**CONFIG, key: value}))
    with pytest.raises(InputError, match=rf"{path}: {key} must be {bound}, but is {value}"):
        load_config(str(path), store)


@pytest.mark.parametrize(
    ("option", "value", "status", "message"),
    [
        ("--mask-rate", "0", 1, "the mask rate must be in (0, 1], but is 0.0"),
        ("--mask-rate", "nan", 1, "the mask rate must be in (0, 1], but is nan"),
        *(("--mask-rates", text, 1, "three shares that add up to 1") for text in ("nan,0,1", "1.1,-0.1,0", "1,1,-1")),
        ("--max-predictions", "0", 2, "--max-predictions"),
        ("--max-predictions", "-1", 2, "--max-predictions"),
        ("--steps", "0", 2, "--steps"),
        ("--batch-size", "0", 2, "--batch-size"),
        ("--batch-tokens", "0", 2, "--batch-tokens"),
        ("--accumulation", "0", 2, "--accumulation"),
        ("--learning-rate", "0", 1, "the learning rate must be positive"),
        ("--learning-rate", "-1e-4", 1, "the learning rate must be positive"),
        ("--learning-rate", "nan", 1, "the learning rate must be positive"),
        ("--warmup", "101", 1, "the warm-up must be in [0, 100]"),
        ("--weight-decay", "nan", 2, "--weight-decay"),
        ("--weight-decay", "-1", 2, "--weight-decay"),
        ("--clip", "nan", 2, "--clip"),
        ("--dropout", "1", 1, "dropout must be in [0, 1)"),
        ("--phases", "4:1", 1, "max_length must be in [5, 65535], but is 4"),
        ("--phases", "32:1,64:0", 1, "share of the steps that is above 0"),
        ("--phases", "32:nan", 1, "share of the steps that is above 0"),
        ("--non-finite-loss", "ignore", 2, "--non-finite-loss"),
        ("--device", "gpu", 1, "--device must be cpu, cuda or cuda:N, but is 'gpu'"),
    ],
)
def test_the_command(
    option: str,
    value: str,
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command = ["fastbert", "pretrain", "--data", str(tmp_path / "none"), "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*command, "--steps", "100", option, value])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == status
    said = capfd.readouterr().err
    assert message in said
    assert status == 2 or (said.count("\n") == 1 and said.startswith("fastbert: "))
    assert not list(tmp_path.iterdir())
