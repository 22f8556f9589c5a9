"""data2vec's text encoder (Baevski et al. 2022, https://arxiv.org/abs/2202.03555): RoBERTa's architecture."""

from transformers.models.data2vec import modeling_data2vec_text as stock

from fastbert.families._family import family, named
from fastbert.families.roberta import ROLES

globals().update(family(stock, named("Data2VecText", ROLES)))
