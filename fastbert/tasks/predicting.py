"""Which engine runs a tuned model, and what is written of its results."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from fastbert.errors import InputError
from fastbert.inference.classifier import Label
from fastbert.tasks.sequences import MULTI, REGRESSION, THRESHOLD
from fastbert.tasks.tags import has_scheme
from fastbert.tasks.task import labels_of

Record = Callable[[Any], Mapping[str, Any]]


def predictor(name: str, config: Any, about: Mapping[str, Any] | None = None) -> tuple[str, Record, dict[str, Any]]:
    """The engine's name, from a result to what is written, and the engine's options.

    Args:
        about: what a tuned model's folder says of its task.

    Raises:
        InputError: if the model has no head that fastbert has an engine for.
    """
    heads: dict[str, tuple[str, Record]] = {
        "ForSequenceClassification": ("Classifier", _of_label(config.problem_type)),
        "ForTokenClassification": ("Tagger", lambda entities: {"entities": [asdict(entity) for entity in entities]}),
        "ForQuestionAnswering": ("Answerer", asdict),
    }
    architectures = config.architectures or ()
    for architecture in architectures:
        for head, (engine, record) in heads.items():
            if architecture.endswith(head):
                return engine, record, _of_words(config, about) if engine == "Tagger" and about is not None else {}
    raise InputError(f"{name} is {' and '.join(architectures) or 'a bare encoder'}: it predicts nothing of a task")


def _of_words(config: Any, about: Mapping[str, Any]) -> dict[str, Any]:
    """As it was tuned: a word's tag is that of its first token, and goes on with the one before if it says so."""
    return {
        "strategy": "first",
        "given_words": True,
        "join": has_scheme(labels_of(config)),
        "stride": about["doc_stride"],
    }


def _of_label(problem_type: str | None) -> Record:
    if problem_type == REGRESSION:
        return lambda label: {"score": label.score}
    if problem_type == MULTI:
        return lambda label: {"labels": _above(label), "scores": label.scores}
    return asdict


def _above(label: Label) -> list[str]:
    return [name for name, score in label.scores.items() if score >= THRESHOLD]
