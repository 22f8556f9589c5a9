"""ELECTRA (Clark et al. 2020, https://arxiv.org/abs/2003.10555): narrow embeddings, no pooler, two heads of its own."""

from collections.abc import Set
from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.electra import modeling_electra as stock
from transformers.utils.generic import can_return_tuple

from fastbert import functional, touched
from fastbert.families import _heads, _layers, _lm_heads, _model
from fastbert.families._family import Role, family, named
from fastbert.touched import Parts, container


class BaseModel(_model.BaseModel):
    parts: ClassVar[Parts] = {**_model.BaseModel.parts, "embeddings_project": touched.linear}
    _output = BaseModelOutputWithPastAndCrossAttentions

    def _projects(self) -> bool:
        return getattr(self, "embeddings_project", None) is not None

    def _project(self, embedded_TN: Tensor) -> Tensor:
        project = getattr(self, "embeddings_project", None)
        return embedded_TN if project is None else cast(Tensor, project(embedded_TN))


class GeneratorPredictions(_lm_heads.Transform):
    """The half of the generator's head before the vocabulary."""

    parts: ClassVar[Parts] = {"dense": touched.linear, "activation": touched.activation, "LayerNorm": touched.norm}

    def _leaves(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.dense, self.activation, self.LayerNorm


class _Words(_lm_heads.OwnWords):
    parts: ClassVar[Parts] = {
        **_heads.TokenHead.parts,
        "generator_predictions": container(GeneratorPredictions),
        "generator_lm_head": touched.linear,
    }

    def _transformed(self, hidden_states: Tensor, called: Set[nn.Module]) -> Tensor:
        return cast(Tensor, self.generator_predictions(hidden_states, called=called))

    def _decoder(self) -> nn.Module:
        return cast(nn.Module, self.generator_lm_head)

    def _word_modules(self) -> tuple[nn.Module, ...]:
        return (*self.generator_predictions.modules(), *self.generator_lm_head.modules())


class MaskedLM(_Words, _lm_heads.MaskedLM):
    """The generator."""


class CausalLM(_Words, _lm_heads.CausalLM):
    """Left-to-right language model."""


class DiscriminatorPredictions(Role):
    """transformers' own: of (..., N) it makes (...)."""

    parts: ClassVar[Parts] = {
        "dense": touched.linear,
        "activation": touched.activation,
        "dense_prediction": touched.linear,
    }


class Discriminator(_heads.TokenHead):
    """Was this token replaced? A logit a token."""

    parts: ClassVar[Parts] = {
        **_heads.TokenHead.parts,
        "discriminator_predictions": container(DiscriminatorPredictions),
    }

    @can_return_tuple
    def packed(self, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' arguments and outputs; honours `num_items_in_batch`. Logits of padding are zeros."""
        num_items = kwargs.pop("num_items_in_batch", None)
        output, states = self._encode(None, **kwargs)
        loss, mask = None, kwargs.get("attention_mask")
        if states is None:
            logits = self.discriminator_predictions(output.last_hidden_state)
        else:
            logits = states.packing.unpack(self.discriminator_predictions(states.all_TN()))
        if labels is not None:
            if mask is not None:
                keep = (mask == 1).expand(logits.shape)
                chosen, labels = logits[keep], labels.view(logits.shape)[keep]
            else:
                chosen, labels = logits.reshape(-1), labels.reshape(-1)
            if num_items is None:
                loss = F.binary_cross_entropy_with_logits(chosen, labels.to(chosen.dtype))
            else:
                total = F.binary_cross_entropy_with_logits(chosen, labels.to(chosen.dtype), reduction="sum")
                loss = functional.divide(total, num_items)
        return stock.ElectraForPreTrainingOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


class SequenceSummary(Role):
    """transformers' own."""


class MultipleChoice(_heads.FirstTokenChoices):
    """Its summary may be of other tokens than the first."""

    parts: ClassVar[Parts] = {**_heads.SequenceHead.parts, "sequence_summary": container(SequenceSummary)}

    def _reads(self) -> str:
        return "first" if self.sequence_summary.summary_type == "first" else "sequence_summary"


ROLES: dict[str, type[Role]] = {
    **{name: role for name, role in _layers.LAYERS.items() if name != "Pooler"},
    "Model": BaseModel,
    "GeneratorPredictions": GeneratorPredictions,
    "DiscriminatorPredictions": DiscriminatorPredictions,
    "ClassificationHead": _heads.ClassificationHead,
    "SequenceSummary": SequenceSummary,
    "ForPreTraining": Discriminator,
    "ForMaskedLM": MaskedLM,
    "ForCausalLM": CausalLM,
    "ForSequenceClassification": _heads.FirstTokenHead,
    "ForMultipleChoice": MultipleChoice,
    "ForTokenClassification": _heads.TokenClassification,
    "ForQuestionAnswering": _heads.QuestionAnswering,
}

globals().update(family(stock, named("Electra", ROLES)))
