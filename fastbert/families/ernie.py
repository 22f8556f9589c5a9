"""ERNIE 2.0 (Sun et al. 2019, https://arxiv.org/abs/1907.12412): BERT, and perhaps a table of task types."""

import dataclasses
from typing import Any, ClassVar

import torch
from transformers.models.ernie import modeling_ernie as stock

from fastbert import touched
from fastbert.families import _inputs, _layers, _model, bert
from fastbert.families._family import family, named
from fastbert.families._lm_heads import CausalLM
from fastbert.touched import Parts


class Embeddings(_layers.Embeddings):
    parts: ClassVar[Parts] = {**_layers.Embeddings.parts, "task_type_embeddings": touched.unpadded_table}
    facts = ("use_task_id",)

    def _limits(self, size: int, device: torch.device) -> _inputs.Limits:
        tasks = _layers.rows_of(self.task_type_embeddings) if self.use_task_id else None
        return dataclasses.replace(super()._limits(size, device), task_type_vocab_size=tasks)

    def _more(self, inputs: _inputs.Inputs) -> dict[str, Any]:
        if inputs.task_type_ids is None:
            return {}
        return {"task_type_ids": inputs.task_type_ids, "task_type": self.task_type_embeddings}


class BaseModel(_model.BaseModel):
    _embeddings_take = (*_model.BaseModel._embeddings_take, "task_type_ids")


ROLES = {**bert.ROLES, "Embeddings": Embeddings, "Model": BaseModel, "ForCausalLM": CausalLM}
globals().update(family(stock, named("Ernie", ROLES)))
