"""fastbert: BERT encoders on one packed path, drop-in for transformers' models."""

from fastbert.families._base import FellBack
from fastbert.models import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from fastbert.patch import Report, patch, report, unpatch

__version__ = "0.1.0"

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "FellBack",
    "Report",
    "patch",
    "report",
    "unpatch",
]
