"""A task from the fables that come with fastbert, for `make finetune-demo`: which part of a tale is a sentence?

    python -m fastbert.tasks.fables FOLDER

writes train.csv, dev.csv and yours.txt, and a link to the checkpoint that is tuned.
"""

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastbert.demo import find_model, load_fables
from fastbert.terminal import counted, note
from fastbert.training.results import write_whole

OPENING, NARRATION, SPEECH = "opening", "narration", "speech"
MODEL = "all-MiniLM-L6-v2"
# A fable of three sentences that is nowhere in the data: an opening, a speech and a narration.
YOURS = (
    "A penguin and a seal once argued over which of them was the better swimmer.",
    "Let us ask the whale, for he has no reason to flatter either of us!",
    "They found the whale fast asleep, and swam home without a word.",
)
_DEV = 4  # a fable of so many is one to judge on
_WORDS = 4  # of a speech at least: nobody knows who says "Never!"
_WHOLE = r"(?:^|(?<=[.!?]\s))[A-Z].*?[.!?]+(?=\s|$)"

Row = tuple[str, str]


def rows_of(text: str) -> Iterator[Row]:
    """What is said in a fable, without its quotes, and the sentences in which nothing is said; each with its part."""
    for i, piece in enumerate(text.split('"')):
        if i % 2:
            said = _sentence(piece)
            if len(said.split()) >= _WORDS:
                yield said, SPEECH
        else:
            for match in re.finditer(_WHOLE, piece.strip()):
                yield match[0], OPENING if i == 0 and match.start() == 0 else NARRATION


def _sentence(said: str) -> str:
    """With a capital and a full stop, which what goes on behind the quotes lacks."""
    said = re.sub(",$", ".", said.strip())
    return said[:1].upper() + said[1:]


def make() -> tuple[list[Row], list[Row]]:
    """Rows to train on and to judge on, of other fables."""
    train: list[Row] = []
    dev: list[Row] = []
    for i, fable in enumerate(load_fables()):
        (dev if i % _DEV == _DEV - 1 else train).extend(rows_of(fable.text))
    return train, dev


def table(rows: Sequence[Row]) -> str:
    """As CSV, with a header."""
    writer = csv.writer(file := io.StringIO(), lineterminator="\n")
    writer.writerows([("text", "part"), *rows])
    return file.getvalue()


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(("train", "dev"), make(), strict=True):
        write_whole(folder / f"{name}.csv", table(rows))
        counts = Counter(part for _, part in rows)
        note(
            f"{folder / name}.csv: {counted(len(rows), 'sentence')},"
            f" {', '.join(f'{n / len(rows):.0%} {part}' for part, n in counts.most_common())}"
        )
    write_whole(folder / "yours.txt", "".join(f"{line}\n" for line in YOURS))
    (folder / MODEL).symlink_to(find_model())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
