"""Which model does what, as its own files say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastbert.inference.classifier import Classifier, scoring
from fastbert.inference.embedder import Embedder
from fastbert.inference.loading import load_config
from fastbert.inference.server.service import Served
from fastbert.inference.tokens import Tokens


def load(name_or_path: str, *, name: str | None, dtype: str, device: torch.device, **options: Any) -> Served:
    """A checkpoint from a directory or the Hugging Face hub, for a server.

    Args:
        name: what requests call it; its directory's name, or the one on the hub, where it is None.
        options: of the engine.

    Raises:
        InputError: if it cannot be loaded.
    """
    path = Path(name_or_path)
    called = name or (path.resolve().name if path.is_dir() else name_or_path)
    architectures = load_config(name_or_path).architectures or ()
    if any(architecture.endswith("ForSequenceClassification") for architecture in architectures):
        return _scored(called, Classifier.from_pretrained(name_or_path, dtype=dtype, device=device, **options))
    return _embedded(called, Embedder.from_pretrained(name_or_path, dtype=dtype, device=device, **options))


def _embedded(name: str, engine: Embedder) -> Served:
    def tokenize(texts: Sequence[str], prompt: str | None = None) -> Tokens:
        tokens = engine.tokenize(texts, prompt=prompt)
        # Texts with other prompts share a batch, but for a model that leaves the prompt out of its vector.
        return replace(tokens, prompt=0) if engine.pooling.include_prompt else tokens

    return Served("embedder", name, engine, tokenize, engine.results)


def _scored(name: str, engine: Classifier) -> Served:
    model, labels = engine.model, engine.labels
    return Served(
        "reranker" if len(labels) == 1 else "classifier",
        name,
        engine,
        engine.tokenize,
        lambda tokens: engine.gather(tokens, len(labels), lambda batch: model(**batch.inputs()).logits.float()),
        labels,
        scoring(model.config),
    )
