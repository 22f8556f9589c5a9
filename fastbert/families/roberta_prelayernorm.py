"""RoBERTa-PreLayerNorm (Ott et al. 2019, https://arxiv.org/abs/1904.01038): RoBERTa that normalises first."""

from typing import Any, ClassVar

from transformers.models.roberta_prelayernorm import modeling_roberta_prelayernorm as stock

from fastbert import touched
from fastbert.families import _model, _prenorm, roberta
from fastbert.families._family import family, named
from fastbert.touched import Parts


class BaseModel(_model.BaseModel):
    """With the last LayerNorm behind its encoder."""

    parts: ClassVar[Parts] = {**_model.BaseModel.parts, "LayerNorm": touched.norm}

    def _last_norm(self) -> Any:
        return self.LayerNorm


ROLES: dict[str, Any] = {**roberta.ROLES, **_prenorm.LAYERS, "Embeddings": roberta.Embeddings, "Model": BaseModel}
globals().update(family(stock, named("RobertaPreLayerNorm", ROLES)))
