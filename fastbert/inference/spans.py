"""From logits of where an answer starts and ends to answers.

Dimension key:  B pairs   W windows   T tokens   S tokens of a window's passage   A longest answer   N best ones
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastbert.inference.engine import Batch
from fastbert.inference.windows import Windows

N_BEST = 20  # starts, ends and spans of a window that are looked at where logits are summed
_Columns = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Answer:
    """A piece of a passage.

    Attributes:
        text: the piece; "" for no answer.  start, end: where it stands in the passage, in characters.
        score: the probability of its first token times that of its last one, within a window; or the sum of their
            logits, where the engine is asked for that.
        probability: where scores are sums: a softmax of them over the best answers.
    """

    text: str
    start: int
    end: int
    score: float
    probability: float | None = None


class Found(NamedTuple):
    """What there is in a passage.

    Attributes:
        spans: (begin, end, score), in characters, best first.
        null: the score of no answer.
    """

    passage: str
    spans: list[tuple[int, int, float]]
    null: float

    @property
    def best(self) -> str:
        """The best piece; "" where there is none."""
        return self.passage[slice(*self.spans[0][:2])] if self.spans else ""

    @property
    def odds(self) -> float:
        """By how much no answer has more than the best piece; 0 where there is none."""
        return self.null - self.spans[0][2] if self.spans else 0.0


def span_logits(model: Any, batch: Batch) -> Tensor:
    """(T, 2) of a model for question answering."""
    output = model(**batch.inputs())
    return torch.stack([output.start_logits[0], output.end_logits[0]], -1).float()


def null_tokens(windows: Windows, cls_id: int | None) -> npt.NDArray[np.int64]:
    """(W,) the token of each window that stands for no answer: [CLS], the last one in XLNet's, else the first."""
    first, last = windows.starts, windows.starts + windows.lengths - 1
    return np.where((windows.ids[first] != cls_id) & (windows.ids[last] == cls_id), last, first)


@dataclass(frozen=True)
class Reading:
    """How logits become answers.

    An answer that several windows have counts once, with its best score; no answer has its least score in any window.
    So every token may be read in every window that has it, as it is labelled there in training.

    Attributes:
        longest: tokens of an answer.
        null: whether "" may be an answer.
        summed: whether a score is the sum of two logits, of the `N_BEST` best starts and ends of a window alone; else
            it is the product of two probabilities, of a softmax over a window's passage and its first token.
            Source: https://arxiv.org/abs/1810.04805, section 4.2, and its code, run_squad.py.
        threshold: by how much more than the best piece's the score of "" must be.
    """

    longest: int
    null: bool = False
    summed: bool = False
    threshold: float = 0.0

    def spans(
        self, logits_T2: npt.NDArray[np.float32], windows: Windows, cls_id: int | None, top_k: int = 1
    ) -> list[Found]:
        """The best pieces of each passage, and the score of no answer.

        Args:
            top_k: pieces that are wanted; where scores are sums, `N_BEST` come.
        """
        combine, kept = (np.add, N_BEST) if self.summed else (np.multiply, top_k)
        found: list[dict[tuple[int, int], float]] = [{} for _ in windows.texts]
        nulls = np.full(len(windows.texts), np.inf if self.summed else 1.0)
        at = null_tokens(windows, cls_id)
        has_null = self.summed | (windows.ids[at] == cls_id)
        for text, start, length, null, has in zip(
            windows.text_of, windows.starts, windows.lengths, at, has_null, strict=True
        ):
            rows = start + np.flatnonzero(windows.read[start : start + length])
            scores_S2 = logits_T2[np.concatenate([[null], rows]) if has else rows]
            if not self.summed:
                scores_S2 = np.exp(scores_S2 - scores_S2.max(0, initial=-np.inf))
                scores_S2 /= scores_S2.sum(0)
            if has:
                nulls[text] = min(nulls[text], combine.reduce(scores_S2[0]))
                scores_S2 = scores_S2[1:]
            if self.summed:
                scores_S2 = _best_alone(scores_S2)
            firsts, lasts, scores = _best(scores_S2, self.longest, 2 * kept + 10, combine)
            begins, ends = windows.offsets[rows[firsts], 0].tolist(), windows.offsets[rows[lasts], 1].tolist()
            ours = found[text]
            for where, score in zip(zip(begins, ends, strict=True), scores.tolist(), strict=True):
                if where[0] < where[1]:  # a token of a blank alone has no text
                    ours[where] = max(score, ours.get(where, score))
        return [
            Found(passage, [(*where, score) for where, score in sorted(ours.items(), key=_by_score)[:kept]], null)
            for passage, ours, null in zip(windows.texts, found, nulls.tolist(), strict=True)
        ]

    def ranked(self, found: Found) -> list[Answer]:
        """All answers to a question, best first: at least one."""
        every = list(found.spans)
        if self.null or not every:
            every.append((0, 0, found.null if self.null else 0.0))
        shares: list[float] | list[None] = [None] * len(every)
        if self.summed:
            scores = np.asarray([score for *_, score in every])
            p = np.exp(scores - scores.max())
            shares = (p / p.sum()).tolist()
        answers = [Answer(found.passage[a:b], a, b, score, p) for (a, b, score), p in zip(every, shares, strict=True)]
        return sorted(answers, key=lambda answer: -(answer.score if answer.text else answer.score - self.threshold))


def _by_score(item: tuple[Any, float]) -> float:
    return -item[1]


def _best_alone(scores_S2: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """-inf for all but the best starts and the best ends."""
    if len(scores_S2) <= N_BEST:
        return scores_S2
    least_2 = np.partition(scores_S2, -N_BEST, axis=0)[-N_BEST]
    return np.where(scores_S2 >= least_2, scores_S2, np.float32(-np.inf))


def _best(scores_S2: npt.NDArray[np.float32], longest: int, count: int, combine: np.ufunc) -> _Columns:
    """The best spans of tokens, best first: (N,) first token, last token and score; none longer than `longest`.

    Args:
        combine: from the scores of a start and an end to that of the span; one of -inf is none.
    """
    S = len(scores_S2)
    longest = min(longest, S)
    if S == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    behind = np.full(longest - 1, -np.inf if combine is np.add else 0.0, np.float32)
    ends = np.lib.stride_tricks.sliding_window_view(np.concatenate([scores_S2[:, 1], behind]), longest)  # (S, A)
    flat = combine(scores_S2[:, :1], ends).ravel()
    best = np.argpartition(-flat, count)[:count] if len(flat) > count else np.arange(len(flat))
    best = best[np.argsort(-flat[best], kind="stable")]
    firsts, more = np.divmod(best, longest)
    inside = (firsts + more < S) & (flat[best] != -np.inf)
    return firsts[inside], (firsts + more)[inside], flat[best][inside]
