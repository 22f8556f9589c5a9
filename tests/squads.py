"""Questions about made-up passages, in files as SQuAD has them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.tasks.examples import Examples
from fastbert.tasks.squad.data import read_questions
from fastbert.tasks.squad.task import SquadTask
from fastbert.tasks.task import Given
from tests.heads import DOCUMENTS, LONG

UNICODE = "«Ünï» sang — naïve café, 日本語 and 🙂 birds\u00a0ran\u200b e\u0301t"


class Question(NamedTuple):
    question: str
    passage: str
    answers: tuple[tuple[str, int], ...]  # texts and starts; none where there is no answer

    @property
    def span(self) -> tuple[int, int] | None:
        if not self.answers:
            return None
        text, start = self.answers[0]
        return start, start + len(text)


def asked(question: str, passage: str, begin: int, end: int) -> Question:
    """Its answer is words `begin` to `end`, `end` itself not among them."""
    words = passage.split(" ")
    text, start = " ".join(words[begin:end]), len(" ".join([*words[:begin], ""]))
    return Question(question, passage, ((text, start),))


QUESTIONS = [
    asked("the big cat ?", DOCUMENTS[0], 0, 1),  # at the very start
    asked("a bird", DOCUMENTS[0], -2, 100),  # at the very end
    asked("on", DOCUMENTS[2], 0, 1),  # all there is
    asked("the cat", LONG.strip(), 0, 2),
    asked("what sang", LONG.strip(), 31, 33),  # in two windows
    asked("the tree", LONG.strip(), 33, 42),  # over the edge of the first one
    asked("the house", LONG.strip(), -3, 1000),
    asked("a dog", LONG.strip(), 20, 120),  # in no window
    asked("the dog", UNICODE, 0, 1),
    asked("the birds", UNICODE, 3, 5),
    asked("", UNICODE, -1, 100),
    asked("mat", UNICODE, 7, 8),
    Question("under", UNICODE, (("naïve café", UNICODE.index("naïve")), ("café", UNICODE.index("café")))),
    Question("cat", UNICODE, (("aïv", UNICODE.index("aïv")),)),  # within a word
    Question("the cat ran", DOCUMENTS[3], ()),
    Question("the bird on the mat", LONG.strip(), ()),
]


def content(questions: Iterable[Question], **more: Any) -> dict[str, Any]:
    """Of a .json file; the id of a question is q and its number."""
    paragraphs: dict[str, list[Any]] = {}
    for i, (question, passage, answers) in enumerate(questions):
        found = [{"text": text, "answer_start": start} for text, start in answers]
        paragraphs.setdefault(passage, []).append({"id": f"q{i}", "question": question, "answers": found, **more})
    articles = [{"paragraphs": [{"context": passage, "qas": qas}]} for passage, qas in paragraphs.items()]
    return {"version": "x", "data": articles}


def write(path: Path, questions: Iterable[Question], **more: Any) -> Path:
    path.write_text(json.dumps(content(questions, **more)))
    return path


def rows(questions: Iterable[Question]) -> list[dict[str, Any]]:
    """As `datasets` has them."""
    return [
        {
            "id": f"q{i}",
            "question": question,
            "context": passage,
            "answers": {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]},
        }
        for i, (question, passage, answers) in enumerate(questions)
    ]


def windows_of(tokenizer: Any, question: Question, max_length: int, stride: int) -> list[dict[str, Any]]:
    """What a stock model takes, window by window, with the answer's first and last token, by loops.

    A window that has not all tokens of the answer points to its first token.
    """
    text, start = question.answers[0] if question.answers else ("", 0)
    alone = tokenizer(question.passage, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    wanted = [offset for offset in alone if offset[1] > start and offset[0] < start + len(text)]
    batch = tokenizer(
        question.question,
        question.passage,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    found = []
    for i, offsets in enumerate(batch["offset_mapping"]):
        passage = [t for t, sequence in enumerate(batch.sequence_ids(i)) if sequence == 1]
        inside = [t for t in passage if offsets[t] in wanted]
        whole = wanted and [offsets[t] for t in inside] == wanted
        item = {name: batch[name][i] for name in tokenizer.model_input_names if name in batch}
        positions = (inside[0], inside[-1]) if whole else (0, 0)
        found.append({**item, "start_positions": positions[0], "end_positions": positions[1]})
    return found


def examples_of(folder: Path, questions: list[Question] = QUESTIONS, *, train: bool = False) -> Examples:
    return read_questions(write(folder / "questions.json", questions), unanswerable=True, train=train)


def task_of(name: str = "squad2", **given: str) -> SquadTask:
    return SquadTask(name, Given(**given))
