"""Questions of SQuAD, from its own JSON, or from rows as `datasets` has them.

Source: https://rajpurkar.github.io/SQuAD-explorer/
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastbert.data.documents import Problems
from fastbert.data.records import Records
from fastbert.errors import InputError
from fastbert.inference.inputs import as_text
from fastbert.tasks.examples import Examples

_COLUMNS = {name: name for name in ("id", "question", "context", "answers")}
_OUTSIDE = "an answer outside its passage"
_ELSEWHERE = "an answer that does not stand where it is said to"
_Question = tuple[str, Mapping[str, Any]]  # its place, and its id, question, context, answers, is_impossible


def read_questions(path: Path | str, *, unanswerable: bool, train: bool = False) -> Examples:
    """Of each question the input (question, passage), and as label its answers: [{"text", "answer_start"}, ...].

    A label is None where the file has no answers, and empty where a question has none.

    Args:
        path: .json as SQuAD has it; .jsonl, .parquet or dataset:NAME:SPLIT with columns id, question, context, answers.
        unanswerable: whether questions may have no answer, as in 2.0.
        train: leave out questions none of whose answers stands where it is said to.

    Raises:
        InputError: if it is no such file, an id is there twice, or a question has no answer in 1.1.
    """
    examples = Examples(str(path))
    ids = set()
    for place, question in _official(Path(path)) if _is_json(path) else _rows(path, examples.problems):
        if not isinstance(question["id"], str | int):
            raise InputError(f"{place}: a question has no id")
        id = str(question["id"])
        if id in ids:
            raise InputError(f"{place}: the id {id} is there twice")
        ids.add(id)
        label = _answers(question, place, examples.problems)
        inputs = tuple(as_text(question, key, place, examples.problems) for key in ("question", "context"))
        if label == [] and not unanswerable:
            raise InputError(f"{place}: a question without answer: that is SQuAD 2.0, `finetune squad2`")
        if label is None and train:
            raise InputError(f"{place}: nothing says what the answers are: there is nothing to learn")
        if _is_kept(label, inputs[1], place, examples.problems, train=train):
            if not inputs[0].strip():
                examples.problems.add("an empty question (kept)", place)
            examples.add(inputs, label, place, id)
    if not examples.inputs:
        raise InputError(f"{path} has no question that can be used: {examples.problems or 'it has none'}")
    if examples.labelled and any(label is None for label in examples.labels):
        place = next(place for place, label in zip(examples.places, examples.labels, strict=True) if label is None)
        raise InputError(f"{place}: nothing says what the answers are, as other questions' answers")
    return examples


def stands(answer: Mapping[str, Any], passage: str) -> bool:
    """Whether an answer is where it is said to be, and is more than blanks."""
    start, text = answer["answer_start"], answer["text"]
    return start >= 0 and passage.startswith(text, start) and bool(text.strip())


def _is_kept(label: list[Any] | None, passage: str, place: str, problems: Problems, *, train: bool) -> bool:
    """Counts answers that are elsewhere; in evaluations it is their text alone that counts."""
    if not label:
        return True
    left_out = train and not any(stands(answer, passage) for answer in label)
    fate = " (left out)" if left_out else " (not learnt)" if train else " (its text alone counts)"
    for answer in label:
        if not stands(answer, passage):
            start = answer["answer_start"]
            outside = start < 0 or start + len(answer["text"]) > len(passage)
            reason = _OUTSIDE if outside else "an answer without text" if not answer["text"].strip() else _ELSEWHERE
            problems.add(reason + fate, place)
    return not left_out


def _answers(question: Mapping[str, Any], place: str, problems: Problems) -> list[dict[str, Any]] | None:
    found = question.get("answers")
    if found is None:
        return [] if question.get("is_impossible") is True else None
    if isinstance(found, Mapping):  # of `datasets`: lists of texts and of starts
        texts, starts = (list(found.get(key, ())) for key in ("text", "answer_start"))
        if len(texts) != len(starts):
            raise InputError(f"{place}: {len(texts)} texts of answers, but {len(starts)} starts")
        found = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(found, list) or not all(isinstance(answer, Mapping) for answer in found):
        raise InputError(f"{place}: answers must be a list of objects, as SQuAD's are")
    answers = []
    for answer in found:
        start = answer.get("answer_start")
        if not hasattr(start, "__index__") or not isinstance(answer.get("text"), str):
            raise InputError(f"{place}: an answer must have a text and an answer_start, but is {answer!r}")
        answers.append({"text": as_text(answer, "text", place, problems), "answer_start": int(start)})
    if question.get("is_impossible") not in (None, not answers):
        problems.add("is_impossible is otherwise than the answers (these are taken)", place)
    return answers


def _is_json(path: Path | str) -> bool:
    return Path(path).suffix.lower() == ".json"


def _official(path: Path) -> Iterator[_Question]:
    """Of {"data": [{"paragraphs": [{"context", "qas": [...]}]}]}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no SQuAD: it is no JSON ({error})") from error
    for article, where in _listed(content, "data", str(path), path):
        for paragraph, here in _listed(article, "paragraphs", where, path):
            for question, place in _listed(paragraph, "qas", here, path):
                if not isinstance(question, dict):
                    raise InputError(f"{path} is no SQuAD: {place} is no object")
                id = question.get("id")
                yield f"{path}, question {id}", {**question, "id": id, "context": paragraph.get("context")}


def _listed(content: Any, key: str, where: str, path: Path) -> Iterator[tuple[Any, str]]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise InputError(f"{path} is no SQuAD: {where} has no list {key!r}")
    for i, item in enumerate(found):
        yield item, f"{key} {i} of {where}" if where != str(path) else f"{key} {i}"


def _rows(path: Path | str, problems: Problems) -> Iterator[_Question]:
    records = Records(path, _COLUMNS)
    for number, record in records:
        if record is None:
            problems.add("a row that cannot be read (left out)", records.where(number))
        else:
            yield records.where(number), {"id": record.get("id"), **record}
