"""How each transformers family maps onto the encoder. A family is one file; `patch` finds its classes in CLASSES."""

from fastbert.families import bert

CLASSES = {**bert.CLASSES}
