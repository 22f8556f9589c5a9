"""CamemBERT (Martin et al. 2019, https://arxiv.org/abs/1911.03894): RoBERTa for French."""

from transformers.models.camembert import modeling_camembert as stock

from fastbert.families._family import family, named
from fastbert.families.roberta import ROLES

globals().update(family(stock, named("Camembert", ROLES)))
