"""The sizes that are measured: models, and how long their sequences are."""

import random
from typing import NamedTuple

MAXIMA = {"wikipedia": 512, "squad": 384}
_DECILES = {  # the 5th, 15th, ... 95th percentile of the length, special tokens included
    # Half of the slots are padding, and many sequences are as long as they may be: Krell et al. 2021,
    # https://arxiv.org/abs/2107.02027. What lies between is evenly spread on purpose, it is not their histogram.
    "wikipedia": (28, 64, 104, 148, 196, 252, 320, 408, 512, 512),
    # Questions with their contexts, SQuAD 1.1's dev set, bert-base-uncased, counted: 59 % padding at 384.
    "squad": (82, 110, 121, 131, 141, 153, 168, 186, 213, 275),
}


class Size(NamedTuple):
    layers: int
    hidden: int
    heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


MODELS = {"MiniLM": Size(6, 384, 12), "base": Size(12, 768, 12), "large": Size(24, 1024, 16)}
VOCABULARY = 30522


def batch_of(lengths: str, batch: int, S: int) -> list[int]:
    """The lengths of a batch that is padded to S: all "full", or of a mix, in an order that is always the same."""
    if lengths == "full":
        return [S] * batch
    drawn = [min(S, _quantile(_DECILES[lengths], (i + 0.5) / batch)) for i in range(batch)]
    random.Random(0).shuffle(drawn)
    return drawn


def tokens_of(lengths: str, tokens: int) -> list[int]:
    """Sequences of a mix, or all of the length that `lengths` is, of about so many tokens in all."""
    if lengths.isdecimal():
        return [int(lengths)] * max(1, tokens // int(lengths))
    deciles = _DECILES[lengths]
    return batch_of(lengths, max(1, round(tokens * len(deciles) / sum(deciles))), MAXIMA[lengths])


def _quantile(deciles: tuple[int, ...], q: float) -> int:
    """Between deciles as between the midpoints of ten steps; beyond the outer ones, they themselves."""
    place = min(max(q * len(deciles) - 0.5, 0.0), len(deciles) - 1.0)
    i = min(int(place), len(deciles) - 2)
    return round(deciles[i] + (place - i) * (deciles[i + 1] - deciles[i]))
