"""Every task, by the name that `fastbert finetune` has for it."""

import difflib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastbert.errors import InputError
from fastbert.tasks import FILE, choice, glue, sequences
from fastbert.tasks.squad import task as squad
from fastbert.tasks.tagging import task as tagging
from fastbert.tasks.task import Given, Task

TASKS: dict[str, type[Task]] = {
    **dict.fromkeys(glue.TASKS, glue.GlueTask),
    **dict.fromkeys(sequences.PROBLEMS, sequences.SequenceTask),
    **dict.fromkeys(choice.LAYOUTS, choice.PublishedChoiceTask),
    "choice": choice.ChoiceTask,
    **dict.fromkeys(squad.RECIPES, squad.SquadTask),
    **dict.fromkeys(tagging.TASKS, tagging.TaggingTask),
}


def make(name: str, given: Given) -> Task:
    """Raises: InputError, if there is no such task, or what is given is not for it."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, 1)
        raise InputError(f"there is no task {name!r}{f', perhaps {close[0]}' if close else ''}: {', '.join(TASKS)}")
    return TASKS[name](name, given)


def load(model: str, given: Given) -> tuple[Task, dict[str, Any]] | None:
    """The task that a model was tuned for, with other data, and what else its folder says of it; None if nothing.

    Args:
        given: what it says takes the place of what the folder says.

    Raises:
        InputError: if the folder's file is damaged.
    """
    path = Path(model) / FILE
    if not path.is_file():
        return None
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(Given)}
        options = {key: tuple(v) if isinstance(v, list) else v for key, v in about["options"].items() if key in known}
        paths = {"train": given.train, "dev": given.dev, "test": given.test}
        task = make(about["task"], Given(**{**options, **given.options, **paths}))
        task.decided = dict(about.get("decided", {}))
        return task, about
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no task of fastbert's: {error}") from error
