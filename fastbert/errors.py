"""What the user can mend."""

import importlib.util
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_DISTRIBUTION = "fastbert-kernels"
NO_EXTENSION = (
    "fastbert's C++ extension, which was not built when fastbert was installed: get a C++ compiler, then pip install"
    " --force-reinstall --no-deps --no-cache-dir fastbert-kernels, or . in a checkout"
)


class InputError(ValueError):
    """Something that the user gave cannot be used: a checkpoint, a file, a text. The message is one line."""


class CommonError(InputError):
    """One that all processes of a run raise alike: the first of them says it for all."""


class MissingPackage(InputError, ImportError):
    """A package that not everybody needs is not installed."""


def require(*packages: str, to: str) -> None:
    """Raises: MissingPackage, if one of these is not installed, naming the extra that brings it."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(f"to {to}, install {' and '.join(missing)}: {how_to_install(*missing)}")


def require_posix(*, to: str) -> None:
    """Raises: InputError on Windows, which lacks what files that are whole or not there are made with."""
    if sys.platform == "win32":
        raise InputError(f"to {to}, fastbert needs Linux or macOS; on Windows, use WSL")


def how_to_install(*packages: str) -> str:
    """The pip command: by fastbert's extras, as its own metadata has them, or by name where none brings a package."""
    extras = {name: _extra(name) for name in packages}
    named = [name for name, extra in extras.items() if extra is None]
    bringing = ",".join(dict.fromkeys(extra for extra in extras.values() if extra is not None))
    return " ".join(["pip install", *([f"'{_DISTRIBUTION}[{bringing}]'"] if bringing else []), *named])


def _extra(package: str) -> str | None:
    try:
        about = metadata.metadata(_DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None
    markers = [
        requirement.marker
        for requirement in map(Requirement, about.get_all("Requires-Dist") or ())
        if canonicalize_name(requirement.name) == canonicalize_name(package)
    ]
    extras: list[str] = about.get_all("Provides-Extra") or []
    return next((extra for extra in extras if any(m and m.evaluate({"extra": extra}) for m in markers)), None)
