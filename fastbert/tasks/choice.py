"""Questions with choices: SWAG, HellaSwag, and files of the user's own.

A model reads each choice with the context, as a pair; the loss is a softmax over the choices of a question. Source:
https://arxiv.org/abs/1810.04805, section 4.4. Data: https://arxiv.org/abs/1808.05326, https://arxiv.org/abs/1905.07830.

Dimension key:  I questions   C choices   S choices of all questions
"""

import json
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoModelForMultipleChoice

from fastbert.data.datasets import PREFIX, Dataset, is_saved
from fastbert.data.documents import Problems
from fastbert.data.records import Records
from fastbert.errors import InputError
from fastbert.inference.chooser import chosen, logits_of
from fastbert.inference.inputs import as_text
from fastbert.inference.tokens import Tokens
from fastbert.tasks.examples import EMPTY, Examples, is_missing, name_of, read_table
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.scores import Scores
from fastbert.tasks.sequences import encode
from fastbert.tasks.task import DEV, TEST, TRAIN, Given, Judge, Recipe, Task

_UNLABELLED = (-1, "-1")  # in `datasets`
_INDEX = "an index from 0"
_SPLITS = {TRAIN: "train", DEV: "validation", TEST: "test"}  # there


@dataclass(frozen=True)
class Layout:
    """Columns.

    Attributes:
        choices: one with a list, or one each.
        label: None where the first choice is the right one.
        begins: what all choices begin with.
    """

    context: str
    choices: tuple[str, ...]
    label: str | None
    begins: str | None = None

    def columns(self, *, labelled: bool) -> dict[str, str]:
        """By the options that name them."""
        found = {"--text": self.context, **{f"--choices {name}": name for name in self.choices}}
        found |= {} if self.begins is None else {"--text of the choices": self.begins}
        return found | ({"--label": self.label} if labelled and self.label is not None else {})


# SWAG's long files have the right ending apart from those that are wrong, of which some have four.
LAYOUTS = {
    "swag": (
        Layout("sent1", ("ending0", "ending1", "ending2", "ending3"), "label", "sent2"),
        Layout("sent1", ("gold-ending", "distractor-0", "distractor-1", "distractor-2"), None, "sent2"),
    ),
    "hellaswag": (Layout("ctx_a", ("endings",), "label", "ctx_b"),),
}
_FILES = {
    "swag": {TRAIN: "train.csv", DEV: "val.csv", TEST: "test.csv"},
    "hellaswag": {TRAIN: "hellaswag_train.jsonl", DEV: "hellaswag_val.jsonl", TEST: "hellaswag_test.jsonl"},
}
_CONFIGS = {"swag": "regular"}  # of `datasets`


class ChoiceTask(Task):
    """The choice that goes with a context, on the user's own files.

    All questions of the training data have the same number of choices, for the head's logits are a rectangle. What is
    evaluated and predicted may have any. A label is an index from 0, a letter, or the text of the right choice: in a
    file all of them are one of these.
    """

    kind = "choice"
    auto = AutoModelForMultipleChoice
    takes = frozenset({"text", "choices", "label"})
    main = "accuracy"

    def __init__(self, name: str, given: Given) -> None:
        super().__init__(name, given)
        self.recipe = Recipe(batch_size=16, max_length=None)
        self._layouts = self._known_layouts()
        self.columns = self._layouts[0].columns(labelled=False)

    def _known_layouts(self) -> tuple[Layout, ...]:
        given = self.given
        return (Layout(given.text or "text", given.choices or ("choices",), given.label or "label"),)

    def texts(self, record: Mapping[str, Any], place: str, problems: Problems) -> tuple[Any, ...]:
        """A context and its choices; what has none has an empty one, and is a problem."""
        context, choices = self._question(self._layouts[0], record, place, problems)
        if choices is None:
            problems.add(f"no list of choices at {self._layouts[0].choices[0]!r} (taken as an empty one)", place)
        return context, choices or ("",)

    def read(self, split: str) -> dict[str, Examples]:
        source = self._source(split)
        if source is None:
            return {}
        labelled = split != TEST
        try:
            layout = self._layout(source, labelled)
        except InputError as error:
            if "there is no split" in str(error) and split != TRAIN:
                return {}
            raise
        examples = read_table(source, layout.columns(labelled=labelled), self._reader(layout, labelled))
        examples.labels[:] = self._indices(examples)
        return {split: examples}

    def _source(self, split: str) -> str | None:
        """Of the split: its own file, or its part of a folder or dataset that has several."""
        own = self.given.path(split)
        whole = own or self.given.train or ""
        if whole.startswith(PREFIX) or is_saved(Path(whole)):
            dataset = Dataset.parse(whole if whole.startswith(PREFIX) else PREFIX + whole)
            if dataset.split is None and not _is_alone(dataset.place):
                is_folder = Path(dataset.place).is_dir()
                config = dataset.config or (None if is_folder else _CONFIGS.get(self.name))
                revision = "" if dataset.revision is None else f"@{dataset.revision}"
                parts = (dataset.place + revision, config, _SPLITS[split])
                return PREFIX + ":".join(part for part in parts if part is not None)
            whole = PREFIX + whole.removeprefix(PREFIX)
        elif self.name in _FILES and whole and Path(whole).is_dir():
            path = Path(whole) / _FILES[self.name][split]
            if not path.exists() and split == TRAIN:
                raise InputError(f"{whole} has no {path.name}")
            return str(path) if path.exists() else None
        return None if own is None else whole

    def _layout(self, source: str, labelled: bool) -> Layout:
        """The first that the file has; an error is that of the first."""
        reasons = []
        for layout in self._layouts:
            try:
                next(iter(Records(source, layout.columns(labelled=labelled))))
                return layout
            except InputError as error:
                if "has no column" not in str(error):
                    raise
                reasons.append(error)
        raise reasons[0]

    def _reader(
        self, layout: Layout, labelled: bool
    ) -> Callable[[Mapping[str, Any], str, Problems], tuple[Any, Any] | None]:
        def read(record: Mapping[str, Any], place: str, problems: Problems) -> tuple[Any, Any] | None:
            context, choices = self._question(layout, record, place, problems)
            if choices is None:
                raise InputError(
                    f"{place}: {layout.choices[0]!r} must be a list of choices, but is"
                    f" {record.get(layout.choices[0])!r}: --choices takes several columns, too, with commas between"
                )
            if len(choices) < 2:
                raise InputError(f"{place}: a question needs two choices at least, but has {len(choices)}")
            label = None if layout.label is None else record.get(layout.label)
            if is_missing(label) or (self.name in LAYOUTS and label in _UNLABELLED):
                label = None
            if layout.label is None:
                choices, label = _turned(context, choices)
            elif labelled and label is None:
                problems.add(f"no label at {layout.label!r} (left out)", place)
                return None
            if not all(text.strip() for text in (context, *choices)):
                problems.add(EMPTY, place)
            return (context, choices), label

        return read

    def _question(
        self, layout: Layout, record: Mapping[str, Any], place: str, problems: Problems
    ) -> tuple[str, tuple[str, ...] | None]:
        """A context, and its choices, None where there is no list of them."""
        context = as_text(record, layout.context, place, problems)
        names = layout.choices
        values: Any = [record.get(name) for name in names] if len(names) > 1 else _list(record.get(names[0]))
        if values is None:
            return context, None
        choices = [as_text({"": _text(value)}, "", place, problems) for value in values]
        if layout.begins is not None:
            begins = as_text(record, layout.begins, place, problems)
            choices = [f"{begins} {choice}".strip() for choice in choices]
        return context, tuple(choices)

    def _indices(self, examples: Examples) -> list[int | None]:
        """Labels as indices, as the file has them: all read in the same way.

        Raises:
            InputError: naming a label that is no choice, or might be two of them.
        """
        labelled = [i for i, label in enumerate(examples.labels) if label is not None]
        readings = {
            words: {i: read(name_of(examples.labels[i]), examples.inputs[i][1]) for i in labelled}
            for words, read in self._readings().items()
        }
        unread = {words: [i for i, index in found.items() if index is None] for words, found in readings.items()}
        words = min(unread, key=lambda words: len(unread[words]))
        if unread[words]:
            i = unread[words][0]
            count = len(examples.inputs[i][1])
            raise InputError(
                f"{examples.places[i]}: the label {examples.labels[i]!r} is none of the {count} choices: {words} is"
                f" wanted{', as elsewhere in the file' if len(unread[words]) < len(labelled) else ''}"
            )
        for other, found in readings.items():
            differ = [] if unread[other] else [i for i in labelled if found[i] != readings[words][i]]
            if differ:
                raise InputError(
                    f"{examples.places[differ[0]]}: the label {examples.labels[differ[0]]!r} may be {words} or {other},"
                    " which are different choices"
                )
        return [readings[words].get(i) for i in range(len(examples))]

    def _readings(self) -> dict[str, Callable[[str, Sequence[str]], int | None]]:
        return {_INDEX: _by_index, "a letter": _by_letter, "the text of one": _by_text}

    def head_options(self, train: Examples) -> dict[str, Any]:
        count = self._choices_of(train)
        names = [f"choice {i}" for i in range(count)]
        return {
            "num_labels": count,
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "problem_type": None,
        }

    def _choices_of(self, train: Examples) -> int:
        """C. Raises: InputError, naming a question that has others."""
        counts = [len(choices) for _, choices in train.inputs]
        usual = max(set(counts), key=counts.count)
        for count, place in zip(counts, train.places, strict=True):
            if count != usual:
                raise InputError(
                    f"{place}: a question of {count} choices, where others have {usual}: to train, all must have the"
                    " same number; evaluate and predict take any"
                )
        return usual

    def features(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Features:
        labels = {"labels": np.asarray(examples.labels, np.int64)}
        ones = np.ones(len(examples), np.int64)
        return Features(_encoded(examples, tokenizing), labels, ones, group=self._choices_of(examples))

    def judge(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Judge:
        def score(logits_S1: npt.NDArray[np.float32]) -> Scores:
            return _score(examples, logits_S1[:, 0])

        return Judge(_encoded(examples, tokenizing), 1, lambda model, batch: logits_of(model)(batch), score)


class PublishedChoiceTask(ChoiceTask):
    """SWAG or HellaSwag, from their files, a folder with all of them, or `datasets`."""

    takes = frozenset()

    def __init__(self, name: str, given: Given) -> None:
        super().__init__(name, given)
        if name == "swag":
            self.recipe = replace(self.recipe, max_length=128)

    def _known_layouts(self) -> tuple[Layout, ...]:
        return LAYOUTS[self.name]

    def _readings(self) -> dict[str, Callable[[str, Sequence[str]], int | None]]:
        return {_INDEX: _by_index}


def _is_alone(place: str) -> bool:
    """Whether a dataset was saved that has no splits."""
    return is_saved(Path(place)) and not (Path(place) / "dataset_dict.json").is_file()


def _encoded(examples: Examples, tokenizing: Tokenizing) -> Tokens:
    """Of all choices."""
    return encode([(context, choice) for context, choices in examples.inputs for choice in choices], tokenizing)


def _score(examples: Examples, logits_S: npt.NDArray[np.float32]) -> Scores:
    found = chosen(logits_S, [choices for _, choices in examples.inputs])
    predictions = [asdict(choice) for choice in found]
    if not examples.labelled:
        return Scores(lambda rows: {}, len(examples), "question", predictions=predictions)
    right_I = np.asarray([choice.index == label for choice, label in zip(found, examples.labels, strict=True)])
    shares_I = np.asarray([choice.scores[label] for choice, label in zip(found, examples.labels, strict=True)])
    with np.errstate(divide="ignore"):
        loss = float(-np.log(shares_I).mean())

    def measure(rows: npt.NDArray[np.int64]) -> dict[str, float]:
        return {"accuracy": float(right_I[rows].mean())}

    return Scores(measure, len(examples), "question", predictions=predictions, loss=loss)


def _turned(context: str, choices: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """The first, which is the right one, put where the text itself says: else a model that prefers none is right."""
    right, *wrong = choices
    index = zlib.crc32(f"{context} {right}".encode()) % len(choices)
    return (*wrong[:index], right, *wrong[index:]), index


def _list(value: Any) -> list[Any] | None:
    """A list, as JSON too; None for what is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, list | tuple) else None


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


def _by_index(label: str, choices: Sequence[str]) -> int | None:
    return int(label) if label.isdecimal() and int(label) < len(choices) else None


def _by_letter(label: str, choices: Sequence[str]) -> int | None:
    index = string.ascii_uppercase.find(label.upper()) if len(label) == 1 else -1
    return index if 0 <= index < len(choices) else None


def _by_text(label: str, choices: Sequence[str]) -> int | None:
    stripped = [choice.strip() for choice in choices]
    return stripped.index(label) if label in stripped else None
