"""Which engine runs a tuned model, and what is written of its results."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fastbert.errors import InputError
from fastbert.inference.classifier import Label
from fastbert.inference.spans import Answer
from fastbert.inference.tagger import Entity
from fastbert.tasks.sequences import MULTI, REGRESSION, THRESHOLD

Record = Callable[[Any], Mapping[str, Any]]


def predictor(name: str, config: Any) -> tuple[str, Record]:
    """The engine's name, and from a result to what is written.

    Raises:
        InputError: if the model has no head that fastbert has an engine for.
    """
    heads: dict[str, tuple[str, Record]] = {
        "ForSequenceClassification": ("Classifier", _of_label(config.problem_type)),
        "ForTokenClassification": ("Tagger", of_entities),
        "ForQuestionAnswering": ("Answerer", of_answer),
        "ForMultipleChoice": ("Chooser", asdict),
    }
    architectures = config.architectures or ()
    for architecture in architectures:
        for head, (engine, record) in heads.items():
            if architecture.endswith(head):
                return engine, record
    raise InputError(f"{name} is {' and '.join(architectures) or 'a bare encoder'}: it predicts nothing of a task")


def of_answer(answer: Answer) -> dict[str, Any]:
    """As `fastbert answer` has it."""
    found = {"answer": answer.text, "start": answer.start, "end": answer.end, "score": answer.score}
    return found if answer.probability is None else {**found, "probability": answer.probability}


def of_entities(entities: Sequence[Entity]) -> dict[str, Any]:
    """As `fastbert tag` has them."""
    return {"entities": [asdict(entity) for entity in entities]}


def _of_label(problem_type: str | None) -> Record:
    if problem_type == REGRESSION:
        return lambda label: {"score": label.score}
    if problem_type == MULTI:
        return lambda label: {"labels": _above(label), "scores": label.scores}
    return asdict


def _above(label: Label) -> list[str]:
    return [name for name, score in label.scores.items() if score >= THRESHOLD]
