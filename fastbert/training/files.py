"""What is in a run's folder, and whose it is."""

import re
from pathlib import Path
from typing import Any

from fastbert.data.store import read_json, write_json
from fastbert.errors import InputError
from fastbert.training import checkpoints

LOG = "log.jsonl"
RUN = "run.json"
BEST = "best"  # the model with the lowest loss on held-out text
EVALUATION = "evaluation.json"  # in it: which step's, and its figures
MODEL = "model"
_DIGEST = re.compile("[0-9a-f]{32,}")


def adopt(output: Path, now: dict[str, Any]) -> None:
    """Begin a run's folder, or see that it is this run's.

    Args:
        now: what the folder says of the run; "fixed" must be the same while it goes on.

    Raises:
        InputError: see `check`.
    """
    check(output, now)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / RUN, now)


def check(output: Path, now: dict[str, Any]) -> None:
    """Raises: InputError, if a folder is another run's, naming what is another."""
    before = read_json(output / RUN)
    if before is None:
        if checkpoints.last_checkpoint(output) is not None:
            raise InputError(f"{output} has checkpoints, but no {RUN}: they are another program's")
    elif changed := differences(before.get("fixed", {}), now["fixed"]):
        raise InputError(
            f"{output} is another run: {'; '.join(changed[:3])}{f'; {len(changed) - 3} more' if changed[3:] else ''}."
            " Go on with its options, or choose another folder"
        )


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What is another value now, one a line."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            known = all(value is None or _DIGEST.fullmatch(str(value)) is None for value in (a, b))
            words = ["none" if value is None else value for value in (a, b)]
            found.append(f"{prefix}{key} " + ("was {}, and is {}".format(*words) if known else "is another one"))
    return found
