"""Questions to the pieces of passages that answer them, by any model for extractive question answering.

Dimension key:  B pairs   W windows   T tokens   S tokens of a window's passage   A longest answer
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.encoding import checked, is_pair, naming_surrogates
from fastbert.inference.engine import Batch, Progress
from fastbert.inference.heads import HeadEngine
from fastbert.inference.windows import Bodies, Windower, Windows

_LONGEST = 384  # tokens of a window where nothing else is said, as SQuAD's models are trained


@dataclass(frozen=True)
class Answer:
    """A piece of a passage.

    Attributes:
        text: the piece; "" for no answer.  start, end: where it stands in the passage, in characters.
        score: the probability of its first token times that of its last one, within a window.
    """

    text: str
    start: int
    end: int
    score: float


class Answerer(HeadEngine):
    """Answers to questions from passages, as transformers' question-answering pipeline found them.

    A long passage goes to the model in windows that overlap. Probabilities are a softmax over a window's passage and
    its first token, which stands for no answer. An answer that several windows have counts once, with its best score.

    Args:
        max_length: tokens of a window, with its question; 384, or what model and tokenizer can take where that is less.
        doc_stride: tokens of a passage that a window has in common with the next one.
        max_answer_length: tokens of an answer.
        handle_impossible_answer: let "" be an answer, with its least score in any window.
        align_to_words: widen an answer to whole words; not for languages that have no blanks between words.
        options: of `Engine`.

    Raises:
        InputError: if an option is out of range, the model has another head, or the tokenizer knows no offsets.
    """

    _auto = AutoModelForQuestionAnswering
    _head = "ForQuestionAnswering"
    _items = {"pair (question, passage)": is_pair}  # noqa: RUF012

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        doc_stride: int = 128,
        max_answer_length: int = 15,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, **options)
        if max_answer_length < 1:
            raise InputError(f"max_answer_length must be at least 1, but is {max_answer_length}")
        if doc_stride < 0:
            raise InputError(f"doc_stride must be at least 0, but is {doc_stride}")
        self.max_length = max_length or min(_LONGEST, self.max_length)
        self.doc_stride, self.max_answer_length = doc_stride, max_answer_length
        self.handle_impossible_answer, self.align_to_words = handle_impossible_answer, align_to_words
        self._windower = Windower(tokenizer, pairs=True, types=self._takes_types, needed_by=type(self).__name__)

    def answer(self, question: str, passage: str) -> Answer:
        """The best answer; "" with score 0 where there is nothing in the passage.

        Raises:
            InputError: if one of them is no string.
        """
        return self.answer_many([(question, passage)])[0][0]

    def answer_many(self, pairs: Iterable[tuple[str, str]], top_k: int = 1) -> list[list[Answer]]:
        """Of each (question, passage), in order, the best `top_k` answers, best first: at least one, perhaps fewer.

        Raises:
            InputError: naming a pair that is none; if `top_k` is less than 1.
        """
        if top_k < 1:
            raise InputError(f"top_k must be at least 1, but is {top_k}")
        return self._answers(self.tokenize(pairs), top_k)

    def tokenize(self, items: Iterable[Any], progress: Progress | None = None) -> Windows:
        """Windows over all passages, each with its question, which may have half of it: `cut` counts longer ones.

        See `Engine.tokenize`.
        """
        listed, backend = checked(items, self._items), self._windower.backend
        with naming_surrogates(listed):
            questions = [
                e.ids for e in backend.encode_batch_fast([question for question, _ in listed], add_special_tokens=False)
            ]
            encodings = backend.encode_batch([passage for _, passage in listed], add_special_tokens=False)
        bodies = Bodies.of(encodings)
        if self.align_to_words:
            _widen(bodies, [word for e in encodings for word in e.word_ids])
        room = (self.max_length - self._windower.special) // 2
        if progress is not None:
            progress(len(listed))
        return self._windower.windows(
            [passage for _, passage in listed],
            bodies,
            self.max_length,
            self.doc_stride,
            questions=[question[:room] for question in questions],
            unknown=self._unknown(bodies.ids),
            cut=sum(len(question) > room for question in questions),
        )

    def results(self, tokens: Windows, progress: Progress | None = None) -> list[Answer]:
        """The best answer of each tokenised pair, in order; `progress` as in `Engine.gather`."""
        return [best for best, *_ in self._answers(tokens, 1, progress)]

    def _answers(self, tokens: Windows, top_k: int, progress: Progress | None = None) -> list[list[Answer]]:
        def call(batch: Batch) -> torch.Tensor:
            output = self.model(**batch.inputs())
            return torch.stack([output.start_logits[0], output.end_logits[0]], -1).float()

        logits_T2 = self.gather(tokens, 2, call, progress, per_token=True)
        found: list[dict[tuple[int, int], float]] = [{} for _ in tokens.texts]
        null = np.ones(len(tokens.texts))
        for text, start, length in zip(tokens.text_of, tokens.starts, tokens.lengths, strict=True):
            rows = start + np.flatnonzero(tokens.read[start : start + length])
            first = tokens.ids[start] == self.tokenizer.cls_token_id
            logits_S2 = logits_T2[np.concatenate([[start], rows]) if first else rows]
            p_S2 = np.exp(logits_S2 - logits_S2.max(0, initial=-np.inf))
            p_S2 /= p_S2.sum(0)
            if first:
                null[text] = min(null[text], p_S2[0].prod())
                p_S2 = p_S2[1:]
            for s, e, score in _spans(p_S2, self.max_answer_length, 2 * top_k + 10):
                where = int(tokens.offsets[rows[s], 0]), int(tokens.offsets[rows[e], 1])
                if where[0] < where[1]:  # a token of a blank alone has no text
                    found[text][where] = max(score, found[text].get(where, 0.0))
        answers = []
        for i, (passage, spans) in enumerate(zip(tokens.texts, found, strict=True)):
            ours = [Answer(passage[a:b], a, b, score) for (a, b), score in spans.items()]
            if self.handle_impossible_answer or not ours:
                ours.append(Answer("", 0, 0, float(null[i]) if self.handle_impossible_answer else 0.0))
            answers.append(sorted(ours, key=lambda answer: -answer.score)[:top_k])
        return answers


def _widen(bodies: Bodies, words: list[int | None]) -> None:
    """Let the offsets of each token be those of its word, in place."""
    if not words:
        return
    word = np.asarray([-1 if w is None else w for w in words])
    text = np.repeat(np.arange(len(bodies.lengths)), bodies.lengths)
    begins = np.concatenate([[True], (word[1:] != word[:-1]) | (text[1:] != text[:-1])]) | (word < 0)
    firsts = np.flatnonzero(begins)
    counts = np.diff([*firsts, len(word)])
    bodies.offsets[:, 0] = np.repeat(bodies.offsets[firsts, 0], counts)
    bodies.offsets[:, 1] = np.repeat(bodies.offsets[firsts + counts - 1, 1], counts)


def _spans(p_S2: npt.NDArray[np.float32], longest: int, count: int) -> Iterator[tuple[int, int, float]]:
    """The likeliest spans of tokens, first and last one, and the score of each; none longer than `longest`."""
    S = len(p_S2)
    if S == 0:
        return
    longest = min(longest, S)
    ends = np.concatenate([p_S2[:, 1], np.zeros(longest - 1, np.float32)])
    scores_SA = p_S2[:, :1] * np.lib.stride_tricks.sliding_window_view(ends, longest)
    flat = scores_SA.ravel()
    best = np.argpartition(-flat, count)[:count] if len(flat) > count else np.arange(len(flat))
    for i in best[np.argsort(-flat[best], kind="stable")].tolist():
        start, more = divmod(i, longest)
        if start + more < S:
            yield start, start + more, float(flat[i])
