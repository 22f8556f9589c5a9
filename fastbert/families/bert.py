"""BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805); SpanBERT, MiniLM, LaBSE, e5, bge are BERT by name.

So are BioBERT, SciBERT, the Chinese BERTs and most sentence encoders: transformers' own BERT classes load them.
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
