"""RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692): BERT's layers, another input and other heads.

Positions begin behind the padding id and are counted over the ids that are not it, whatever the attention mask says.
"""

import dataclasses
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.roberta import modeling_roberta as stock

from fastbert import touched
from fastbert.families import _heads, _inputs, _layers, _lm_heads
from fastbert.families._family import Role, family, named
from fastbert.families._model import BaseModel
from fastbert.touched import Parts, container

_GELU: nn.Module = ACT2FN["gelu"]


class Embeddings(_layers.Embeddings):
    parts: ClassVar[Parts] = {**_layers.Embeddings.parts, "position_embeddings": touched.table}
    buffers_read = ("token_type_ids",)
    facts = ("padding_idx",)

    def _limits(self, size: int, device: torch.device) -> _inputs.Limits:
        return dataclasses.replace(super()._limits(size, device), padding_idx=self.padding_idx)


class LMHead(_lm_heads.Half, _lm_heads.PredictionHead):
    parts: ClassVar[Parts] = {"dense": touched.linear, "layer_norm": touched.norm, "decoder": touched.linear}

    def _leaves(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.dense, _GELU, self.layer_norm


class _Words(_lm_heads.LMHead):
    parts: ClassVar[Parts] = {**_heads.TokenHead.parts, "lm_head": container(LMHead)}

    def _head(self) -> Any:
        return self.lm_head


class MaskedLM(_Words, _lm_heads.MaskedLM):
    """Masked language model."""


class CausalLM(_Words, _lm_heads.CausalLM):
    """Left-to-right language model."""


ROLES: dict[str, type[Role]] = {
    **_layers.LAYERS,
    "Embeddings": Embeddings,
    "Model": BaseModel,
    "LMHead": LMHead,
    "ClassificationHead": _heads.ClassificationHead,
    "ForMaskedLM": MaskedLM,
    "ForCausalLM": CausalLM,
    "ForSequenceClassification": _heads.FirstTokenHead,
    "ForMultipleChoice": _heads.OfChoices,
    "ForTokenClassification": _heads.TokenClassification,
    "ForQuestionAnswering": _heads.QuestionAnswering,
}

globals().update(family(stock, named("Roberta", ROLES)))
