"""RoBERTa-PreLayerNorm (Ott et al. 2019, https://arxiv.org/abs/1904.01038): RoBERTa that normalises first."""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.roberta_prelayernorm import modeling_roberta_prelayernorm as stock

from fastbert import encoder, touched
from fastbert.encoder import Run
from fastbert.families import _model, _prenorm, roberta
from fastbert.families._family import family, named
from fastbert.touched import Parts


class BaseModel(_model.BaseModel):
    """With the last LayerNorm behind its encoder."""

    parts: ClassVar[Parts] = {**_model.BaseModel.parts, "LayerNorm": touched.norm}

    def _finish(self, hidden_TN: Tensor, run: Run) -> Tensor:
        return encoder.normalise(hidden_TN, self.LayerNorm, run.called)

    def _finishers(self) -> tuple[nn.Module, ...]:
        return tuple(self.LayerNorm.modules())


ROLES: dict[str, Any] = {**roberta.ROLES, **_prenorm.LAYERS, "Embeddings": roberta.Embeddings, "Model": BaseModel}
globals().update(family(stock, named("RobertaPreLayerNorm", ROLES)))
