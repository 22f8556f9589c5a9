"""Checkpoints from a directory or the Hugging Face hub, by transformers' own loaders, with errors of one line."""

import contextlib
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fastbert import hub
from fastbert.errors import InputError
from fastbert.families._base import model_types
from fastbert.inference.precision import choose
from fastbert.patching import patch

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)


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


def load_packed(
    kind: Any,
    name: str,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    may_miss: Sequence[str] = ("pooler.",),
) -> PreTrainedModel:
    """`load_model`, in that dtype on that device, patched: what an engine runs.

    Raises:
        InputError: as `load_model` and `precision.choose`.
    """
    precision = choose(dtype, device)
    model: Any = load_model(kind, name, may_miss=may_miss)
    model = model.to(device, precision.dtype)
    return patch(cast(PreTrainedModel, model), inference_dtype=precision.inference_dtype)


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


def vocabulary_size(model: PreTrainedModel) -> int:
    """The rows of a model's word table."""
    table: Any = model.get_input_embeddings()
    return int(table.num_embeddings)


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
