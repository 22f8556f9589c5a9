"""fastbert: BERT encoders on one packed path, drop-in for transformers' models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbert.families._base import FellBack as FellBack
    from fastbert.inference.answerer import Answerer as Answerer
    from fastbert.inference.chooser import Chooser as Chooser
    from fastbert.inference.classifier import Classifier as Classifier
    from fastbert.inference.embedder import Embedder as Embedder
    from fastbert.inference.graphs import Graphs as Graphs
    from fastbert.inference.graphs import graphs as graphs
    from fastbert.inference.reranker import Reranker as Reranker
    from fastbert.inference.sparse import SparseEmbedder as SparseEmbedder
    from fastbert.inference.stream import Stream as Stream
    from fastbert.inference.tagger import Tagger as Tagger
    from fastbert.models import *  # noqa: F403
    from fastbert.patching import Report as Report
    from fastbert.patching import patch as patch
    from fastbert.patching import report as report
    from fastbert.patching import unpatch as unpatch
    from fastbert.warmup import WarmUp as WarmUp
    from fastbert.warmup import warm_up as warm_up

__version__ = "0.1.0"

_HOMES = {
    "Answerer": "inference.answerer",
    "Chooser": "inference.chooser",
    "Classifier": "inference.classifier",
    "Embedder": "inference.embedder",
    "FellBack": "families._base",
    "Graphs": "inference.graphs",
    "graphs": "inference.graphs",
    "patch": "patching",
    "Report": "patching",
    "report": "patching",
    "Reranker": "inference.reranker",
    "SparseEmbedder": "inference.sparse",
    "Stream": "inference.stream",
    "Tagger": "inference.tagger",
    "unpatch": "patching",
    "warm_up": "warmup",
    "WarmUp": "warmup",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: `fastbert --help` need not wait for torch and transformers."""
    if name == "__all__":
        return [*_HOMES, *import_module("fastbert.models").__all__]
    home = _HOMES.get(name)
    if home is None and (name[:1].isupper() and name in import_module("fastbert.models").__all__):
        home = "models"
    if home is None:
        raise AttributeError(f"module 'fastbert' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastbert.{home}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
