"""XLM-RoBERTa (Conneau et al. 2019, https://arxiv.org/abs/1911.02116), bge-m3, multilingual-e5: as RoBERTa."""

from transformers.models.xlm_roberta import modeling_xlm_roberta as stock

from fastbert.families._family import family, named
from fastbert.families.roberta import ROLES

globals().update(family(stock, named("XLMRoberta", ROLES)))
