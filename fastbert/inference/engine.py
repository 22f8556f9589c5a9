"""What all engines share: a model that runs packed, its tokenizer, and batches by a token budget.

Dimension key:  B texts   T packed tokens   N hidden size
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.families._base import is_fast, max_tokens
from fastbert.inference.encoding import Encoder, checked, is_pair, is_text, joined, naming_surrogates, takes_types
from fastbert.inference.graphs import graphs as capture
from fastbert.inference.loading import vocabulary_size
from fastbert.inference.precision import name_of
from fastbert.inference.tokens import Tokens, by_budget, ranges
from fastbert.packing import Packing
from fastbert.warmup import warm_up

_CHUNK = 1024  # texts tokenised between two reports of progress
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # a larger batch leaves a CPU's cache

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some texts, packed, on the model's device.

    Attributes:
        rows: (B,) which texts.  lengths: (B,) int64, their tokens, on the host.
        input_ids: (1, T) int32.  token_type_ids: (1, T), or None where all are 0.
        cu_seqlens: (B + 1,) int32, where each text begins, and T.
        prompt: as in `Tokens`.
    """

    rows: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    input_ids: Tensor
    token_type_ids: Tensor | None
    cu_seqlens: Tensor
    prompt: int = 0

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[1])

    def packing(self) -> Packing:
        """Where the texts are; on a CPU."""
        position_ids = torch.from_numpy(ranges(np.zeros_like(self.lengths), self.lengths))
        return Packing(self.cu_seqlens, int(self.lengths.max()), position_ids, None, (1, self.tokens))

    def inputs(self) -> dict[str, Any]:
        """What a model of fastbert's takes."""
        types = {} if self.token_type_ids is None else {"token_type_ids": self.token_type_ids}
        return {
            "input_ids": self.input_ids,
            "cu_seq_lens_q": self.cu_seqlens,
            "max_length_q": int(self.lengths.max()),
            **types,
        }


class Engine:
    """A model that runs packed, with its tokenizer.

    Args:
        model: one of fastbert's or patched, in eval mode.
        tokenizer: its tokenizer, as it is when something is tokenised first.
        batch_tokens: tokens a batch may have, 2,048 on a CPU and 16,384 on a GPU where it is None; a longer text makes
            a batch of its own.
        max_length: tokens a text is cut to; what model and tokenizer can take where it is None.
        graphs: on a GPU, run the model through CUDA graphs, see `fastbert.graphs`.

    Raises:
        InputError: if an option is out of range, or the model is not patched.
    """

    _items: ClassVar[dict[str, Callable[[Any], bool]]] = {"text": is_text, "pair of texts": is_pair}

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        graphs: bool = False,
    ) -> None:
        if not any(is_fast(type(module)) for module in model.modules()):
            raise InputError(f"the {type(model).__name__} is not patched: give the engine fastbert.patch(model)")
        if batch_tokens is not None and batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, but is {batch_tokens}")
        longest = min(max_tokens(model), tokenizer.model_max_length)
        pairs_alone = "text" not in self._items
        shortest = tokenizer.num_special_tokens_to_add(pair=pairs_alone) + 1 + pairs_alone
        if max_length is not None and not shortest <= max_length <= longest:
            raise InputError(f"max_length must be in [{shortest}, {longest}] for this model, but is {max_length}")
        self.model, self.tokenizer = model, tokenizer
        self.dtype = name_of(model)
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
        self.max_length = max_length or longest
        self.graphs = capture(model) if graphs else None
        self._vocabulary, self._takes_types = vocabulary_size(model), takes_types(model, tokenizer)
        self._made: Encoder | None = None
        self._warm_to = 0  # tokens of the longest text whose kernels are compiled

    def tokenize(self, items: Iterable[Any], progress: Progress | None = None) -> Tokens:
        """Texts, or pairs of texts, to ids as transformers has them, special tokens included, cut at `max_length`.

        Threads may call it.

        Args:
            progress: called with the number of items that have just been done.

        Raises:
            InputError: naming an item that is none; if an id is not in the model's vocabulary.
        """
        listed, encode = checked(items, self._items), self._encoder()
        done = []
        for start in range(0, len(listed), _CHUNK):
            chunk = listed[start : start + _CHUNK]
            with naming_surrogates(chunk, start):
                done.append(encode(chunk))
            if progress is not None:
                progress(len(chunk))
        types = None
        if any(encoded.types is not None for encoded in done):
            types = joined([np.zeros_like(e.ids, np.int8) if e.types is None else e.types for e in done], np.int8)
        ids = joined([encoded.ids for encoded in done], np.int32)
        lengths = joined([encoded.lengths for encoded in done], np.int64)
        return Tokens(ids, lengths, self._unknown(ids), types, sum(encoded.cut for encoded in done))

    def _encoder(self) -> Encoder:
        if self._made is None or self._made.max_length != self.max_length:
            self._made = Encoder(self.tokenizer, self.max_length, types=self._takes_types)
        return self._made

    def _unknown(self, ids: npt.NDArray[np.int32]) -> int:
        """How many are the unknown token. Raises: InputError, if one is not in the model's vocabulary."""
        if ids.size and ids.max() >= self._vocabulary:
            raise InputError(f"the tokenizer has id {ids.max()}, but the model a vocabulary of {self._vocabulary}")
        return 0 if self.tokenizer.unk_token_id is None else int((ids == self.tokenizer.unk_token_id).sum())

    def batches(self, tokens: Tokens) -> Iterator[Batch]:
        """All texts that have tokens, in batches of `batch_tokens`, longest first.

        On a GPU the kernels for texts of these lengths are compiled first, in threads, where they are not yet.
        """
        self._warm_up(int(tokens.lengths.max(initial=0)))
        for rows in by_budget(tokens.lengths, self.batch_tokens):
            yield self.batch(tokens, rows)

    def batch(self, tokens: Tokens, rows: npt.NDArray[np.int64]) -> Batch:
        """These texts, none of them without tokens."""
        flat, cu_seqlens = tokens.places(rows)
        device = self.model.device
        return Batch(
            rows,
            tokens.lengths[rows],
            _to_device(tokens.ids[flat], device)[None],
            None if tokens.types is None else _to_device(tokens.types[flat].astype(np.int32), device)[None],
            _to_device(cu_seqlens, device),
            tokens.prompt,
        )

    def hidden(self, batch: Batch) -> Tensor:
        """(T, N) the model's last hidden states."""
        directly = getattr(self.model, "encode_packed", None)
        if directly is not None and self.graphs is None and batch.input_ids.device.type == "cpu":
            hidden_TN = directly(batch.input_ids, batch.token_type_ids, batch.packing())
            if hidden_TN is not None:
                return cast(Tensor, hidden_TN)
        last: Tensor = self.model(**batch.inputs()).last_hidden_state[0]
        return last

    @torch.inference_mode()
    def gather(
        self,
        tokens: Tokens,
        width: int,
        call: Callable[[Batch], Tensor],
        progress: Progress | None = None,
        *,
        per_token: bool = False,
    ) -> npt.NDArray[np.float32]:
        """What `call` gives for each batch, (B, width) or `per_token` (T, width), in the order of `tokens`, float32.

        Nothing waits for a GPU before the last batch is launched. Texts without tokens get zeros.

        Args:
            progress: called with the number of tokens that have just been done, on a GPU launched.
        """
        on_gpu = self.model.device.type == "cuda"
        rows = len(tokens.ids) if per_token else len(tokens.lengths)
        as_called = torch.empty(rows, width, pin_memory=on_gpu)
        places: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        done = 0
        for batch in self.batches(tokens):
            place = tokens.places(batch.rows)[0] if per_token else batch.rows
            as_called[done : done + len(place)].copy_(call(batch), non_blocking=True)
            places.append(place)
            done += len(place)
            if progress is not None:
                progress(batch.tokens)
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        gathered = np.zeros((rows, width), np.float32)
        gathered[np.concatenate(places)] = as_called[:done].numpy()
        return gathered

    def _warm_up(self, longest: int) -> None:
        if longest > self._warm_to:
            self._warm_to = min(max_tokens(self.model), 1 << (longest - 1).bit_length())
            warm_up(self.model, max_length=self._warm_to)


def _to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    t = torch.from_numpy(array)
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
