"""transformers' integrations, such as wandb or mlflow, that get a run's figures beside ours."""

from collections.abc import Sequence
from typing import Any

from transformers.integrations import integration_utils

from fastbert.errors import InputError

_OURS = ("none", "tensorboard")  # which is written anyway


def callbacks(names: Sequence[str]) -> list[Any]:
    """Raises: InputError, if transformers knows none of that name, or its package is not installed."""
    known: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
    made = []
    for name in names:
        if name in _OURS:
            continue
        if name not in known:
            raise InputError(f"--report-to: there is no {name!r}, but {', '.join(sorted({*known, *_OURS}))}")
        try:
            made.append(known[name]())
        except (RuntimeError, ImportError) as error:
            raise InputError(f"--report-to {name}: {str(error).strip().splitlines()[0]}") from error
    return made
