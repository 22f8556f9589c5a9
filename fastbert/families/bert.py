"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805).

Also what is BERT by another name, in transformers' own classes: SpanBERT, MiniLM, LaBSE, BioBERT, Chinese BERTs.
"""

from transformers.models.bert import modeling_bert as stock

from fastbert.families._family import family, named
from fastbert.families._heads import HEADS
from fastbert.families._layers import LAYERS
from fastbert.families._lm_heads import CausalLM, MaskedLM, PredictionHead, PredictionHeads, PreTraining, Transform
from fastbert.families._model import BaseModel

ROLES = {
    **LAYERS,
    "Model": BaseModel,
    **HEADS,
    "PredictionHeadTransform": Transform,
    "LMPredictionHead": PredictionHead,
    "OnlyMLMHead": PredictionHeads,
    "PreTrainingHeads": PredictionHeads,
    "ForMaskedLM": MaskedLM,
    "ForPreTraining": PreTraining,
}

globals().update(family(stock, named("Bert", {**ROLES, "LMHeadModel": CausalLM})))
