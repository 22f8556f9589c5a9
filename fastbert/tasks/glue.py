"""GLUE's nine tasks, from the official folders of TSV files or from `datasets`' nyu-mll/glue.

Source: https://gluebenchmark.com, https://arxiv.org/abs/1804.07461. Files have a row a line and no quoting: a quote is
a letter of the text.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.data.datasets import PREFIX, is_saved
from fastbert.data.documents import Problems
from fastbert.data.lines import Lines
from fastbert.data.readers import decoded, readable
from fastbert.data.records import Records
from fastbert.data.sources import File, find
from fastbert.errors import InputError
from fastbert.tasks import metrics
from fastbert.tasks.examples import EMPTY, Examples
from fastbert.tasks.scores import Scores
from fastbert.tasks.sequences import REGRESSION, SINGLE, SequenceTask
from fastbert.tasks.task import DEV, TEST, TRAIN, Given, Recipe, head_of

_SPLITS = {TRAIN: {"": "train"}, DEV: {"": "dev"}, TEST: {"": "test"}}
_UNLABELLED = -1  # in `datasets`


@dataclass(frozen=True)
class Spec:
    """A task as its files have it.

    Attributes:
        folder: of the official download, and the name of what is submitted.
        texts: columns of the TSV files.  label: its column.
        hub: columns of the texts in `datasets`, where the label is `label`.
        classes: by what the files call them, in `datasets`' order; empty for a number.
        figures: what it is judged by; the first is what models are chosen by.
        header: columns of train and dev, which lack them.
        parts: names of its files for a split that is in several, by what each is called here.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    hub: tuple[str, ...]
    classes: Mapping[str, str]
    figures: tuple[str, ...] = ("accuracy",)
    header: tuple[str, ...] = ()
    parts: Mapping[str, Mapping[str, str]] | None = None


_ENTAILMENT = {"entailment": "entailment", "not_entailment": "not_entailment"}
_MNLI = {split: {"matched": f"{split}_matched", "mismatched": f"{split}_mismatched"} for split in (DEV, TEST)}
TASKS = {
    "cola": Spec(
        "CoLA", ("sentence",), "label", ("sentence",), {"0": "unacceptable", "1": "acceptable"}, ("matthews",),
        header=("source", "label", "original", "sentence"),
    ),
    "sst2": Spec("SST-2", ("sentence",), "label", ("sentence",), {"0": "negative", "1": "positive"}),
    "mrpc": Spec(
        "MRPC", ("#1 String", "#2 String"), "Quality", ("sentence1", "sentence2"),
        {"0": "not_equivalent", "1": "equivalent"}, ("f1", "accuracy"),
    ),
    "stsb": Spec(
        "STS-B", ("sentence1", "sentence2"), "score", ("sentence1", "sentence2"), {}, ("spearman", "pearson")
    ),
    "qqp": Spec(
        "QQP", ("question1", "question2"), "is_duplicate", ("question1", "question2"),
        {"0": "not_duplicate", "1": "duplicate"}, ("f1", "accuracy"),
    ),
    "mnli": Spec(
        "MNLI", ("sentence1", "sentence2"), "gold_label", ("premise", "hypothesis"),
        {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}, parts=_MNLI,
    ),
    "qnli": Spec("QNLI", ("question", "sentence"), "label", ("question", "sentence"), _ENTAILMENT),
    "rte": Spec("RTE", ("sentence1", "sentence2"), "label", ("sentence1", "sentence2"), _ENTAILMENT),
    "wnli": Spec(
        "WNLI", ("sentence1", "sentence2"), "label", ("sentence1", "sentence2"),
        {"0": "not_entailment", "1": "entailment"},
    ),
}  # fmt: skip


class GlueTask(SequenceTask):
    """One of them.

    Its data is the task's folder, GLUE's own with all tasks, a folder that `datasets` saved, or dataset:NAME.

    Raises:
        InputError: if it is none of these.
    """

    takes = frozenset()

    def __init__(self, name: str, given: Given) -> None:
        self.spec = spec = TASKS[name]
        super().__init__(name, given, SINGLE if spec.classes else REGRESSION)
        self.recipe = Recipe()
        self.columns = dict(zip(("--text", "--pair"), spec.texts, strict=False))
        self._label = spec.label
        self.main = spec.figures[0]
        if given.train is not None and given.dev is not None:
            raise InputError(f"--dev is no option of {name}, whose folder has its own")
        data = given.train or given.dev
        self._data: Path | str | None = data
        if data is None or str(data).startswith(PREFIX) or is_saved(Path(data)):
            return
        folder = Path(data)
        if not folder.is_dir():
            raise InputError(f"{data} is no folder: {name} is read from GLUE's own, with train.tsv and dev.tsv")
        self._data = folder / spec.folder if (folder / spec.folder).is_dir() else folder

    def read(self, split: str) -> dict[str, Examples]:
        names = (self.spec.parts or {}).get(split, {split: split})
        found = {}
        for called, name in names.items():
            examples = self._read(name, split)
            if examples is not None:
                found[called] = examples
        if split == TRAIN and not found:
            raise InputError(f"{self._data} has no train.tsv")
        return found

    def _read(self, name: str, split: str) -> Examples | None:
        if isinstance(self._data, Path) and not is_saved(self._data):
            path = self._data / f"{name}.tsv"
            return self._read_tsv(path, split) if path.exists() else None
        return self._read_dataset(name.replace(DEV, "validation"), split)

    def _read_tsv(self, path: Path, split: str) -> Examples:
        spec, examples = self.spec, Examples(str(path))
        header = None if split == TEST else spec.header or None
        wanted = (*spec.texts, *(() if split == TEST else (spec.label,)))
        for place, cells in unquoted_rows(path, header, wanted, examples.problems):
            label = None if split == TEST else cells[spec.label]
            id = cells.get("index") if split == TEST else None
            self._add(examples, tuple(cells[key] for key in spec.texts), label, place, id)
        if not examples.inputs:
            raise InputError(f"{path} has no row that can be used: {examples.problems or 'it is empty'}")
        return examples

    def _read_dataset(self, split: str, ours: str) -> Examples | None:
        place = str(self._data).removeprefix(PREFIX)
        parts = [place, *([] if Path(place).is_dir() else [self.name]), split]
        columns = {**{f"text {i}": key for i, key in enumerate(self.spec.hub)}, "label": "label"}
        try:
            records = Records(PREFIX + ":".join(parts), columns)
            rows = list(records)
        except InputError as error:
            if "there is no split" in str(error) and ours != TRAIN:
                return None
            raise
        examples = Examples(records.name)
        classes = list(self.spec.classes)
        for number, record in rows:
            assert record is not None
            label: Any = record["label"]
            if label == _UNLABELLED or label is None:
                label = None
            elif classes and 0 <= int(label) < len(classes):
                label = classes[int(label)]
            self._add(examples, tuple(record[key] for key in self.spec.hub), label, records.where(number))
        return examples

    def _add(self, examples: Examples, texts: tuple[str, ...], label: Any, place: str, id: str | None = None) -> None:
        if label is not None:
            if self.spec.classes and label not in self.spec.classes:
                known = ", ".join(self.spec.classes)
                raise InputError(f"{place}: the label {label!r} is none of {self.name}'s: {known}")
            label = self.spec.classes[label] if self.spec.classes else self._parsed(label, place)
        if not all(text.strip() for text in texts):
            examples.problems.add(EMPTY, place)
        examples.add(texts[0] if len(texts) == 1 else texts, label, place, id)

    def head_options(self, train: Examples) -> dict[str, Any]:
        if not self.spec.classes:
            return super().head_options(train)
        return head_of(list(self.spec.classes.values()), SINGLE)

    def _measure(self, labels: npt.NDArray[Any], predicted: npt.NDArray[Any], scores: Any = None) -> Any:
        figures = {name: getattr(metrics, name) for name in self.spec.figures}
        return lambda rows: {name: measure(labels[rows], predicted[rows]) for name, measure in figures.items()}

    def write_test(self, examples: Examples, scores: Scores) -> tuple[str, str]:
        """GLUE's own: the index of each row and its prediction, tab between."""
        spec = self.spec
        suffix = "-mm" if "test_mismatched" in examples.name else "-m" if "test_matched" in examples.name else ""
        own = {ours: theirs for theirs, ours in spec.classes.items()}

        def said(prediction: Mapping[str, Any]) -> str:
            if not spec.classes:
                return f"{float(np.clip(prediction['score'], 0, 5)):.3f}"
            return own[prediction["label"]]

        rows = zip(examples.ids, scores.predictions, strict=True)
        lines = ["index\tprediction", *(f"{id}\t{said(prediction)}" for id, prediction in rows)]
        return f"{spec.folder}{suffix}.tsv", "\n".join(lines) + "\n"


def unquoted_rows(
    path: Path, header: Sequence[str] | None, wanted: Sequence[str], problems: Problems
) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a TSV file without quoting, with their places; one with other cells than the header has is left out.

    Args:
        header: the columns, where the file has none.
        wanted: columns that must be there.

    Raises:
        InputError: if it cannot be read, or lacks a column.
    """
    (source,) = find([path], "tsv")
    assert isinstance(source, File)
    columns = None if header is None else list(header)
    with readable(source), source.open() as file:
        for number, line in decoded(Lines(file, source.compression), str(path), problems):
            cells = line.removesuffix("\n").split("\t")
            place = f"{path}, line {number}"
            if columns is None:
                columns = cells
                if missing := [key for key in wanted if key not in columns]:
                    raise InputError(
                        f"{path} has no column {missing[0]!r}, but {', '.join(map(repr, columns))}: is it another"
                        " task's, or another split's?"
                    )
            elif len(cells) != len(columns):
                problems.add("a row with more or fewer cells than there are columns (left out)", place)
            else:
                yield place, dict(zip(columns, cells, strict=True))
