"""Masks in a text, filled by a masked language model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.families._base import max_tokens
from fastbert.inference.loading import vocabulary_size


@dataclass(frozen=True)
class Filling:
    """A token for a mask: its share of the probability, and the text with it in place of that mask."""

    token: str
    probability: float
    text: str


def fill_mask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, top_k: int = 5
) -> list[list[Filling]]:
    """For each mask in the text, the likeliest tokens, best first.

    Args:
        model: a masked language model in eval mode.
        text: with at least one [MASK], whatever the tokenizer's own mask token is.
        top_k: how many tokens, at least 1; the whole vocabulary where it is larger.

    Raises:
        InputError: if there is no mask, or the text is longer than the model can take.
    """
    mask = tokenizer.mask_token
    if not isinstance(mask, str):
        raise InputError("the tokenizer has no mask token")
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, but is {top_k}")
    text = text.replace("[MASK]", mask)
    batch = tokenizer(text, return_tensors="pt", verbose=False).to(model.device)
    ids = batch["input_ids"][0]
    places = (ids == tokenizer.mask_token_id).nonzero().squeeze(-1)
    if not len(places):
        raise InputError(f"there is no {mask} in the text")
    if len(ids) > max_tokens(model):
        raise InputError(f"the text has {len(ids)} tokens, but the model takes {max_tokens(model)}")
    if int(ids.max()) >= vocabulary_size(model):
        raise InputError(
            f"the tokenizer has id {int(ids.max())}, but the model a vocabulary of {vocabulary_size(model)}"
        )
    with torch.inference_mode():
        probabilities = model(**batch).logits[0, places].float().softmax(-1)
    best = probabilities.topk(min(top_k, probabilities.shape[-1]))
    pieces = text.split(mask)
    filled = []
    for i, (values, indices) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        before, after = mask.join(pieces[: i + 1]), mask.join(pieces[i + 1 :])
        filled.append(
            [
                Filling(word, value, before + word.strip().removeprefix("##") + after)
                for value, word in zip(values, map(str, map(tokenizer.decode, indices)), strict=True)
            ]
        )
    return filled
