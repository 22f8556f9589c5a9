"""Datasets of the Hugging Face hub or of a folder, row by row, through the `datasets` library."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.errors import InputError, require

PREFIX = "dataset:"
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


@dataclass(frozen=True)
class Dataset:
    """A split of a dataset.

    Attributes:
        place: a name on the hub, or a folder.
        revision: on the hub: a branch, a tag or a commit; None for the newest.
        config: one of several that it has.  split: None for "train", or what there is of one that was saved alone.
    """

    place: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Dataset":
        """Of dataset:NAME[@REVISION][[:CONFIG]:SPLIT].

        Raises:
            InputError: if it is not so.
        """
        place, *rest = text.removeprefix(PREFIX).split(":")
        name, _, revision = place.partition("@")
        if Path(place).is_dir():
            name, revision = place, ""
        if not name or len(rest) > 2 or "" in rest:
            raise InputError(f"{text} must be like dataset:NAME, dataset:NAME:SPLIT or dataset:NAME:CONFIG:SPLIT")
        config, split = rest if len(rest) == 2 else (None, rest[0] if rest else None)
        return cls(name, revision or None, config, split)

    @property
    def name(self) -> str:
        """The same on every machine, wherever a folder may be."""
        place = Path(self.place).resolve().name if self._is_folder else self.place
        return PREFIX + ":".join(part for part in (place, self.config, self.split) if part is not None)

    @property
    def size(self) -> None:
        """Bytes: not known."""

    @property
    def identity(self) -> list[Any]:
        """What tells it from another state of it."""
        if not self._is_folder:
            return [self.name, self._commit]
        folder = Path(self.place)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        return [self.name, [[file.relative_to(folder).as_posix(), file.stat().st_size] for file in files]]

    @functools.cached_property
    def columns(self) -> list[str]:
        """Names. Raises: InputError, if there is no such dataset, or it cannot be loaded."""
        with self._says():
            known: list[str] = self._rows.column_names or list(next(iter(self._rows), ()))
        return known

    def rows(self, keys: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows, numbered from 1, with these of their columns.

        Raises:
            InputError: if they cannot be loaded.
        """
        columns = [key for key in keys if key in self.columns]
        with self._says():
            yield from enumerate(self._rows.select_columns(columns), 1)

    def class_names(self, key: str) -> list[str] | None:
        """Names of the numbers that a column has, one or a list of them in a row; None where it has none.

        Raises:
            InputError: if there is no such dataset, or it cannot be loaded.
        """
        with self._says():
            feature = (self._rows.features or {}).get(key)
        names = getattr(getattr(feature, "feature", feature), "names", None)
        return None if names is None else list(names)

    @functools.cached_property
    def _rows(self) -> Any:
        import datasets

        datasets.disable_progress_bars()
        if not is_saved(Path(self.place)):
            split = self.split or "train"
            return datasets.load_dataset(self.place, self.config, split=split, revision=self._commit, streaming=True)
        saved: Any = datasets.load_from_disk(self.place)
        if isinstance(saved, datasets.DatasetDict):
            split = self.split or "train"
            if split not in saved:
                raise InputError(f"{self.name}: there is no split {split} (there are: {', '.join(saved)})")
            return saved[split]
        if self.split not in (None, str(saved.split)):
            raise InputError(f"{self.name}: there is no split {self.split}, for {saved.split} was saved alone")
        return saved

    @functools.cached_property
    def _commit(self) -> str | None:
        """What the revision stands for now: a run that goes on must find the same rows."""
        if self._is_folder:
            return None
        from huggingface_hub import HfApi

        with self._says():
            return HfApi().dataset_info(self.place, revision=self.revision).sha

    @property
    def _is_folder(self) -> bool:
        return Path(self.place).is_dir()

    @contextlib.contextmanager
    def _says(self) -> Iterator[None]:
        require("datasets", to="read datasets")
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # of every kind, from the hub, from files and from Arrow
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{self.name} cannot be read ({reason})") from error
