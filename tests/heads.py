"""Tiny checkpoints of any family with any head, with a tokenizer of the family's kind."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer
from transformers import BertTokenizer, DistilBertTokenizer, PreTrainedTokenizerBase, RobertaTokenizer

from tests.checkpoints import SPECIAL, WORDS
from tests.families import dropping
from tests.models import config_of

LENGTH = 48
VOCABULARY = 300
QUERY = "the big cat sat"
DOCUMENTS = [
    "a dog ran under the tree and the birds sang on it",
    "",
    "dogs",
    "the small red house and the cat on the mat sang",
    "the cat ran and the bird sat on the big red tree " * 6,
]
PAIRS = [(QUERY, document) for document in DOCUMENTS]
LONG = "the cats sat on a big red mat and the small bird sang under the tree and ran on " * 8


def checkpoint(folder: Path, name: str, **config: object) -> str:
    """Random weights, saved as transformers saves them. Logits are far apart: a wrong one shows."""
    tokenizer = byte_level() if name.startswith(("Roberta", "Camembert", "XLM")) else word_piece(name)
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 2, "max_position_embeddings": LENGTH + 2, "vocab_size": VOCABULARY + 2}
    settings |= {"pad_token_id": tokenizer.pad_token_id}
    settings = config_of(name, **dropping(0.0), **settings)
    for key, value in config.items():
        setattr(settings, key, value)
    model = getattr(transformers, name)(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.get_input_embeddings().weight.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def word_piece(name: str = "Bert") -> PreTrainedTokenizerBase:
    """[CLS] a [SEP] b [SEP]; DistilBERT's has no token types."""
    kind = DistilBertTokenizer if name.startswith("DistilBert") else BertTokenizer
    words = [*SPECIAL, *WORDS, ",", ".", "-"]
    return kind(vocab={word: i for i, word in enumerate(words)}, model_max_length=LENGTH)


@functools.cache
def _merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    learner = ByteLevelBPETokenizer()
    learner.train_from_iterator([LONG, *DOCUMENTS], vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>", "</s>"])
    state = json.loads(learner._tokenizer.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


def byte_level() -> PreTrainedTokenizerBase:
    """<s> a </s></s> b </s>, with offsets that leave out the blank before a word."""
    vocabulary, merges = _merges()
    return RobertaTokenizer(
        vocab={**vocabulary, "<unk>": len(vocabulary), "<mask>": len(vocabulary) + 1},
        merges=merges,
        model_max_length=LENGTH,
    )


class Shouting(BertTokenizer):
    """Does something of its own, which the backend does not know."""

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        return super()._encode_plus([t.replace("bird", "cat") for t in text], *args, **kwargs)


def shouting() -> PreTrainedTokenizerBase:
    return Shouting(vocab=word_piece().get_vocab())
