"""With this folder on PYTHONPATH, the modules that FASTBERT_WITHOUT names are not installed, in no process."""

import os
import sys
from typing import Any

MISSING = os.environ.get("FASTBERT_WITHOUT", "").split()


class Finding:
    """A finder's `find_spec` that does not find them."""

    def __init__(self, find_spec: Any) -> None:
        self.find_spec = find_spec

    def __call__(self, name: str, *rest: Any, **named: Any) -> Any:
        return None if name in MISSING else self.find_spec(name, *rest, **named)


for finder in sys.meta_path if MISSING else ():
    finder.find_spec = Finding(finder.find_spec)  # type: ignore[method-assign]
