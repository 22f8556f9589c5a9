"""How each transformers family maps onto the encoder. A family is one file; `patch` finds its classes in CLASSES."""

from fastbert.families import bert, bert_heads, bert_layers, bert_lm_heads
from fastbert.families._base import CLASSES

__all__ = ["CLASSES", "bert", "bert_heads", "bert_layers", "bert_lm_heads"]
