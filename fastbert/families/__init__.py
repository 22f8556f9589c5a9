"""How each transformers family maps onto the encoder. A family is one file; `patch` finds its classes in CLASSES."""

import importlib
import pkgutil

from fastbert.families._base import CLASSES

__all__ = ["CLASSES", "FAMILIES"]

FAMILIES = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
for _name in FAMILIES:
    importlib.import_module(f"{__name__}.{_name}")
