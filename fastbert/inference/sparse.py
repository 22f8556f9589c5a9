"""Texts to sparse vectors, an element a word of the vocabulary: SPLADE.

max over a text's tokens of log(1 + relu(logits)), https://arxiv.org/abs/2109.10086

Dimension key:  A, B texts   T packed tokens   V vocabulary
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError, require
from fastbert.inference.engine import Batch, Progress
from fastbert.inference.folder import SPARSE
from fastbert.inference.tokens import Tokens, by_budget
from fastbert.inference.vectors import VectorEngine, similarity

if TYPE_CHECKING:
    from scipy.sparse import csr_array

STRATEGIES = ("max", "sum")
ACTIVATIONS = ("relu", "log1p_relu")
_LOGITS = 1 << 25  # at a time: 128 MB in float32


class SparseEmbedder(VectorEngine):
    """Sparse vectors of texts, from a masked language model that runs packed.

    A folder of sentence-transformers' SparseEncoder gives the vectors that it gives. Logits are computed for some texts
    at a time, so that a large batch does not hold a vocabulary for each of its tokens.

    Args:
        model, tokenizer, options: of `VectorEngine`.
        max_active_dims: how many of a vector's elements are kept, the largest; what the model's files say where it is
            None.

    Raises:
        InputError: if the model cannot be loaded, is no masked language model, or has a module that fastbert does not
            know; if an option is out of range.
    """

    kind: ClassVar[str] = SPARSE
    auto: ClassVar[Any] = AutoModelForMaskedLM
    may_miss: ClassVar[Sequence[str]] = ()
    default_similarity: ClassVar[str] = "dot"

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        max_active_dims: int | None = None,
        **options: Any,
    ) -> None:
        require("scipy", to="embed texts as sparse vectors")
        super().__init__(model, tokenizer, **options)
        self.strategy, self.activation = "max", "relu"
        if self.folder.modules is not None:
            if [files.kind for files in self.folder.modules] != ["SpladePooling"]:
                kinds = ", ".join(files.kind for files in self.folder.modules) or "nothing"
                raise InputError(f"{self.folder.name} has {kinds} behind the Transformer, and not just SpladePooling")
            config = self.folder.modules[0].config
            self.strategy = config.get("pooling_strategy", self.strategy)
            self.activation = config.get("activation_function", self.activation)
            if self.strategy not in STRATEGIES or self.activation not in ACTIVATIONS:
                raise InputError(f"{self.folder.name}: fastbert does not know SpladePooling as {config}")
        self.max_active_dims = self.folder.max_active_dims if max_active_dims is None else max_active_dims
        if self.max_active_dims is not None and self.max_active_dims < 1:
            raise InputError(f"max_active_dims must be at least 1, but is {max_active_dims}")
        self.dimension = int(self.model.config.vocab_size)

    def __str__(self) -> str:
        """What was taken from the model's files, on one line."""
        steps = f"{type(self.model).__name__}, {self.strategy} of log(1 + {self.activation})"
        kept = "" if self.max_active_dims is None else f", {self.max_active_dims} of them kept"
        what = f"{steps}: {self.dimension} dimensions{kept}; {self._settings()}; {self.similarity_fn_name} similarity"
        return what if self.folder.modules is not None else f"{what} (no modules.json)"

    def encode(self, texts: Iterable[str], prompt: str | None = None, *, prompt_text: str | None = None) -> "csr_array":
        """(B, V) float32 in scipy's compressed rows, one for each text, in their order.

        Args:
            texts, prompt, prompt_text: as in `tokenize`.

        Raises:
            InputError: as `tokenize`.
        """
        return self.results(self.tokenize(texts, prompt=prompt, prompt_text=prompt_text))

    def results(self, tokens: Tokens, progress: Progress | None = None) -> "csr_array":
        """(B, V) float32 in scipy's compressed rows, one for each text, in their order.

        Args:
            progress: called with the number of tokens that have just been done.
        """
        from scipy.sparse import csr_array

        counts = np.zeros(len(tokens.lengths) + 1, np.int64)
        found: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]] = []
        for batch in self.batches(tokens):
            for rows, vectors_BV in self._vectors(batch):
                places = vectors_BV.nonzero()
                values = vectors_BV[places[:, 0], places[:, 1]]
                text, word = places.int().T.cpu().numpy()
                found.append((rows[text], word, values.cpu().numpy()))
            if progress is not None:
                progress(batch.tokens)
        if not found:
            return csr_array((len(tokens.lengths), self.dimension), dtype=np.float32)
        of_text, columns, elements = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        order = np.argsort(of_text, kind="stable")
        counts[1:] = np.bincount(of_text, minlength=len(tokens.lengths))
        return csr_array((elements[order], columns[order], counts.cumsum()), (len(tokens.lengths), self.dimension))

    def similarity(self, a_AV: "csr_array", b_BV: "csr_array") -> npt.NDArray[np.float32]:
        """(A, B) float32 of sparse vectors, by the function that the model's files name; dot where they do not."""
        if self.similarity_fn_name == "dot":
            dots: npt.NDArray[np.float32] = (a_AV @ b_BV.T).toarray()
            return dots
        return similarity(self.similarity_fn_name, a_AV.toarray(), b_BV.toarray())

    @torch.inference_mode()
    def _vectors(self, batch: Batch) -> Iterator[tuple[npt.NDArray[np.int64], Tensor]]:
        """Which texts, and their vectors, (B, V) float32, some at a time."""
        model: Any = self.model
        hidden_TN = model.base_model(**batch.inputs()).last_hidden_state[0]
        end = 0
        for part in by_budget(batch.lengths, max(1, _LOGITS // self.dimension)):  # in their order: longest first
            start, end = end, end + int(batch.lengths[part].sum())
            logits_TV = model._words(hidden_TN[start:end]).float()
            yield batch.rows[part], self._pooled(logits_TV, batch.lengths[part].tolist())

    def _pooled(self, logits_TV: Tensor, lengths: list[int]) -> Tensor:
        """(T, V) logits to (B, V)."""
        if self.strategy == "max":  # the functions rise: of the largest logit alone
            pooled_BV = self._activated(torch.stack([text.amax(0) for text in logits_TV.split(lengths)]))
        else:
            pooled_BV = torch.stack([text.sum(0) for text in self._activated(logits_TV).split(lengths)])
        if self.max_active_dims is not None and self.max_active_dims < self.dimension:
            values, columns = pooled_BV.topk(self.max_active_dims)
            return torch.zeros_like(pooled_BV).scatter_(1, columns, values)
        return pooled_BV

    def _activated(self, x: Tensor) -> Tensor:
        x = x.relu_().log1p_()
        return x.log1p_() if self.activation == "log1p_relu" else x
