"""Folders as sentence-transformers writes them, of tiny encoders with random weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_checkpoint

TEXTS = [
    *("the cat sat on the mat", "a dog ran", "", "the big red birds sang and the small cat ran under a tree", "dogs"),
    *("  the Cat SAT ", "zebras", "a big dog and a small dog and a red dog and a bird and a cat " * 4),
]


def st_folder(path: Path, *modules: Any, encoder: str | None = None, **settings: Any) -> str:
    """A folder of sentence-transformers' own making: an encoder of 32 features, and these modules.

    Args:
        encoder: a checkpoint; one of random weights where it is None.
        settings: of `SentenceTransformer`.
    """
    library = pytest.importorskip("sentence_transformers")
    transformer = library.sentence_transformer.modules.Transformer(encoder or tiny_checkpoint(path / "encoder"))
    library.SentenceTransformer(modules=[transformer, *modules], device="cpu", **settings).save(str(path / "saved"))
    return str(path / "saved")


def with_json(folder: str, file: str, **changes: Any) -> str:
    """A folder of which a JSON file is changed, or made; in place."""
    path = Path(folder) / file
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(found | changes))
    return folder


def copy_of(folder: str, path: Path) -> str:
    shutil.copytree(folder, path)
    return str(path)
