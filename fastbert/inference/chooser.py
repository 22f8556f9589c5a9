"""Questions with choices to the choice that fits, by any model for multiple choice.

Dimension key:  S choices of all questions
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import AutoModelForMultipleChoice

from fastbert.errors import InputError
from fastbert.inference.encoding import checked, is_pair, is_text, is_words
from fastbert.inference.engine import Batch, Progress
from fastbert.inference.heads import HeadEngine
from fastbert.inference.tokens import Tokens

Question = tuple[str, Sequence[str]]


@dataclass(frozen=True)
class Choice:
    """The choice of a question with the best score.

    Attributes:
        index: its place among those that were given.
        scores: of each choice, in their order: probabilities.
    """

    index: int
    choice: str
    score: float
    scores: list[float]


@dataclass(frozen=True, eq=False, kw_only=True)
class Questions(Tokens):
    """Tokenised questions; `lengths` and all that goes by row are of their choices, (S,), one question after another.

    Attributes:
        choices: of each question.
    """

    choices: Sequence[Sequence[str]]


class Chooser(HeadEngine):
    """The choice that goes with a context, of any number; a model reads each with the context, as a pair.

    Scores are a softmax over the choices of a question.

    Args:
        options: of `Engine`.

    Raises:
        InputError: if an option is out of range, or the model has another head.
    """

    _auto = AutoModelForMultipleChoice
    _head = "ForMultipleChoice"
    _items = {"pair (context, choice)": is_pair}  # noqa: RUF012

    def choose(self, context: str, choices: Sequence[str]) -> Choice:
        """Of one question.

        Raises:
            InputError: if there are no choices, or what is given is no text.
        """
        if not is_text(context) or not _are_choices(choices):
            raise InputError("a question is a context, a string, and its choices, a list of strings")
        return self.predict([(context, choices)])[0]

    def predict(self, questions: Iterable[Question]) -> list[Choice]:
        """A choice for each (context, choices), in their order; questions may have different numbers of choices.

        Raises:
            InputError: naming an item that is no question.
        """
        return self.results(self.tokenize(questions))

    def tokenize(self, items: Iterable[Any], progress: Progress | None = None) -> Questions:
        """Questions to ids; see `Engine.tokenize`."""
        listed = checked(items, {"question (context, choices)": is_question})
        tokens = super().tokenize([(context, choice) for context, choices in listed for choice in choices])
        if progress is not None:
            progress(len(listed))
        choices = [tuple(choices) for _, choices in listed]
        return Questions(tokens.ids, tokens.lengths, tokens.unknown, tokens.types, tokens.cut, choices=choices)

    def results(self, tokens: Tokens, progress: Progress | None = None) -> list[Choice]:
        """As `predict`, of tokenised questions; `progress` as in `Engine.gather`."""
        assert isinstance(tokens, Questions)
        logits_S = self.gather(tokens, 1, logits_of(self.model), progress)[:, 0]
        return chosen(logits_S, tokens.choices)


def logits_of(model: Any) -> Callable[[Batch], Tensor]:
    """What a model for multiple choice gives for a batch of choices, (B, 1)."""

    def call(batch: Batch) -> Tensor:
        logits: Tensor = model(**batch.inputs()).logits
        return logits.float()

    return call


def chosen(logits_S: npt.NDArray[np.float32], choices: Sequence[Sequence[str]]) -> list[Choice]:
    """The choice of each question."""
    found = []
    bounds = np.cumsum([len(of) for of in choices])[:-1]
    for of, logits in zip(choices, np.split(logits_S, bounds), strict=True) if choices else ():
        shares = np.exp(logits.astype(np.float64) - logits.max())
        scores = (shares / shares.sum()).tolist()
        best = int(logits.argmax())
        found.append(Choice(best, of[best], scores[best], scores))
    return found


def is_question(item: Any) -> bool:
    """Whether it is a context and its choices, one at least."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    context, choices = item
    return is_text(context) and _are_choices(choices)


def _are_choices(choices: Any) -> bool:
    return is_words(choices) and len(choices) > 0
