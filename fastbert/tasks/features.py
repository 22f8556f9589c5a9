"""What a model is trained on: tokenised examples end to end, with their labels, in an Arrow file.

Dimension key:  I items   B sequences   T tokens   L values of a label
"""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastbert.errors import InputError, require
from fastbert.inference.tokens import Tokens

Batch = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Features:
    """Items to train on; an item is a sequence, or `group` of them.

    Attributes:
        tokens: of all sequences.
        labels: what the head takes, by the names of its arguments: (I,) or (I, L) each, or (T,) where `per_token`.
        weights: (I,) int64, how many terms of the loss an item has: 1, or its labelled tokens.
        per_token: whether there is a label a token.
        group: sequences of an item: the choices of a question.
    """

    tokens: Tokens
    labels: Mapping[str, npt.NDArray[Any]]
    weights: npt.NDArray[np.int64]
    per_token: bool = False
    group: int = 1

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(I,) tokens of each item."""
        lengths: npt.NDArray[np.int64] = self.tokens.lengths.reshape(-1, self.group).sum(1)
        return lengths

    def batch(self, items: npt.NDArray[np.int64]) -> Batch:
        """These items, packed: what a model of fastbert's takes."""
        rows = (items[:, None] * self.group + np.arange(self.group)).ravel()
        flat, cu_seqlens = self.tokens.places(rows)
        batch: Batch = {
            "input_ids": torch.from_numpy(self.tokens.ids[flat])[None],
            "cu_seq_lens_q": torch.from_numpy(cu_seqlens),
            "max_length_q": int(self.tokens.lengths[rows].max()),
        }
        if self.tokens.types is not None:
            batch["token_type_ids"] = torch.from_numpy(self.tokens.types[flat].astype(np.int32))[None]
        for name, values in self.labels.items():
            batch[name] = torch.from_numpy(values[flat])[None] if self.per_token else torch.from_numpy(values[items])
        if torch.cuda.is_available():
            return {name: t.pin_memory() if isinstance(t, Tensor) else t for name, t in batch.items()}
        return batch

    def write(self, path: Path, about: Mapping[str, str]) -> None:
        """To an Arrow file, a row a sequence; whole or not at all.

        Args:
            about: what it was made of.
        """
        require("pyarrow", to="keep tokenised text")
        import pyarrow

        tokens = self.tokens
        offsets = np.concatenate([[0], tokens.lengths.cumsum()])

        def by_sequence(values: npt.NDArray[Any]) -> Any:
            return pyarrow.LargeListArray.from_arrays(offsets, pyarrow.array(values))

        def by_item(values: npt.NDArray[Any]) -> Any:
            """The item's value stands with each of its sequences."""
            values = np.repeat(values, self.group, axis=0)
            if values.ndim == 1:
                return pyarrow.array(values)
            return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), values.shape[1])

        columns = {"input_ids": by_sequence(tokens.ids)}
        if tokens.types is not None:
            columns["token_type_ids"] = by_sequence(tokens.types)
        columns["weight"] = by_item(self.weights)
        columns |= {name: (by_sequence if self.per_token else by_item)(v) for name, v in self.labels.items()}
        numbers = {"unknown": tokens.unknown, "cut": tokens.cut, "group": self.group, "per_token": int(self.per_token)}
        metadata = {**about, **{name: str(number) for name, number in numbers.items()}}
        table = pyarrow.table(columns).replace_schema_metadata(metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with pyarrow.OSFile(str(draft), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            os.replace(draft, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def read(cls, path: Path, about: Mapping[str, str]) -> "Features | None":
        """What `write` wrote, mapped into memory; None if there is none, or it was made of something else.

        Raises:
            InputError: if it is damaged.
        """
        require("pyarrow", to="keep tokenised text")
        import pyarrow

        if not path.exists():
            return None
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all().combine_chunks()
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} is damaged: remove it, and it is made anew ({error})") from error
        known = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        if any(known.get(key) != value for key, value in about.items()):
            return None
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        group, per_token = int(known["group"]), known["per_token"] == "1"

        def flat(name: str) -> npt.NDArray[Any]:
            values: npt.NDArray[Any] = columns[name].flatten().to_numpy(zero_copy_only=False)
            return values

        def of_items(name: str) -> npt.NDArray[Any]:
            column = columns[name]
            if pyarrow.types.is_fixed_size_list(column.type):
                return flat(name).reshape(len(column), -1)[::group]
            values: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
            return values[::group]

        lengths = np.diff(columns["input_ids"].offsets.to_numpy()).astype(np.int64)
        types = flat("token_type_ids") if "token_type_ids" in columns else None
        tokens = Tokens(flat("input_ids"), lengths, int(known["unknown"]), types, int(known["cut"]))
        names = [name for name in columns if name not in ("input_ids", "token_type_ids", "weight")]
        labels = {name: flat(name) if per_token else of_items(name) for name in names}
        return cls(tokens, labels, of_items("weight"), per_token, group)


@dataclass(frozen=True)
class Tokenizing:
    """How text becomes tokens.

    Attributes:
        max_length: tokens of a sequence at most.
        types: whether the model takes token types.
    """

    tokenizer: Any
    max_length: int
    types: bool
    doc_stride: int = 128
