"""What every task says of itself: where its examples are, what its model's head is, how it is judged.

A task is one kind of head: sequences.py, choice.py, tagging.py, squad.py. What a run of it does is in
fastbert/training/finetuning.py.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastbert.data.documents import Problems
from fastbert.errors import InputError
from fastbert.inference.engine import Batch
from fastbert.inference.inputs import as_text
from fastbert.inference.tokens import Tokens
from fastbert.tasks.examples import Examples
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.scores import Scores

TRAIN, DEV, TEST = "train", "dev", "test"


@dataclass(frozen=True)
class Given:
    """What the user says of a task's data; None where nothing is said.

    Attributes:
        train, dev, test: files, folders, or dataset:NAME:SPLIT. Tasks whose data is one folder have it in `train`.
        text, pair, label, question, passage: columns.
        choices: the column with a list of choices, or a column for each.
        separator: between the labels of a cell, where a text may have several and the file has no lists.
        labels: the classes, in the order that the model is to have them.
    """

    train: str | None = None
    dev: str | None = None
    test: str | None = None
    text: str | None = None
    pair: str | None = None
    choices: tuple[str, ...] | None = None
    label: str | None = None
    separator: str | None = None
    labels: tuple[str, ...] | None = None
    question: str | None = None
    passage: str | None = None

    def path(self, split: str) -> str | None:
        """Of TRAIN, DEV or TEST."""
        return {TRAIN: self.train, DEV: self.dev, TEST: self.test}[split]

    @property
    def options(self) -> dict[str, Any]:
        """What is said besides where the data is."""
        said = asdict(self)
        return {name: value for name, value in said.items() if name not in (TRAIN, DEV, TEST) and value is not None}


@dataclass(frozen=True)
class Recipe:
    """What a task is trained with where nothing else is said. Source: https://arxiv.org/abs/1810.04805, section 4.

    Attributes:
        batch_size: items of a step.
        max_length: tokens of a sequence at most; None for what the model takes.
    """

    epochs: float = 3
    batch_size: int = 32
    learning_rate: float = 2e-5
    max_length: int | None = 128


@dataclass(frozen=True, eq=False)
class Judge:
    """A split, tokenised, that models are judged on.

    Attributes:
        tokens: of all its sequences.
        width: what `call` gives for each sequence, or `per_token` for each token.
        call: from a model and a batch, (B, width), or (1, T, width) without the first dimension.
        score: from all that, float32, in the order of `tokens`.
    """

    tokens: Tokens
    width: int
    call: Callable[[Any, Batch], Tensor]
    score: Callable[[npt.NDArray[np.float32]], Scores]
    per_token: bool = False


class Task(abc.ABC):
    """A task with its data.

    Args:
        name: as `fastbert finetune` has it.
        given: where its data is, and what is in which column.

    Attributes:
        kind: the head: "sequence", "choice", "token" or "span".
        auto: transformers' class that loads models with that head.
        takes: options of `Given` that it has, besides where the data is.
        recipe: what it is trained with.
        main: the figure that models are chosen by; the more, the better.
        columns: what `predict` reads, by the options that name it; empty where files have a form of their own.
        decided: `Scores.decided` of the dev data, of a model that was tuned; empty while it is.

    Raises:
        InputError: if an option is not for this task.
    """

    kind: ClassVar[str]
    auto: ClassVar[Any]
    takes: ClassVar[frozenset[str]] = frozenset()
    recipe: Recipe
    main: str
    columns: Mapping[str, str]

    def __init__(self, name: str, given: Given) -> None:
        self.name, self.given = name, given
        self.decided: Mapping[str, Any] = {}
        if foreign := sorted(set(given.options) - self.takes):
            has = f"only {' and '.join(f'--{option}' for option in sorted(self.takes))}" if self.takes else "none"
            raise InputError(f"--{foreign[0]} is no option of {name}, which has {has}")

    @abc.abstractmethod
    def read(self, split: str) -> dict[str, Examples]:
        """The examples of TRAIN, DEV or TEST, by name; MNLI has two of DEV. Empty where there is no such split.

        Raises:
            InputError: if they cannot be read, or a column is missing.
        """

    def unit(self, item: Any) -> Any:
        """What of an example's input is never in the training data and in what is set aside of it."""
        return item

    def texts(self, record: Mapping[str, Any], place: str, problems: Problems) -> tuple[Any, ...]:
        """What an engine takes of a record: the texts at `columns`. What is no text is empty, and a problem."""
        return tuple(as_text(record, key, place, problems) for key in self.columns.values())

    @abc.abstractmethod
    def head_options(self, train: Examples) -> dict[str, Any]:
        """What the model's configuration says of the head: num_labels, id2label, label2id, problem_type.

        Raises:
            InputError: if there is nothing to learn, or a label cannot be.
        """

    def tokenizer(self, loaded: Any) -> Any:
        """A checkpoint's tokenizer as the task needs it, and as it is saved with the model."""
        return loaded

    @abc.abstractmethod
    def features(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Features:
        """What to train on.

        Raises:
            InputError: naming the place of a label that the model does not have.
        """

    @abc.abstractmethod
    def judge(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Judge:
        """What models are judged on; examples without labels have predictions alone.

        Raises:
            InputError: naming the place of a label that the model does not have.
        """

    def saved(self) -> dict[str, Any]:
        """What a tuned model's folder says of the task, for `registry.load`: JSON."""
        return {"task": self.name, "options": self.given.options}

    def engine_options(self, about: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """Options of the engine, with which it predicts as the model was judged.

        Args:
            about: what the tuned model's folder says: max_length, doc_stride.
        """
        return {}

    def official(self, examples: Examples, scores: Scores) -> dict[str, str]:
        """Files that the task's own evaluation reads, by what their names end with."""
        return {}

    def write_test(self, examples: Examples, scores: Scores) -> tuple[str, str]:
        """The name and the content of the file that is submitted to the task's own evaluation.

        Raises:
            InputError: if it has none.
        """
        raise InputError(f"{self.name} has no evaluation that predictions are submitted to")


def columns_of(text: str | None) -> tuple[str, ...] | None:
    """An option's columns, with commas between."""
    return None if text is None else tuple(name.strip() for name in text.split(","))


def labels_of(config: Any) -> list[str]:
    """The names of a model's classes, by their index."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def head_of(labels: list[str], problem_type: str) -> dict[str, Any]:
    """`Task.head_options` for these classes."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": problem_type,
    }
