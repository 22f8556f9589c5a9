"""What `make finetune-demo` learns from, and what it runs."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest

from fastbert.demo import load_fables
from fastbert.tasks import fables
from fastbert.tasks.fables import NARRATION, OPENING, SPEECH, YOURS, make, rows_of, table
from tests.checkpoints import minilm

ROOT = Path(__file__).parents[1]
TALE = 'A penguin met a seal. "Good day to you," he said, "and to your wife. Is she well?" She was. "Yes!" It rained.'


def test_parts_of_a_tale() -> None:
    assert list(rows_of(TALE)) == [
        ("A penguin met a seal.", OPENING),
        ("Good day to you.", SPEECH),
        ("And to your wife. Is she well?", SPEECH),
        ("She was.", NARRATION),
        ("It rained.", NARRATION),
    ]


def test_a_tale_that_begins_with_speech_has_no_opening() -> None:
    assert {part for _, part in rows_of('"Where are you going?" asked the fox. The goose flew away.')} == {
        SPEECH,
        NARRATION,
    }


def test_nothing_of_the_answer_is_in_a_sentence() -> None:
    rows = [row for split in make() for row in split]
    assert len(rows) > 600
    for text, _ in rows:
        assert '"' not in text
        assert text[0].isupper() or not text[0].isalpha(), text
        assert re.search(r"[.!?]$|[-—]$", text), text


def test_it_is_judged_on_other_fables() -> None:
    train, dev = make()
    assert not {text for text, _ in train} & {text for text, _ in dev}
    texts = [fable.text for fable in load_fables()]

    def tales(rows: list[tuple[str, str]]) -> set[int]:
        return {i for text, part in rows if part == OPENING for i, tale in enumerate(texts) if tale.startswith(text)}

    assert not tales(train) & tales(dev)
    for rows in (train, dev):
        (_, most), *others = Counter(part for _, part in rows).most_common()
        assert len(others) == 2
        assert 0.5 < most / len(rows) < 0.62  # who always says the same is right in no more


def test_ones_own_sentences_are_in_no_fable() -> None:
    told = " ".join(fable.text for fable in load_fables())
    assert len(YOURS) == 3
    assert not any(word in told for word in ("penguin", "seal", "whale"))
    assert not any(sentence in told for sentence in YOURS)


def test_the_table_is_csv() -> None:
    rows = [('He said: "no", and left', NARRATION), ("plain", OPENING)]
    assert [tuple(row) for row in csv.reader(table(rows).splitlines())] == [("text", "part"), *rows]


def test_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    minilm()
    fables.main(tmp_path / "tales")
    assert {path.name for path in (tmp_path / "tales").iterdir()} == {"train.csv", "dev.csv", "yours.txt", fables.MODEL}
    assert (tmp_path / "tales" / fables.MODEL / "config.json").is_file()
    train, dev = capsys.readouterr().err.splitlines()
    assert re.search(r"train\.csv: \d+ sentences, 5\d% narration, \d+% speech, \d+% opening$", train)
    assert re.search(r"dev\.csv: \d+ sentences, ", dev)


def test_its_commands_name_what_is_there() -> None:
    target = (ROOT / "Makefile").read_text().partition("\nfinetune-demo:")[2].partition("\n\n")[0]
    assert f"$(TALES)/{fables.MODEL} " in target
    assert [words.split()[0] for words in re.findall(r"^\t\$\(BIN\)/fastbert (.*)", target, re.MULTILINE)] == [
        "finetune",
        "evaluate",
        "predict",
        "plot",
    ]
    assert {*re.findall(r"\$\(TALES\)/(\w+\.\w+)", target)} == {"train.csv", "dev.csv", "yours.txt", "yours.jsonl"}
