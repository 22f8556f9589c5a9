"""Folders of fine-tuning runs that nobody trained, and tiny tables to train on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_finetuning(
    folder: Path,
    *,
    classes: Sequence[str] = ("bad", "good"),
    rates: Sequence[float] = (2e-5,),
    seeds: int = 1,
    steps: int = 120,
    numbers: int = 0,
    done: bool = True,
) -> Path:
    """A run's folder as `fastbert finetune` leaves it.

    Args:
        numbers: predictions of a regression; the run has no classes then.
        done: whether its best model is there.
    """
    main = "pearson" if numbers else "accuracy"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"fixed": {}, "kind": "finetuning", "main": main}))
    trainings = [(rate, seed) for rate in rates for seed in range(1, seeds + 1)]
    for i, (rate, seed) in enumerate(trainings):
        own = folder / "runs" / f"lr-{rate:g}-seed-{seed}"
        own.mkdir(parents=True)
        records: list[dict[str, Any]] = []
        for step in range(2, steps + 1, 2):
            loss = 0.7 * math.exp(-2 * step / steps) + 0.1 * (step // 2 % 2) + 0.01 * i
            records.append({"step": step, "loss": loss, "grad_norm": 1.0, "learning_rate": rate * (1 - step / steps)})
            if step % (steps // 3) == 0:
                value = 0.5 + 0.4 * step / steps - 0.01 * i
                dev = {main: value, "f1_macro": value - 0.1, "f1_micro": value, "loss": loss + 0.1}
                records.append({"step": step, "time": 1.0, **{f"eval_{name}": v for name, v in dev.items()}})
        (own / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done:
        rate, seed = trainings[0]
        split: dict[str, Any] = {"examples": 100, "metrics": {main: 0.9}, "per_class": [], "classes": []}
        if not numbers:
            draw = np.random.default_rng(0)
            confusion = draw.integers(0, 9, (len(classes), len(classes))) + 30 * np.eye(len(classes), dtype=int)
            split["confusion"], split["classes"] = confusion.tolist(), list(classes)
            split["per_class"] = [
                {"class": name, "precision": 0.8, "recall": 0.9, "f1": 0.85, "count": int(confusion[j].sum())}
                for j, name in enumerate(classes)
            ]
        about = {"training": f"lr-{rate:g}-seed-{seed}", "learning_rate": rate, "seed": seed, "splits": {"dev": split}}
        (folder / "results.json").write_text(json.dumps(about))
        true = np.linspace(0, 5, numbers)
        said = true + np.sin(7 * true)
        pairs = zip(true.tolist(), said.tolist(), strict=True)
        lines = [json.dumps({"id": i, "true": a, "score": b}) + "\n" for i, (a, b) in enumerate(pairs)]
        (folder / "dev-predictions.jsonl").write_text("".join(lines))
    return folder
