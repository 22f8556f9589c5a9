"""Queries and documents to scores, by any model for sequence classification: sentence-transformers' CrossEncoder."""

import importlib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.encoding import checked, is_pair, is_text
from fastbert.inference.engine import Progress
from fastbert.inference.folder import CROSS, read_folder
from fastbert.inference.heads import HeadEngine
from fastbert.inference.tokens import Tokens
from fastbert.inference.vectors import lower_case


@dataclass(frozen=True)
class Ranked:
    """A document, its index among those that were given, and its score."""

    index: int
    score: float
    document: str


class Reranker(HeadEngine):
    """Scores of documents for a query, as sentence-transformers' CrossEncoder has them.

    Args:
        activation: of logits; where it is None what the model's config names, else a sigmoid where there is one label,
            and nothing where there are several.
        prompt: what is put before each query.
        options: of `Engine`.

    Raises:
        InputError: if an option is out of range, the model has another head, or its activation is none of PyTorch's.
    """

    _auto = AutoModelForSequenceClassification
    _head = "ForSequenceClassification"
    _items = {"pair (query, document)": is_pair}  # noqa: RUF012

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        activation: nn.Module | None = None,
        prompt: str = "",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        named = _named(model.config)
        default = nn.Sigmoid() if len(self.labels) == 1 else nn.Identity()
        self.activation = activation or (_activation(named) if named else default)
        self.prompt = prompt

    @classmethod
    def from_pretrained(
        cls, name: str, *, dtype: torch.dtype | str = "fp32", device: torch.device | str = "cpu", **options: Any
    ) -> "Reranker":
        """From a directory or the Hugging Face hub; `options` are those of the class.

        Of a folder of sentence-transformers, its activation, default prompt and lengths are taken.

        Raises:
            InputError: as `HeadEngine.from_pretrained`; if the folder was made for something else, or asks for what
                fastbert cannot do.
        """
        folder = read_folder(name, CROSS)
        if folder.modules:
            kinds = ", ".join(module.kind for module in folder.modules)
            raise InputError(f"{name} has {kinds} behind its model, but a Reranker takes the model's own head alone")
        model, tokenizer = cls._load(folder.transformer, dtype, device)
        if folder.max_length is not None:
            tokenizer.model_max_length = folder.max_length
        if folder.lower_case:
            lower_case(tokenizer)
        if folder.prompt is not None:
            options = {"prompt": folder.prompts[folder.prompt], **options}
        if folder.activation is not None and options.get("activation") is None:
            options["activation"] = _activation(folder.activation)
        return cls(model, tokenizer, **options)

    def tokenize(self, items: Iterable[Any], progress: Progress | None = None) -> Tokens:
        """Pairs (query, document) to ids; see `Engine.tokenize`."""
        if not self.prompt:
            return super().tokenize(items, progress)
        pairs = checked(items, self._items)
        return super().tokenize([(self.prompt + query, document) for query, document in pairs], progress)

    def score(self, query: str, documents: Iterable[str]) -> npt.NDArray[np.float32]:
        """(D,) float32, a score for each document, in their order; (D, C) where the model has C > 1 labels.

        Raises:
            InputError: if there are no documents, or one of them or the query is no string.
        """
        return self.score_pairs([(query, document) for document in _documents(query, documents)])

    def score_pairs(self, pairs: Iterable[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """(B,) float32, a score for each (query, document), in their order; (B, C) where the model has C > 1 labels.

        Raises:
            InputError: naming a pair that is none.
        """
        return self.results(self.tokenize(pairs))

    def rank(self, query: str, documents: Iterable[str], top_k: int | None = None) -> list[Ranked]:
        """The documents, best first.

        Args:
            top_k: how many; all where it is None.

        Raises:
            InputError: as `score`; if the model has several labels, so that there is no one score to rank by.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k must be at least 1, but is {top_k}")
        if len(self.labels) > 1:
            raise InputError(f"a model of {len(self.labels)} labels ranks nothing: take its scores, or a Classifier")
        listed = _documents(query, documents)
        scores = self.score(query, listed)
        best = np.argsort(-scores, kind="stable")[:top_k].tolist()
        return [Ranked(i, float(scores[i]), listed[i]) for i in best]

    def results(self, tokens: Tokens, progress: Progress | None = None) -> npt.NDArray[np.float32]:
        """As `score_pairs`, of tokenised pairs; `progress` as in `Engine.gather`."""
        scores_BC = self.gather(
            tokens,
            len(self.labels),
            lambda batch: self.activation(self.model(**batch.inputs()).logits.float()),
            progress,
        )
        return scores_BC[:, 0] if scores_BC.shape[1] == 1 else scores_BC


def _documents(query: Any, documents: Any) -> list[str]:
    if not isinstance(query, str):
        raise InputError(f"a query must be a string, but is {reprlib.repr(query)}")
    listed = checked(() if documents is None else documents, {"document (a string)": is_text})
    if not listed:
        raise InputError("a query needs documents to score, but has none")
    return listed


def _named(config: Any) -> str | None:
    """The activation that sentence-transformers 4 and 5 wrote into config.json, or older ones."""
    named = getattr(config, "sentence_transformers", None) or {}
    return named.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)


def _activation(path: str) -> nn.Module:
    home, _, kind = path.rpartition(".")
    if not home.startswith("torch.nn."):
        raise InputError(f"the activation {path} is none of PyTorch's: give Reranker the one to use, as activation=...")
    activation: nn.Module = getattr(importlib.import_module(home), kind)()
    return activation
