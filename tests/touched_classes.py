"""The classes that are touched, tiny, and which modules a family has of its own."""

import functools
import re

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from fastbert.families import CLASSES as FAST
from tests.families import dropping
from tests.models import config_of

CLASSES = tuple(kind.__name__ for kind in FAST if issubclass(kind, PreTrainedModel))  # of all families
BERTS = tuple(name for name in CLASSES if name.startswith("Bert"))
OTHERS = (  # in which almost all stands that is the other families' own
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    "ErnieForNextSentencePrediction",
    "ElectraForCausalLM",
    "ElectraForPreTraining",
    "ElectraForMultipleChoice",
    "AlbertForMaskedLM",
    "AlbertForPreTraining",
    "DistilBertForMaskedLM",
    "DistilBertForQuestionAnswering",
    "DistilBertForSequenceClassification",
    "RobertaPreLayerNormForMaskedLM",
    "XLMRobertaXLForCausalLM",
)


def tiny(name: str) -> PretrainedConfig:
    """Of a class, without dropout."""
    layers = 2 if name.endswith("MaskedLM") or name.startswith("Albert") else 1  # the last one may be another
    groups = 2 if name == "AlbertForPreTraining" else 1  # else one layer runs twice
    return config_of(
        name,
        vocab_size=20,
        hidden_size=8,
        embedding_size=6,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        inner_group_num=groups,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dim=16,
        max_position_embeddings=8,
        layer_norm_eps=0.01,
        **dropping(0.0),
    )


@functools.cache
def own_paths(name: str) -> list[str]:
    """Modules of one of OTHERS whose role, or whose place in another role, neither BERT has nor one before it."""
    before = [*BERTS, *OTHERS[: OTHERS.index(name)]]
    known = {part for other in before for part in _roles(other).values()}
    first = {part: path for path, part in reversed(_roles(name).items()) if part not in known}
    return [*reversed(first.values())]


@functools.cache
def _roles(name: str) -> dict[str, tuple[type, str, type]]:
    """By a module's path: the role of what it is in, its name there, and its own; PyTorch's class where it has none."""
    with torch.device("meta"):
        model = getattr(transformers, name)(tiny(name))

    def role(module: nn.Module) -> type:
        fast = FAST.get(type(module))
        return type(module) if fast is None else fast.__mro__[1]

    base = model.base_model_prefix
    splits = {path: path.rpartition(".") for path, _ in model.named_modules()}
    return {
        path: (role(model.get_submodule(parent)), re.sub(rf"^({base}|\d+)$", "", last), role(model.get_submodule(path)))
        for path, (parent, _, last) in splits.items()
    }
