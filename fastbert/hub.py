"""The Hugging Face hub, asked once: whether it has a model, or its files must come from this machine."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

from fastbert.errors import InputError

_SECONDS = 5


def only_local(name: str, *files: str) -> bool:
    """Whether transformers shall look on this machine only: `name` is a folder, or the hub cannot be reached.

    transformers itself would retry for a minute.

    Args:
        files: one of them must be in the hub's cache where the hub cannot be reached.

    Raises:
        InputError: if there is no such folder, and the hub has no such model or cannot be reached.
    """
    if Path(name).is_dir():
        return True
    try:
        huggingface_hub.model_info(name, timeout=_SECONDS)
    except HFValidationError:
        raise InputError(f"{name}: no such directory") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name}: no such directory, and no such model on the Hugging Face hub") from None
    except Exception as error:  # no connection: the exception is that of whichever HTTP library is installed
        if any(isinstance(huggingface_hub.try_to_load_from_cache(name, file), str) for file in files):
            return True
        raise InputError(f"{name}: no such directory, and the Hugging Face hub cannot be reached") from error
    return False


def find(name: str, file: str, *, local: bool) -> Path | None:
    """A file of a model in a folder or on the hub; None where it has none.

    Args:
        local: what `only_local` says of this model.
    """
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(huggingface_hub.hf_hub_download(name, file, local_files_only=local))
    except EntryNotFoundError:
        return None


def subfolder(name: str, folder: str, *, local: bool) -> str:
    """Where a folder of a model lies on this machine, fetched from the hub where `name` is no folder."""
    if Path(name).is_dir():
        return str(Path(name) / folder)
    return str(
        Path(huggingface_hub.snapshot_download(name, allow_patterns=f"{folder}/*", local_files_only=local), folder)
    )
