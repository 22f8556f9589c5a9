"""The drop-in classes: transformers' names, arguments and outputs, on the packed encoder. What there is: `__all__`."""

from transformers import PreTrainedModel

from fastbert.families import CLASSES

_MODELS = {kind.__name__: kind for kind in CLASSES.values() if issubclass(kind, PreTrainedModel)}
__all__ = sorted(_MODELS)
globals().update(_MODELS)
