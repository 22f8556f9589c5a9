"""Words to tags: CoNLL-2003's entities, and any task with a tag a word, on the user's own files.

Dimension key:  T tokens   C classes   N words of all sentences
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification

from fastbert.data.datasets import PREFIX, Dataset, is_saved
from fastbert.data.documents import Problems
from fastbert.data.records import Records
from fastbert.data.sources import File
from fastbert.errors import InputError, require
from fastbert.inference.engine import Batch
from fastbert.inference.inputs import as_unicode
from fastbert.tasks.examples import Examples, read_table
from fastbert.tasks.features import Features, Tokenizing
from fastbert.tasks.scores import Scores
from fastbert.tasks.tagging import scores as tag_scores
from fastbert.tasks.tagging import words
from fastbert.tasks.tagging.columns import DOCUMENT, ColumnFile
from fastbert.tasks.tagging.schemes import IOB2, OUTSIDE, has_scheme, is_tag, is_valid, scheme_of, spans, written
from fastbert.tasks.task import DEV, TEST, TRAIN, Given, Judge, Recipe, Task, head_of, labels_of

TASKS = ("ner", "tag")
_FILES = {
    TRAIN: ("eng.train", "train.txt"),
    DEV: ("eng.testa", "valid.txt", "dev.txt"),
    TEST: ("eng.testb", "test.txt"),
}
_TABLES = ("jsonl", "parquet", "csv")
_WORDS = ("words", "tokens")  # what the column is called
_TAGS = "tags"
_UNLABELLED = -100


class TaggingTask(Task):
    """A tag for each word: "ner", whose tags say where entities are, or "tag", of any kind.

    Its data is CoNLL-2003's folder; a file of columns, with the words in the first and the tags in the last; or JSON
    lines, Parquet, CSV or a dataset, with lists of words and tags, or blanks between them.

    Tags of a scheme (see tags.py) are IOB2 for the model, whatever the file has.
    """

    kind = "token"
    auto = AutoModelForTokenClassification
    takes = frozenset({"text", "label", "labels"})

    def __init__(self, name: str, given: Given) -> None:
        super().__init__(name, given)
        self.recipe = Recipe(learning_rate=5e-5, max_length=None)
        self.main = "f1"
        self.columns = {"--text": given.text or "text"}
        self._schemes: dict[str, str | None] = {}  # by the file's name

    def read(self, split: str) -> dict[str, Examples]:
        path = self._path(split)
        if path is None:
            return {}
        examples = self._table(path, split) if _is_table(path) else self._column_file(path, split)
        self._to_iob2(examples)
        return {split: examples}

    def _path(self, split: str) -> str | None:
        given = self.given.path(split)
        folder = given or self.given.train
        if folder is None or not Path(folder).is_dir():
            return given
        if is_saved(Path(folder)):
            return None if given is None else f"{PREFIX}{folder}"
        for name in _FILES[split]:
            if (Path(folder) / name).is_file():
                return str(Path(folder) / name)
        if split == TEST or given is None:
            return None
        raise InputError(f"{folder} has no {' or '.join(_FILES[split])}")

    def _column_file(self, path: str, split: str) -> Examples:
        examples = Examples(path)
        for sentence, tags, place in self._columns_of(path).sentences(examples.problems):
            if tags is None and split != TEST:
                raise InputError(f"{place}: there are words, but no column with their tags")
            examples.add(sentence, tags, place)
        return examples

    def _columns_of(self, path: str) -> ColumnFile:
        return ColumnFile(Path(path), self.given.text, self.given.label)

    def _table(self, path: str, split: str) -> Examples:
        key, label = self.given.text or _words_column(path), self.given.label or _TAGS
        self.given = replace(self.given, text=key)  # so that the model's folder says it
        self.columns = {"--text": key}
        columns = {"--text": key, **({} if split == TEST else {"--label": label})}
        names = Dataset.parse(path).class_names(label) if path.startswith(PREFIX) and split != TEST else None

        def row(record: Mapping[str, Any], place: str, problems: Problems) -> tuple[Any, Any]:
            sentence = _listed(record.get(key), key, place)
            if not all(isinstance(word, str) for word in sentence):
                raise InputError(f"{place}: {key!r} must have words, but has {sentence!r}")
            sentence = [as_unicode(word, place, problems) for word in sentence]
            if not sentence:
                problems.add("a sentence without words (kept)", place)
            if split == TEST:
                return sentence, None
            tags = _listed(record.get(label), label, place)
            if len(tags) != len(sentence):
                raise InputError(f"{place}: {len(sentence):,} words, but {len(tags):,} tags")
            return sentence, [_name(tag, names, label, place) for tag in tags]

        return read_table(path, columns, row)

    def texts(self, record: Mapping[str, Any], place: str, problems: Problems) -> tuple[Any, ...]:
        """A text, or a list of words."""
        (key,) = self.columns.values()
        value = record.get(key)
        if isinstance(value, list) and all(isinstance(word, str) for word in value):
            return (tuple(as_unicode(word, place, problems) for word in value),)
        return super().texts(record, place, problems)

    def engine_options(self, about: Mapping[str, Any], config: Any) -> dict[str, Any]:
        """A word's tag is that of its first token, and goes on with the one before if it says so."""
        return {
            "strategy": "first",
            "given_words": True,
            "join": has_scheme(labels_of(config)),
            "stride": about["doc_stride"],
        }

    def _to_iob2(self, examples: Examples) -> None:
        """The tags, where they are of a scheme, as the model has them; what is wrong in the scheme is counted."""
        require("seqeval", to="train on tags")
        sentences = [tags for tags in examples.labels if tags is not None]
        if has_scheme(tag for tags in sentences for tag in tags):
            for tags, place in zip(examples.labels, examples.places, strict=True):
                if wrong := [tag for tag in tags or () if not is_tag(tag)]:
                    raise InputError(f"{place}: the tag {wrong[0]!r} is none like B-PER, as others are")
        scheme = self._schemes[examples.name] = scheme_of(sentences)
        if scheme is None:
            odd = next((tag for tags in sentences for tag in tags if tag != OUTSIDE), None)
            if self.name == "ner" and odd is not None:
                raise InputError(
                    f"{examples.name} has tags as {odd!r}, not as B-PER or I-PER: `finetune tag` takes them"
                )
            return
        for i, tags in enumerate(examples.labels):
            if tags is None:
                continue
            entities = spans(tags)
            if not is_valid(tags, entities, scheme):
                examples.problems.add(f"tags that are not {scheme} (read as conlleval does)", examples.places[i])
            examples.labels[i] = written(entities, len(tags), IOB2)
        examples.notes.append(
            f"{examples.name}: tags are {scheme}{'' if scheme == IOB2 else f', for the model {IOB2}'}"
        )

    def head_options(self, train: Examples) -> dict[str, Any]:
        found = {tag for tags in train.labels for tag in tags}
        names = sorted(found)
        if has_scheme(found):
            types = sorted({tag[1:] for tag in found - {OUTSIDE}})
            names = [OUTSIDE, *(f"{letter}{kind}" for kind in types for letter in "BI")]
        if self.given.labels is not None:
            names = list(self.given.labels)
        if len(found) < 2:
            raise InputError(f"{train.name} has {len(found)} tags: there is nothing to tell apart")
        self.main = "f1" if has_scheme(names) else "accuracy"
        return head_of(names, "single_label_classification")

    def tokenizer(self, loaded: Any) -> Any:
        return words.tokenizer_of_words(loaded)

    def features(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Features:
        read = self._encoded(examples, tokenizing)
        labels_T = np.full(len(read.tokens.ids), _UNLABELLED, np.int64)
        labels_T[read.at] = self._numbers(examples, config)[read.numbers]
        window = np.repeat(np.arange(len(read.tokens.lengths)), read.tokens.lengths)
        weights = np.bincount(window[read.at], minlength=len(read.tokens.lengths)).astype(np.int64)
        return Features(read.tokens, {"labels": labels_T}, weights, per_token=True)

    def judge(self, examples: Examples, tokenizing: Tokenizing, config: Any) -> Judge:
        read = self._encoded(examples, tokenizing)
        if examples.labelled:
            self._numbers(examples, config)

        def score(logits_TC: npt.NDArray[np.float32]) -> Scores:
            return self._score(examples, read, logits_TC, config)

        return Judge(read.tokens, config.num_labels, _logits, score, per_token=True)

    def _encoded(self, examples: Examples, tokenizing: Tokenizing) -> words.Words:
        read = words.encode(examples.inputs, tokenizing)
        ends = read.lengths.cumsum()
        for number in np.setdiff1d(np.arange(int(ends[-1])), read.numbers).tolist():
            i = int(np.searchsorted(ends, number, side="right"))
            word = examples.inputs[i][number - ends[i]]
            examples.problems.add(f"a word that the tokenizer makes nothing of (taken as {OUTSIDE})",
                                  f"{examples.places[i]}: {word!r}")  # fmt: skip
        return read

    def _numbers(self, examples: Examples, config: Any) -> npt.NDArray[np.int64]:
        """(N,) the class of each word."""
        index = {name: i for i, name in enumerate(labels_of(config))}
        for tags, place in zip(examples.labels, examples.places, strict=True):
            if foreign := [tag for tag in tags if tag not in index]:
                known = ", ".join(map(repr, list(index)[:10]))
                raise InputError(
                    f"{place}: the tag {foreign[0]!r} is none of those that the model has: {known}"
                    f"{', ...' if len(index) > 10 else ''} (`finetune --labels` names others)"
                )
        return np.asarray([index[tag] for tags in examples.labels for tag in tags], np.int64)

    def _score(self, examples: Examples, read: words.Words, logits_TC: npt.NDArray[np.float32], config: Any) -> Scores:
        names = labels_of(config)
        logits = logits_TC[read.at]
        of_word = np.full(int(read.lengths.sum()), OUTSIDE, object)
        of_word[read.numbers] = np.asarray(names, object)[logits.argmax(1)]
        predicted = [each.tolist() for each in np.split(of_word, read.lengths.cumsum()[:-1])]
        schemed = has_scheme(names)
        predictions = [_prediction(*pair, schemed) for pair in zip(examples.inputs, predicted, strict=True)]
        if not examples.labelled:
            return Scores(lambda rows: {}, len(examples), unit="sentence", predictions=predictions)
        true_M = torch.from_numpy(self._numbers(examples, config)[read.numbers])
        counts = tag_scores.TagCounts(examples.labels, predicted, names)
        classes, confusion = tag_scores.confusion(examples.labels, predicted, names)
        return Scores(
            counts.measure,
            len(examples),
            unit="sentence",
            per_class=counts.per_type(),
            classes=classes,
            confusion=confusion,
            predictions=predictions,
            loss=float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), true_M)),
        )

    def write_test(self, examples: Examples, scores: Scores) -> tuple[str, str]:
        """The file with another column, the tag that is predicted, in the file's own scheme: what conlleval reads.

        Raises:
            InputError: if it has no columns.
        """
        if _is_table(examples.name):
            return super().write_test(examples, scores)
        scheme = self._schemes[examples.name] or next(filter(None, self._schemes.values()), None)
        tags = (
            tag
            for prediction in scores.predictions
            for tag in (
                prediction["tags"]
                if scheme is None or "entities" not in prediction
                else written(spans(prediction["tags"]), len(prediction["tags"]), scheme)
            )
        )
        lines = []
        for line in self._columns_of(examples.name).lines():
            separator = "\t" if "\t" in line.text else " "
            if line.is_word:
                lines.append(f"{line.text.rstrip(' ')}{separator}{next(tags)}\n")
            else:
                lines.append(f"{line.text}{separator}{OUTSIDE}\n" if DOCUMENT in line.cells else f"{line.text}\n")
        return f"{Path(examples.name).name}.predicted", "".join(lines)


def _is_table(path: str) -> bool:
    return path.startswith(PREFIX) or File.of(Path(path)).format in _TABLES


def _words_column(path: str) -> str:
    """Raises: InputError, if the table has no column of a name that says it."""
    for key in _WORDS:
        try:
            next(iter(Records(path, {"--text": key})))
            return key
        except InputError as error:
            if key == _WORDS[-1] or "has no column" not in str(error):
                raise
    raise AssertionError


def _listed(value: Any, key: str, place: str) -> list[Any]:
    if isinstance(value, str):
        return [part for part in value.split(" ") if part]
    if not isinstance(value, list | tuple | np.ndarray):
        raise InputError(f"{place}: {key!r} must be a list, or have blanks between, but is {value!r}")
    return list(value)


def _name(tag: Any, names: Sequence[str] | None, key: str, place: str) -> str:
    if isinstance(tag, str):
        return tag
    if not isinstance(tag, int | np.integer) or (names is not None and not 0 <= tag < len(names)):
        raise InputError(f"{place}: {key!r} must have tags, but has {tag!r}")
    return str(tag) if names is None else names[int(tag)]


def _prediction(sentence: Sequence[str], tags: Sequence[str], schemed: bool) -> dict[str, Any]:
    found = {"words": list(sentence), "tags": list(tags)}
    if not schemed:
        return found
    entities = [
        {"type": kind, "text": " ".join(sentence[start:end]), "start": start, "end": end}
        for kind, start, end in spans(tags)
    ]
    return {**found, "entities": entities}


def _logits(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model(**batch.inputs()).logits[0]
    return logits.float()
