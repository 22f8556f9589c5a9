"""What the user can mend."""

import importlib.util


class InputError(ValueError):
    """Something that the user gave cannot be used: a checkpoint, a file, a text. The message is one line."""


class CommonError(InputError):
    """One that all processes of a run raise alike: the first of them says it for all."""


def require(*packages: str, to: str) -> None:
    """Raises: InputError, if one of these, which the extra `pretrain` brings, is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"to {to}, install {' and '.join(missing)}: pip install 'fastbert-kernels[pretrain]'")
