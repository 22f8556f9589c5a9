"""fastbert: BERT encoders on one packed path, drop-in for transformers' models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.families._base import FellBack
    from fastbert.models import (
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
    )
    from fastbert.patching import Report, patch, report, unpatch
    from fastbert.warmup import WarmUp, warm_up

__version__ = "0.1.0"

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "FellBack",
    "Report",
    "WarmUp",
    "patch",
    "report",
    "unpatch",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `fastbert --help` need not wait for torch and transformers."""
    if name not in __all__:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    homes = {"FellBack": "families._base", "WarmUp": "warmup", "warm_up": "warmup"}
    home = "models" if name.startswith("Bert") else homes.get(name, "patching")
    value = globals()[name] = getattr(import_module(f"fastbert.{home}"), name)
    return value
