"""Windows over texts: a text that is longer than a model takes goes to it in pieces that overlap.

Dimension key:  B texts   W windows   T tokens of all windows   S tokens of all texts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fastbert.errors import InputError
from fastbert.inference.encoding import backend_of, flat, joined, naming_surrogates
from fastbert.inference.tokens import Tokens, ranges

_CHUNK = 1024  # passages tokenised at once


@dataclass(frozen=True, eq=False, kw_only=True)
class Windows(Tokens):
    """Tokenised windows, end to end; `lengths` and all that goes by row are of windows, (W,).

    Attributes:
        texts: B of them, what `offsets` count in.
        text_of: (W,) int64, of which text a window is; windows of a text follow one another.
        begins: (W,) int64, with which of its text's tokens a window begins.
        read: (T,) bool, tokens of a text whose outputs count; the others are special, of a question, or of an overlap
            and read in the window before or behind.
        offsets: (T, 2) int32, where a token begins and ends in its text, in characters; zeros where it is of none.
        words: of each text that was given as words, where each of them begins; None of others.
    """

    texts: Sequence[str]
    text_of: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    read: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int32]
    words: Sequence[npt.NDArray[np.int64] | None] = ()


@dataclass(frozen=True, eq=False)
class Bodies:
    """Tokenised texts without special tokens, end to end: (S,) ids, (S, 2) offsets in characters, (B,) lengths."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]

    @classmethod
    def of(cls, encodings: Sequence[Any]) -> "Bodies":
        offsets = flat((pair for e in encodings for pair in e.offsets), np.int32).reshape(-1, 2)
        lengths = np.asarray([len(e.ids) for e in encodings], np.int64)
        return cls(flat((e.ids for e in encodings), np.int32), offsets, lengths)

    def take(self, rows: npt.NDArray[np.int64]) -> "Bodies":
        """These texts, in this order, perhaps one of them several times."""
        taken = ranges((self.lengths.cumsum() - self.lengths)[rows], self.lengths[rows])
        return Bodies(self.ids[taken], self.offsets[taken], self.lengths[rows])

    def widen(self, words: Sequence[int | None]) -> None:
        """Let the offsets of each token be those of its word, in place.

        Args:
            words: (S,) the number of each token's word in its text; None for a word of its own.
        """
        if not words:
            return
        word = np.asarray([-1 if w is None else w for w in words])
        text = np.repeat(np.arange(len(self.lengths)), self.lengths)
        begins = np.concatenate([[True], (word[1:] != word[:-1]) | (text[1:] != text[:-1])]) | (word < 0)
        firsts = np.flatnonzero(begins)
        counts = np.diff([*firsts, len(word)])
        self.offsets[:, 0] = np.repeat(self.offsets[firsts, 0], counts)
        self.offsets[:, 1] = np.repeat(self.offsets[firsts + counts - 1, 1], counts)


class Windower:
    """Puts special tokens around texts, and questions before them, as the tokenizer does.

    Args:
        pairs: whether a text is the second of a pair.
        types: whether token types are wanted.
        needed_by: what needs it, for the error.

    Raises:
        InputError: if the tokenizer is not of the tokenizers library: others know no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, pairs: bool, types: bool, needed_by: str) -> None:
        backend = backend_of(tokenizer)
        if backend is None:
            raise InputError(
                f"{needed_by} needs a tokenizer that knows where its tokens stand in a text, one of the tokenizers"
                f" library, but this is a {type(tokenizer).__name__}"
            )
        self.backend: Any = backend
        self._types = types
        probe = backend.encode("a", "a") if pairs else backend.encode("a")
        ids, kinds, sequences = np.array(probe.ids), np.array(probe.type_ids), np.array(probe.sequence_ids, float)
        (first, last), (begin, end) = (np.flatnonzero(sequences == i)[[0, -1]] for i in (0, 1 if pairs else 0))
        self._before, self._between, self._after = (
            (ids[piece], kinds[piece])
            for piece in (slice(first), slice(last + 1, begin if pairs else last + 1), slice(end + 1, None))
        )
        self._types_of_texts = int(kinds[first]), int(kinds[end])

    @property
    def special(self) -> int:
        """Special tokens of a window."""
        return sum(len(ids) for ids, _ in (self._before, self._between, self._after))

    def of_pairs(
        self,
        pairs: Sequence[Sequence[str]],
        max_length: int,
        stride: int,
        *,
        longest_question: int | None = None,
        to_words: bool = False,
        unknown: Callable[[npt.NDArray[np.int32]], int],
    ) -> Windows:
        """Windows over the passages of (question, passage), each with its question.

        A passage is tokenised once, however many questions are about it.

        Args:
            stride: as in `windows`.
            longest_question: tokens; of a longer question the first ones stay, and `cut` counts it. At most half of a
                window.
            to_words: offsets are those of whole words.
            unknown: how many of the passages' ids are the unknown token.

        Raises:
            InputError: naming the pair, counted from 0, that no encoding of Unicode can hold.
        """
        numbers: dict[str, int] = {}
        rows = np.asarray([numbers.setdefault(passage, len(numbers)) for _, passage in pairs], np.int64)
        passages, parts = list(numbers), []
        with naming_surrogates(pairs):
            questions = [e.ids for e in self.backend.encode_batch_fast([q for q, _ in pairs], add_special_tokens=False)]
            for start in range(0, len(passages), _CHUNK):
                encodings = self.backend.encode_batch(passages[start : start + _CHUNK], add_special_tokens=False)
                parts.append(Bodies.of(encodings))
                if to_words:
                    parts[-1].widen([word for e in encodings for word in e.word_ids])
        bodies = Bodies(
            joined([part.ids for part in parts], np.int32),
            np.concatenate([np.zeros((0, 2), np.int32), *(part.offsets for part in parts)]),
            joined([part.lengths for part in parts], np.int64),
        ).take(rows)
        room = (max_length - self.special) // 2
        longest = room if longest_question is None else min(room, longest_question)
        return self.windows(
            [passage for _, passage in pairs],
            bodies,
            max_length,
            stride,
            questions=[question[:longest] for question in questions],
            unknown=unknown(bodies.ids),
            cut=sum(len(question) > longest for question in questions),
        )

    def windows(
        self,
        texts: Sequence[str],
        bodies: Bodies,
        max_length: int,
        stride: int,
        *,
        questions: Sequence[Sequence[int]] | None = None,
        **fields: Any,
    ) -> Windows:
        """Windows of at most `max_length` tokens over all texts.

        Args:
            stride: tokens that a window has in common with the next one, half of its text at most. Each is read in one
                of them alone, or, where there are questions, in both.
            questions: the ids of each text's question, which leave it room.
            fields: more of `Windows`.
        """
        heads = [self._head(question) for question in ([()] * len(texts) if questions is None else questions)]
        head_ids, head_types = (flat((head[i] for head in heads), np.int32) for i in range(2))
        head_B = np.asarray([len(head[0]) for head in heads], np.int64)
        tail_ids, tail_types = self._after
        room_B = max_length - head_B - len(tail_ids)
        stride_B = np.minimum(stride, room_B // 2)
        step_B = room_B - stride_B
        count_B = 1 + np.maximum(0, -(-(bodies.lengths - room_B) // step_B))

        text_of = np.repeat(np.arange(len(texts)), count_B)
        number = ranges(np.zeros_like(count_B), count_B)  # of a window among those of its text
        begin = number * step_B[text_of]
        end = np.minimum(begin + room_B[text_of], bodies.lengths[text_of])
        head, lengths = head_B[text_of], head_B[text_of] + end - begin + len(tail_ids)
        starts = lengths.cumsum() - lengths
        of_head = ranges((head_B.cumsum() - head_B)[text_of], head)
        of_body = ranges((bodies.lengths.cumsum() - bodies.lengths)[text_of] + begin, end - begin)
        in_head, in_body = ranges(starts, head), ranges(starts + head, end - begin)
        in_tail = ranges(starts + lengths - len(tail_ids), np.full_like(lengths, len(tail_ids)))

        T, W = int(lengths.sum()), len(lengths)
        ids, types = np.empty(T, np.int32), np.empty(T, np.int8)
        ids[in_head], ids[in_body], ids[in_tail] = head_ids[of_head], bodies.ids[of_body], np.tile(tail_ids, W)
        types[in_head], types[in_tail] = head_types[of_head], np.tile(tail_types, W)
        types[in_body] = self._types_of_texts[1]
        offsets = np.zeros((T, 2), np.int32)
        offsets[in_body] = bodies.offsets[of_body]
        skipped = left = np.zeros_like(begin)
        if questions is None:  # of an overlap, the first half is the window's before, the rest that one's behind
            half = stride_B[text_of] // 2
            skipped = np.where(number > 0, half, 0)
            left = np.where(number < count_B[text_of] - 1, stride_B[text_of] - half, 0)
        read = np.zeros(T, bool)
        read[ranges(starts + head + skipped, end - begin - skipped - left)] = True
        kept = types if self._types and types.any() else None
        return Windows(
            ids,
            lengths,
            types=kept,
            texts=texts,
            text_of=text_of,
            begins=begin,
            read=read,
            offsets=offsets,
            **fields,
        )

    def _head(self, question: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and types of what stands before a text."""
        ids = [*self._before[0], *question, *self._between[0]]
        return ids, [*self._before[1], *[self._types_of_texts[0]] * len(question), *self._between[1]]
