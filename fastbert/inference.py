"""Texts to vectors: tokenised once, batched by a token budget, packed without padding, pooled for each sequence.

Dimension key:  B sequences   T packed tokens   N hidden size
"""

import contextlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fastbert import hub
from fastbert.errors import InputError
from fastbert.families._base import max_tokens as max_tokens
from fastbert.families._base import model_types
from fastbert.patching import patch
from fastbert.warmup import warm_up

POOLS = ("mean", "cls")
_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
_CHUNK = 1024  # texts tokenised between two reports of progress


def load_config(name: str) -> PreTrainedConfig:
    """The configuration of a checkpoint in a directory or on the Hugging Face hub.

    Raises:
        InputError: if there is none, it cannot be read, or fastbert does not know the type of model.
    """
    local = _is_local(name)
    with _quiet():
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(name, local_files_only=local)
        except _UNREADABLE as error:
            raise InputError(f"{name}: {_first_sentence(error)}") from error
    known = model_types()
    if config.model_type not in known:
        raise InputError(f"{name} is of type {config.model_type!r}, but fastbert knows {', '.join(known)}")
    return config


def load_model(kind: Any, name: str, *, may_miss: Sequence[str] = ("pooler.",)) -> PreTrainedModel:
    """transformers' model from a directory or the Hugging Face hub: float32, CPU, eval mode, SDPA, not patched.

    Args:
        kind: a transformers class with `from_pretrained`, such as `AutoModel`.
        may_miss: parts of parameter names that the checkpoint need not have; they are initialised at random.

    Raises:
        InputError: naming the file, if there is no checkpoint, it is damaged, fastbert does not know its type, or
            it lacks weights of that class.
    """
    model, missing = load_weights(kind, name, attn_implementation="sdpa")
    missing = [key for key in missing if not any(part in key for part in may_miss)]
    if missing:
        raise InputError(_lacks(name, model, missing))
    loaded: PreTrainedModel = model.eval()
    return loaded


def load_weights(kind: Any, name: str, **options: Any) -> tuple[Any, list[str]]:
    """A model in float32, and which of its weights the checkpoint lacks: they are initialised at random.

    Args:
        kind: a class with `from_pretrained`.
        options: of `from_pretrained`.

    Raises:
        InputError: as `load_model`, but for weights that are lacking.
    """
    load_config(name)
    with _quiet():
        try:
            model, info = kind.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, local_files_only=_is_local(name), **options
            )
        except _UNREADABLE as error:
            raise InputError(_what_is_damaged(name, error)) from error
    return model, sorted(info["missing_keys"])


def _lacks(name: str, model: PreTrainedModel, missing: Sequence[str]) -> str:
    architectures = model.config.architectures
    saved = " (it was saved from " + ", ".join(architectures) + ")" if architectures else ""
    return f"{name} lacks {len(missing)} weights of {type(model).__name__}{saved}: {missing[0]}, ..."


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint.

    Raises:
        InputError: if it has none.
    """
    missing = f"{name} has no tokenizer: neither tokenizer.json nor a vocabulary that transformers can read"
    local = _is_local(name)
    with _quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, local_files_only=local)
        except (*_UNREADABLE, ImportError) as error:
            raise InputError(f"{missing} ({_first_sentence(error)})") from error
    # Without a vocabulary AutoTokenizer returns one that knows nothing but the special tokens.
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise InputError(missing)
    return tokenizer


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts, end to end.

    Attributes:
        ids: (T,) int32.  lengths: (B,) int64, tokens of each text.
        unknown: how many tokens are the unknown one.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    unknown: int


class Embedder:
    """Vectors of texts, from a BERT encoder that runs packed.

    Args:
        model: an encoder that is one of fastbert's or patched, in eval mode.
        tokenizer: its tokenizer.
        pool: "mean" of all tokens of a text, or "cls", its first token.
        normalize: scale each vector to length 1.
        batch_tokens: tokens a batch may have; a longer text makes a batch of its own.
        max_length: tokens a text is cut to; what model and tokenizer can take where it is None.

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
        batch_tokens: int = 16384,
        max_length: int | None = None,
    ) -> None:
        if pool not in POOLS:
            raise InputError(f"pool must be one of {', '.join(POOLS)}, but is {pool!r}")
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, but is {batch_tokens}")
        longest = min(max_tokens(model), tokenizer.model_max_length)
        shortest = tokenizer.num_special_tokens_to_add() + 1
        if max_length is not None and not shortest <= max_length <= longest:
            raise InputError(f"max_length must be in [{shortest}, {longest}] for this model, but is {max_length}")
        self.model, self.tokenizer = model, tokenizer
        self.pool, self.normalize = pool, normalize
        self.batch_tokens, self.max_length = batch_tokens, max_length or longest
        self._warm_to = 0  # tokens of the longest text whose kernels are compiled

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

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """(B, N) float32, a row for each text, in their order."""
        return self.encode(self.tokenize(texts))

    def tokenize(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> Tokens:
        """Texts to ids, special tokens included, cut at `max_length`.

        Args:
            progress: called with the number of texts that have just been done.

        Raises:
            InputError: if an id is not in the model's vocabulary.
        """
        ids: list[npt.NDArray[np.int32]] = [np.zeros(0, np.int32)]
        lengths: list[int] = []
        for start in range(0, len(texts), _CHUNK):
            rows = self.tokenizer(
                list(texts[start : start + _CHUNK]),
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )["input_ids"]
            ids += [np.asarray(row, np.int32) for row in rows]
            lengths += [len(row) for row in rows]
            if progress is not None:
                progress(len(rows))
        flat = np.concatenate(ids)
        vocabulary = vocabulary_size(self.model)
        if flat.size and flat.max() >= vocabulary:
            raise InputError(f"the tokenizer has id {flat.max()}, but the model a vocabulary of {vocabulary}")
        unknown = 0 if self.tokenizer.unk_token_id is None else int((flat == self.tokenizer.unk_token_id).sum())
        return Tokens(flat, np.asarray(lengths, np.int64), unknown)

    def encode(self, tokens: Tokens, progress: Callable[[int], None] | None = None) -> npt.NDArray[np.float32]:
        """(B, N) float32, a row for each text, in their order.

        Longest texts first. On a GPU the kernels for texts of these lengths are compiled first, in threads, where they
        are not yet; nothing waits for it before the last batch is launched.

        Args:
            progress: called with the number of tokens that have just been done, on a GPU launched.
        """
        order = np.argsort(-tokens.lengths, kind="stable")
        order = order[tokens.lengths[order] > 0]
        self._warm_up(int(tokens.lengths.max(initial=0)))
        on_gpu = self.model.device.type == "cuda"
        sorted_BN = torch.empty(len(order), self.model.config.hidden_size, pin_memory=on_gpu)
        for start, end in _budgeted(tokens.lengths[order], self.batch_tokens):
            rows = order[start:end]
            sorted_BN[start:end].copy_(self.encode_batch(tokens, rows), non_blocking=True)
            if progress is not None:
                progress(int(tokens.lengths[rows].sum()))
        if on_gpu:
            torch.cuda.synchronize(self.model.device)
        vectors = np.zeros((len(tokens.lengths), sorted_BN.shape[1]), np.float32)
        vectors[order] = sorted_BN.numpy()
        return vectors

    def _warm_up(self, longest: int) -> None:
        if longest > self._warm_to:
            self._warm_to = min(max_tokens(self.model), 1 << (longest - 1).bit_length())
            warm_up(self.model, max_length=self._warm_to)

    @torch.inference_mode()
    def encode_batch(self, tokens: Tokens, rows: npt.NDArray[np.int64]) -> Tensor:
        """(len(rows), N) float32 on the model's device: these texts in one packed call, without synchronisation.

        Args:
            rows: which texts, none of them without tokens.
        """
        lengths = tokens.lengths[rows]
        cu_seqlens = np.concatenate([[0], lengths.cumsum()])
        starts = (tokens.lengths.cumsum() - tokens.lengths)[rows]
        flat = np.repeat(starts - cu_seqlens[:-1], lengths) + np.arange(cu_seqlens[-1])
        hidden_TN = self.model(
            input_ids=self._to_device(tokens.ids[flat])[None],
            cu_seq_lens_q=self._to_device(cu_seqlens.astype(np.int32)),
            max_length_q=int(lengths.max()),
        ).last_hidden_state[0]
        if self.pool == "cls":
            pooled_BN = hidden_TN[self._to_device(cu_seqlens[:-1])].float()
        else:
            # segment_reduce, for it adds in a fixed order; unsafe=True leaves out a check that would synchronise.
            pooled_BN = torch.segment_reduce(
                hidden_TN.float(), "mean", lengths=self._to_device(lengths), axis=0, unsafe=True
            )
        return F.normalize(pooled_BN, dim=-1) if self.normalize else pooled_BN

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        t = torch.from_numpy(array)
        if self.model.device.type == "cuda":
            t = t.pin_memory()
        return t.to(self.model.device, non_blocking=True)


@dataclass(frozen=True)
class Filling:
    """A token for a mask: its share of the probability, and the text with it in place of that mask."""

    token: str
    probability: float
    text: str


def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int = 5
) -> list[list[Filling]]:
    """For each mask in the text, the likeliest tokens, best first.

    Args:
        model: a masked language model in eval mode.
        text: with at least one [MASK], whatever the tokenizer's own mask token is.
        top_k: how many tokens, at least 1; the whole vocabulary where it is larger.

    Raises:
        InputError: if there is no mask, or the text is longer than the model can take.
    """
    mask = tokenizer.mask_token
    if not isinstance(mask, str):
        raise InputError("the tokenizer has no mask token")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, but is {top_k}")
    text = text.replace("[MASK]", mask)
    batch = tokenizer(text, return_tensors="pt", verbose=False).to(model.device)
    ids = batch["input_ids"][0]
    places = (ids == tokenizer.mask_token_id).nonzero().squeeze(-1)
    if not len(places):
        raise InputError(f"there is no {mask} in the text")
    if len(ids) > max_tokens(model):
        raise InputError(f"the text has {len(ids)} tokens, but the model takes {max_tokens(model)}")
    if int(ids.max()) >= vocabulary_size(model):
        raise InputError(
            f"the tokenizer has id {int(ids.max())}, but the model a vocabulary of {vocabulary_size(model)}"
        )
    with torch.inference_mode():
        probabilities = model(**batch).logits[0, places].float().softmax(-1)
    best = probabilities.topk(min(top_k, probabilities.shape[-1]))
    pieces = text.split(mask)
    filled = []
    for i, (values, indices) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        before, after = mask.join(pieces[: i + 1]), mask.join(pieces[i + 1 :])
        filled.append(
            [
                Filling(word, value, before + word.strip().removeprefix("##") + after)
                for value, word in zip(values, map(str, map(tokenizer.decode, indices)), strict=True)
            ]
        )
    return filled


def vocabulary_size(model: PreTrainedModel) -> int:
    """The rows of a model's word table."""
    table: Any = model.get_input_embeddings()
    return int(table.num_embeddings)


def _budgeted(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[tuple[int, int]]:
    """Runs of sequences with at most `budget` tokens each, but at least one sequence."""
    ends = lengths.cumsum()
    start = 0
    while start < len(lengths):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + budget, side="right")))
        yield start, end
        start = end


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report of weights that were not used."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _is_local(name: str) -> bool:
    """Whether only files on this machine count: see `hub.only_local`. Raises: InputError, if it is no checkpoint."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"{name} is no checkpoint: it has no config.json")
        return True
    if path.exists():
        raise InputError(f"{name} is a file, but a checkpoint is a directory (config.json, model.safetensors)")
    return hub.only_local(name, "config.json")


def _what_is_damaged(name: str, error: BaseException) -> str:
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as reason:
            return f"{path} is damaged or cut off ({_first_sentence(reason)})"
    return f"{name}: {_first_sentence(error)}"


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") or type(error).__name__
