"""What is written of a model's scores: figures, classes, predictions."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbert.errors import InputError
from fastbert.tasks.examples import Examples
from fastbert.tasks.scores import Scores
from fastbert.tasks.task import Task


def figures_of(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Of all dev splits, by the names that they have in a log; the first one's without a prefix."""
    found: dict[str, float] = {}
    for i, (name, score) in enumerate(scores.items()):
        prefix = "" if i == 0 else f"{name}_"
        found |= {f"{prefix}{key}": value for key, value in score.metrics.items()}
        if score.loss is not None:
            found[f"{prefix}loss"] = score.loss
    return found


def described(scores: Mapping[str, Scores], about: Mapping[str, Any]) -> dict[str, Any]:
    """What is written of scores: figures with where they are with 95 % confidence, classes, and confusions."""
    return {
        **about,
        "splits": {
            name: {
                "examples": score.count,
                "metrics": score.metrics,
                "intervals": score.intervals(),
                "loss": score.loss,
                "per_class": list(score.per_class),
                "classes": list(score.classes),
                "confusion": None if score.confusion is None else score.confusion.tolist(),
                "decided": dict(score.decided),
            }
            for name, score in scores.items()
        },
    }


def write_predictions(path: Path, task: Task, splits: Mapping[str, Examples], scores: Mapping[str, Scores]) -> None:
    """A JSON object for each example, with its id, what is true, and what the model says; whole or not at all.

    Beside it are the files that the task's own evaluation reads, if there is one.
    """
    lines = []
    for name, score in scores.items():
        examples = splits[name]
        split = {} if len(scores) == 1 else {"split": name}
        for id, label, prediction in zip(examples.ids, examples.labels, score.predictions, strict=True):
            lines.append(json.dumps({"id": id, **split, "true": label, **prediction}, ensure_ascii=False) + "\n")
        for ending, content in task.official(examples, score).items():
            write_whole(path.with_name(path.stem + (f"-{name}" if split else "") + ending), content)
    write_whole(path, "".join(lines))


def write_whole(path: Path, text: str) -> None:
    """Raises: InputError, if it cannot be written; what was there stays then."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def table(results: Sequence[Mapping[str, Any]], chosen: int) -> str:
    """All trainings, a line each. Args: chosen: which is the best."""
    names = list(results[0]["metrics"])
    rows = [["learning rate", "seed", *names]]
    rows += [
        [f"{r['learning_rate']:g}", str(r["seed"]), *(f"{r['metrics'][name]:.4f}" for name in names)] for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"  {line}{'  <- best' if i == chosen + 1 else ''}" for i, line in enumerate(lines))
