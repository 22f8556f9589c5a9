"""What the user can mend."""

import importlib.util
import sys

NO_EXTENSION = (
    "fastbert's C++ extension, which was not built when fastbert was installed: get a C++ compiler, then pip install"
    " --force-reinstall --no-deps --no-cache-dir fastbert-kernels, or . in a checkout"
)


class InputError(ValueError):
    """Something that the user gave cannot be used: a checkpoint, a file, a text. The message is one line."""


class CommonError(InputError):
    """One that all processes of a run raise alike: the first of them says it for all."""


def require(*packages: str, to: str) -> None:
    """Raises: InputError, if one of these, which the extra `pretrain` brings, is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"to {to}, install {' and '.join(missing)}: pip install 'fastbert-kernels[pretrain]'")


def require_posix(*, to: str) -> None:
    """Raises: InputError on Windows, which lacks what files that are whole or not there are made with."""
    if sys.platform == "win32":
        raise InputError(f"to {to}, fastbert needs Linux or macOS; on Windows, use WSL")
