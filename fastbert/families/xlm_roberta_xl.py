"""XLM-RoBERTa-XL (Goyal et al. 2021, https://arxiv.org/abs/2105.00572): XLM-RoBERTa that normalises first."""

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.xlm_roberta_xl import modeling_xlm_roberta_xl as stock

from fastbert import encoder, touched
from fastbert.encoder import Run
from fastbert.families import _inputs, _layers, _model, _prenorm, roberta
from fastbert.families._family import family, named
from fastbert.touched import Each, Parts, container


class Embeddings(roberta.Embeddings):
    """Without a LayerNorm: a sum of rows, which PyTorch's own operators do."""

    parts: ClassVar[Parts] = {name: role for name, role in roberta.Embeddings.parts.items() if name != "LayerNorm"}

    def _packed(self, run: Run, inputs: _inputs.Inputs) -> Tensor:
        if inputs.inputs_embeds is None:
            words_TN = self.word_embeddings(inputs.input_ids)
        else:
            words_TN = inputs.inputs_embeds.index_select(0, inputs.input_ids)
        types_TN = self.token_type_embeddings(inputs.token_type_ids)
        hidden_TN = words_TN + types_TN + self.position_embeddings(inputs.position_ids)
        return self.as_residual(self.dropout(hidden_TN))

    def fusions(self) -> _layers.Fusions:
        return [("embedding sum + LayerNorm + dropout", "there is no LayerNorm")]


class Attention(_prenorm.Attention):
    _norm = "self_attn_layer_norm"
    parts: ClassVar[Parts] = {
        "self": container(_layers.SelfAttention),
        "output": container(_prenorm.ProjectAndSum),
        "self_attn_layer_norm": touched.norm,
    }


class Layer(_prenorm.Layer):
    """With the LayerNorm of its feed-forward."""

    parts: ClassVar[Parts] = {**_prenorm.Layer.parts, "LayerNorm": touched.norm}

    def _before(self, attended_TN: Tensor, run: Run) -> Tensor:
        return encoder.normalise(attended_TN, self.LayerNorm, run.called)

    def _norm_before(self) -> Any:
        return self.LayerNorm


class Encoder(_prenorm.Encoder):
    """With the last LayerNorm."""

    parts: ClassVar[Parts] = {"layer": Each(container(Layer)), "LayerNorm": touched.norm}


class BaseModel(_model.BaseModel):
    parts: ClassVar[Parts] = {**_model.BaseModel.parts, "encoder": container(Encoder)}

    def _last_norm(self) -> Any:
        return self.encoder.LayerNorm


ROLES: dict[str, Any] = {
    **roberta.ROLES,
    **_prenorm.LAYERS,
    "Embeddings": Embeddings,
    "Attention": Attention,
    "Intermediate": _layers.Intermediate,
    "Layer": Layer,
    "Encoder": Encoder,
    "Model": BaseModel,
}
globals().update(family(stock, named("XLMRobertaXL", ROLES)))
