"""Masked-LM corruption of sequences that are there already: for collators of one's own, and for given units."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.errors import NO_EXTENSION, InputError

try:
    from fastbert import _C
except ImportError:  # a bare checkout
    _C = None  # type: ignore[assignment]

_SPECIAL, _CONTINUATION = 1, 2


@dataclass(frozen=True)
class Masked:
    """Packed sequences after corruption.

    Attributes:
        input_ids: (T,) int64.  labels: (T,) int64, what was there where a token was chosen, -100 elsewhere.
        label_rows: (M,) int64, which tokens were chosen, rising.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    label_rows: npt.NDArray[np.int64]


class Masker:
    """Chooses tokens to predict, and replaces them: BERT's 80-10-10 of 15 %, by default.

    Special tokens are neither chosen nor drawn. What is drawn depends on (seed, epoch, index of the sequence) alone.

    Args:
        tokenizer: a transformers tokenizer with a mask token.
        unit: "token"; "whole-word", all pieces of a word, or of a given unit (ERNIE); "span", runs of whole words with
            geometric lengths, which share their fate (SpanBERT, p = 0.2, 1 to 10 words).
        rate: of the tokens that are not special, so many are chosen on average, and at least one in a sequence.
        replace_by_mask, replace_by_random: of the chosen tokens; the others stay.
        max_predictions: in a sequence; 0 for any number.
        threads: 0 for one a core.

    Raises:
        InputError: if an option is out of range, or the tokenizer has no mask token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        unit: str = "token",
        rate: float = 0.15,
        replace_by_mask: float = 0.8,
        replace_by_random: float = 0.1,
        max_predictions: int = 0,
        seed: int = 0,
        threads: int = 0,
    ) -> None:
        if _C is None:
            raise InputError(f"masking needs {NO_EXTENSION}")
        if tokenizer.mask_token_id is None:
            raise InputError("the tokenizer has no mask token")
        self._kinds = np.zeros(len(tokenizer), np.uint8)
        self._kinds[tokenizer.all_special_ids] = _SPECIAL
        pieces = [i for token, i in tokenizer.get_vocab().items() if token.startswith("##")]
        self._kinds[pieces] |= _CONTINUATION
        self._mask = tokenizer.mask_token_id
        self._seed, self._threads = seed, threads
        try:
            self._masking = _C.Masking(
                unit=unit,
                rate=rate,
                replace_by_mask=replace_by_mask,
                replace_by_random=replace_by_random,
                max_predictions=max_predictions,
            )
        except ValueError as error:
            raise InputError(str(error)) from error

    def __call__(
        self,
        input_ids: npt.ArrayLike,
        cu_seqlens: npt.ArrayLike,
        *,
        epoch: int = 0,
        first_index: int = 0,
        unit_starts: npt.ArrayLike | None = None,
    ) -> Masked:
        """Corrupt packed sequences.

        Args:
            input_ids: (T,) integers, special tokens among them.
            cu_seqlens: (B + 1,) where each sequence starts, and T.
            epoch, first_index: of the first sequence; what is drawn goes by them.
            unit_starts: (T,) bool, for "whole-word" and "span": True where a unit begins. None for the words that the
                vocabulary's ## pieces make.

        Raises:
            InputError: if an id is not in the vocabulary, or the arrays do not belong together.
        """
        starts = None if unit_starts is None else np.ascontiguousarray(unit_starts, np.uint8)
        try:
            ids, labels, rows = _C.corrupt(
                np.ascontiguousarray(input_ids, np.int64),
                np.ascontiguousarray(cu_seqlens, np.int64),
                self._kinds,
                self._mask,
                self._masking,
                seed=self._seed,
                epoch=epoch,
                first_index=first_index,
                unit_starts=starts,
                threads=self._threads,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        return Masked(ids, labels, rows)
