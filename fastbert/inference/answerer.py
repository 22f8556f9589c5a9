"""Questions to the pieces of passages that answer them, by any model for extractive question answering."""

from collections.abc import Iterable
from typing import Any

from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.encoding import checked, is_pair
from fastbert.inference.engine import Progress
from fastbert.inference.heads import HeadEngine
from fastbert.inference.spans import Answer, Reading, span_logits
from fastbert.inference.windows import Windower, Windows

_LONGEST = 384  # tokens of a window where nothing else is said, as SQuAD's models are trained


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
        summed: let scores be sums of logits, as those that SQuAD's models are judged by: see `Reading`.
        null_threshold: by how much more than the best piece's the score of "" must be.
        max_question_length: tokens of a question; half of a window, or less where that is less.
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
        summed: bool = False,
        null_threshold: float = 0.0,
        max_question_length: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, max_length=max_length, **options)
        if max_answer_length < 1:
            raise InputError(f"max_answer_length must be at least 1, but is {max_answer_length}")
        if max_question_length is not None and max_question_length < 1:
            raise InputError(f"max_question_length must be at least 1, but is {max_question_length}")
        if doc_stride < 0:
            raise InputError(f"doc_stride must be at least 0, but is {doc_stride}")
        self.max_length = max_length or min(_LONGEST, self.max_length)
        self.doc_stride, self.max_answer_length = doc_stride, max_answer_length
        self.handle_impossible_answer, self.align_to_words = handle_impossible_answer, align_to_words
        self.summed, self.null_threshold, self.max_question_length = summed, null_threshold, max_question_length
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
        listed = checked(items, self._items)
        tokens = self._windower.of_pairs(
            listed,
            self.max_length,
            self.doc_stride,
            longest_question=self.max_question_length,
            to_words=self.align_to_words,
            unknown=self._unknown,
        )
        if progress is not None:
            progress(len(listed))
        return tokens

    def results(self, tokens: Windows, progress: Progress | None = None) -> list[Answer]:
        """The best answer of each tokenised pair, in order; `progress` as in `Engine.gather`."""
        return [best for best, *_ in self._answers(tokens, 1, progress)]

    def _answers(self, tokens: Windows, top_k: int, progress: Progress | None = None) -> list[list[Answer]]:
        logits_T2 = self.gather(tokens, 2, lambda batch: span_logits(self.model, batch), progress, per_token=True)
        reading = Reading(
            self.max_answer_length, self.handle_impossible_answer, self.summed, threshold=self.null_threshold
        )
        found = reading.spans(logits_T2, tokens, self.tokenizer.cls_token_id, top_k)
        return [reading.ranked(each)[:top_k] for each in found]
