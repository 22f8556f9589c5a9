"""Texts to vectors.

Dimension key:  B texts   T packed tokens   N elements of a vector
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.engine import Batch, Progress
from fastbert.inference.folder import DENSE
from fastbert.inference.modules import Dense, Norm, Normalize, Pooling, Truncate, describe, load_modules
from fastbert.inference.tokens import Tokens
from fastbert.inference.vectors import VectorEngine, similarity


class Embedder(VectorEngine):
    """Vectors of texts, from an encoder that runs packed.

    A sentence-transformers folder gives the vectors that sentence-transformers gives; its `str` says what was taken
    from the folder. What is given here overrides it. As a callable it embeds a column of a batch: Ray Data's
    `map_batches` takes the class itself.

    Args:
        model, tokenizer, options: of `VectorEngine`.
        pool: "mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean" or "lasttoken", or several, whose vectors are
            joined; "mean" of all tokens where neither it nor the model's files say anything.
        normalize: scale each vector to length 1 at the end; False for not to, whatever the model's files say.
        truncate_dim: elements of a vector that are kept.

    Attributes:
        dimension: N, elements of a vector.

    Raises:
        InputError: if the model cannot be loaded, is a classifier, or has a module that fastbert does not know; if an
            option is out of range, or the tokenizer is another model's.
    """

    kind: ClassVar[str] = DENSE
    auto: ClassVar[Any] = AutoModel

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        pool: str | Sequence[str] | None = None,
        normalize: bool | None = None,
        truncate_dim: int | None = None,
        **options: Any,
    ) -> None:
        given = None if pool is None else Pooling([pool] if isinstance(pool, str) else pool)
        super().__init__(model, tokenizer, **options)
        hidden_size = int(self.model.config.hidden_size)
        if self.folder.modules is None:
            pooling, behind = given or Pooling(["mean"]), nn.Sequential()
        else:
            pooling, behind = load_modules(self.folder, hidden_size)
            if given is not None and len(given.modes) != len(pooling.modes) and set(map(type, behind)) & {Dense, Norm}:
                raise InputError(
                    f"what {self.folder.name} has behind {describe([pooling])[0]} fits no {describe([given])[0]}"
                )
            pooling = given or pooling
        modules = [*behind]
        if normalize is False and modules and isinstance(modules[-1], Normalize):
            modules.pop()
        truncate_dim = self.folder.truncate_dim if truncate_dim is None else truncate_dim
        if truncate_dim is not None:
            if truncate_dim < 1:
                raise InputError(f"truncate_dim must be at least 1, but is {truncate_dim}")
            modules.append(Truncate(truncate_dim))
        if normalize and not (modules and isinstance(modules[-1], Normalize)):
            modules.append(Normalize())
        self.pooling, self.modules = pooling, nn.Sequential(*modules).to(self.model.device)
        with torch.inference_mode():
            empty = torch.zeros(0, hidden_size * len(pooling.modes), device=self.model.device)
            self.dimension = int(self.modules(empty).shape[1])

    def __str__(self) -> str:
        """What was taken from the model's files, on one line."""
        steps = [type(self.model).__name__, *describe([self.pooling, *self.modules])]
        what = (
            f"{', '.join(steps)}: {self.dimension} dimensions; {self._settings()}; {self.similarity_fn_name} similarity"
        )
        return what if self.folder.modules is not None else f"{what} (no modules.json)"

    def encode(
        self, texts: Iterable[str], prompt: str | None = None, *, prompt_text: str | None = None
    ) -> npt.NDArray[np.float32]:
        """(B, N) float32, a row for each text, in their order; zeros for a text without any token.

        Args:
            texts, prompt, prompt_text: as in `tokenize`.

        Raises:
            InputError: as `tokenize`.
        """
        return self.encode_tokens(self.tokenize(texts, prompt=prompt, prompt_text=prompt_text))

    def encode_tokens(self, tokens: Tokens, progress: Progress | None = None) -> npt.NDArray[np.float32]:
        """(B, N) float32, a row for each text, in their order.

        Nothing waits for a GPU before the last batch is launched.

        Args:
            progress: called with the number of tokens that have just been done, on a GPU launched.
        """
        return self.gather(tokens, self.dimension, self.encode_batch, progress)

    results = encode_tokens

    @torch.inference_mode()
    def encode_batch(self, batch: Batch) -> Tensor:
        """(B, N) float32 on the model's device, in one packed call, without synchronisation."""
        return self.vectors(self.hidden(batch), batch)

    def vectors(self, hidden_TN: Tensor, batch: Batch) -> Tensor:
        """(B, N) float32 from the encoder's hidden states of a batch."""
        pooled_BN: Tensor = self.modules(self.pooling(hidden_TN, batch))
        return pooled_BN

    def similarity(self, a_AN: npt.ArrayLike, b_BN: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """(A, B) float32 of vectors, by the function that the model's files name; cosine where they do not."""
        return similarity(self.similarity_fn_name, a_AN, b_BN)

    def __call__(
        self, batch: Mapping[str, Any], *, column: str = "text", output: str = "embedding", **options: Any
    ) -> dict[str, Any]:
        """A batch of columns, with one more: a vector for each text, (B, N) float32.

        Args:
            column: the one with the texts.  output: the new one.
            options: of `encode`.

        Raises:
            InputError: if there is no such column, or one that is to be new; as `encode`.
        """
        if column not in batch:
            raise InputError(f"there is no column {column!r}, but {', '.join(map(repr, batch)) or 'none'}")
        if output in batch:
            raise InputError(f"there is a column {output!r} already: name another one with output=")
        return {**batch, output: self.encode(batch[column], **options)}
