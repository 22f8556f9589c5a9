"""The drop-in classes: transformers' names, arguments and outputs, on the packed encoder."""

from fastbert.families.bert import BertModel
from fastbert.families.bert_heads import (
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from fastbert.families.bert_lm_heads import BertForMaskedLM, BertForPreTraining, BertLMHeadModel

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
]
