"""Texts to vectors.

Dimension key:  B texts   T packed tokens   N hidden size
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.engine import Batch, Engine, Progress
from fastbert.inference.loading import load_model, load_tokenizer
from fastbert.inference.tokens import Tokens
from fastbert.patching import patch

POOLS = ("mean", "cls")


class Embedder(Engine):
    """Vectors of texts, from an encoder that runs packed.

    Args:
        model: an encoder that is one of fastbert's or patched, in eval mode.
        tokenizer: its tokenizer.
        pool: "mean" of all tokens of a text, or "cls", its first token.
        normalize: scale each vector to length 1.
        options: of `Engine`.

    Raises:
        InputError: if an option is out of range, or the tokenizer is another model's.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pool: str = "mean",
        normalize: bool = False,
        **options: Any,
    ) -> None:
        if pool not in POOLS:
            raise InputError(f"pool must be one of {', '.join(POOLS)}, but is {pool!r}")
        super().__init__(model, tokenizer, **options)
        self.pool, self.normalize = pool, normalize

    @classmethod
    def from_pretrained(
        cls, name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **options: Any
    ) -> "Embedder":
        """From a directory or the Hugging Face hub; `options` are those of the class.

        Raises:
            InputError: see `load_model` and `load_tokenizer`.
        """
        model = load_model(AutoModel, name)
        tokenizer = load_tokenizer(name)
        return cls(patch(model.to(device, dtype)), tokenizer, **options)  # type: ignore[arg-type]

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(B, N) float32, a row for each text, in their order."""
        return self.encode_tokens(self.tokenize(texts))

    def encode_tokens(self, tokens: Tokens, progress: Progress | None = None) -> npt.NDArray[np.float32]:
        """(B, N) float32, a row for each text, in their order.

        Nothing waits for a GPU before the last batch is launched.

        Args:
            progress: called with the number of tokens that have just been done, on a GPU launched.
        """
        on_gpu = self.model.device.type == "cuda"
        sorted_BN = torch.empty(len(tokens.lengths), self.model.config.hidden_size, pin_memory=on_gpu)
        rows: list[npt.NDArray[np.int64]] = []
        done = 0
        for batch in self.batches(tokens):
            sorted_BN[done : done + len(batch.rows)].copy_(self.encode_batch(batch), non_blocking=True)
            rows.append(batch.rows)
            done += len(batch.rows)
            if progress is not None:
                progress(batch.tokens)
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        vectors = np.zeros(sorted_BN.shape, np.float32)
        if rows:
            vectors[np.concatenate(rows)] = sorted_BN[:done].numpy()
        return vectors

    @torch.inference_mode()
    def encode_batch(self, batch: Batch) -> Tensor:
        """(B, N) float32 on the model's device, in one packed call, without synchronisation."""
        hidden_TN = self.model(**batch.inputs()).last_hidden_state[0]
        if self.pool == "cls":
            pooled_BN = hidden_TN[batch.cu_seqlens[:-1]].float()
        else:
            # segment_reduce, for it adds in a fixed order; unsafe=True leaves out a check that would synchronise.
            lengths = self._to_device(batch.lengths)
            pooled_BN = torch.segment_reduce(hidden_TN.float(), "mean", lengths=lengths, axis=0, unsafe=True)
        return F.normalize(pooled_BN, dim=-1) if self.normalize else pooled_BN
