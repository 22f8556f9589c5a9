"""Words with tags, made up, and the tasks that read them."""

from pathlib import Path
from typing import Any

import numpy as np

from fastbert.tasks import registry
from fastbert.tasks.examples import Examples
from fastbert.tasks.tagging.task import TaggingTask
from fastbert.tasks.task import TRAIN, Given

COLUMNS = """-DOCSTART- -X- O O

the DT I-NP O
cat NN I-NP I-ANIMAL
dog NN B-NP B-ANIMAL
sat VBD I-VP O

birds NNS I-NP I-ANIMAL
on IN I-PP O
mat NN I-NP I-PLACE
tree NN I-NP I-PLACE
"""
IOB2 = [["O", "B-ANIMAL", "B-ANIMAL", "O"], ["B-ANIMAL", "O", "B-PLACE", "I-PLACE"]]
SENTENCES = [["the", "cat", "dog", "sat"], ["birds", "on", "mat", "tree"]]
TAGS = {"cat": "I-ANIMAL", "dog": "I-ANIMAL", "birds": "I-ANIMAL", "mat": "I-PLACE", "tree": "I-PLACE"}
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "birds", "mat", "tree", "cats", "small"]


def task(path: Any, name: str = "tag", **options: Any) -> TaggingTask:
    made = registry.make(name, Given(train=str(path), **options))
    assert isinstance(made, TaggingTask)
    return made


def written(folder: Path, text: str, name: str = "train.txt") -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def read(path: Any, name: str = "tag", **options: Any) -> Examples:
    return task(path, name, **options).read(TRAIN)[TRAIN]


def made_up(folder: Path, name: str, sentences: int, seed: int) -> Path:
    """Whose tags follow from the words: IOB1, as CoNLL has it."""
    random = np.random.default_rng(seed)
    lines = []
    for _ in range(sentences):
        words = random.choice(WORDS, random.integers(2, 12)).tolist()
        lines += [f"{word} X X {TAGS.get(word, 'O')}" for word in words] + [""]
    return written(folder, "\n".join(lines), name)
