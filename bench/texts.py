"""What people give an encoder, by the name of a task: texts, or pairs of them, always the same.

They come from ../shared/data, or where that is missing from the fables that fastbert brings, cut into pieces of such
lengths; a case names its source.
"""

import csv
import gzip
import json
import random
from collections.abc import Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared/data"
FABLES = "fables"
_ARTICLES = 600


class Task(NamedTuple):
    """
    Attributes:
        source: of its texts, in the shared data.  max_length: tokens at which a text or a pair is cut.
        words: of a text, at least and at most, before it is cut.
        pairs: whether it is about a question with a passage each; then `words` are those of the passage.
    """

    source: str
    max_length: int
    words: tuple[int, int]
    pairs: bool = False


TASKS = {
    "queries": Task("SQuAD", 256, (8, 22)),  # 10 to 30 tokens
    "sentences": Task("STS-B", 256, (4, 40)),
    "passages": Task("Wikipedia", 256, (12, 400)),
    "pairs": Task("SQuAD", 384, (40, 350), pairs=True),
    "rerank": Task("Wikipedia", 256, (20, 60), pairs=True),  # one question, many passages
    "unpadded": Task("Wikipedia", 512, (600, 700)),  # longer than 512 tokens
    "query": Task("SQuAD", 256, (8, 9)),
    "unsorted": Task("STS-B, SQuAD, Wikipedia", 256, (4, 400)),  # as they arrive: nothing can be sorted
}
QUESTION = 8, 22  # words


def source(task: str) -> str:
    """Where the texts of a task come from on this machine."""
    return TASKS[task].source if DATA.is_dir() else FABLES


@cache
def items(task: str, count: int) -> Sequence[str] | Sequence[tuple[str, str]]:
    """So many texts of a task, or pairs of a question and a passage."""
    it = TASKS[task]
    if not DATA.is_dir():
        return of_fables(task, count)
    if task == "unsorted":
        of_each = [_chosen(_texts(name), -(-count // 3), it.words) for name in it.source.split(", ")]
        return _shuffled([text for texts in of_each for text in texts])[:count]
    if task == "unpadded":
        return _chosen(_articles(), count, it.words)
    if not it.pairs:
        return _chosen(_texts("questions" if it.source == "SQuAD" else it.source), count, it.words)
    if task == "rerank":
        (question,) = items("query", 1)
        return [(str(question), passage) for passage in _chosen(_texts(it.source), count, it.words)]
    found = [(q, p) for q, p in _squad() if _fits(q, QUESTION) and _fits(p, it.words)]
    return random.Random(0).sample(found, count)


@cache
def scored_sentences() -> list[tuple[str, str, float]]:
    """STS-B's dev set: two sentences, and how alike people found them, 0 to 5. Empty where it is missing."""
    rows = _table(DATA / "glue/STS-B/dev.tsv")
    return [(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]


@cache
def labelled_sentences(part: str) -> list[tuple[str, int]]:
    """SST-2's "train" or "dev" set: a sentence, and whether it is friendly. Empty where it is missing."""
    return [(row["sentence"], int(row["label"])) for row in _table(DATA / f"glue/SST-2/{part}.tsv")]


def sample(count: int, pairs: bool) -> Sequence[str] | Sequence[tuple[str, str]]:
    """Texts or pairs to calibrate a quantisation with; where there is the data, none that is measured with."""
    texts = sorted({row["sentence1"] for row in _table(DATA / "glue/STS-B/train.tsv")} - {*_texts("STS-B")})
    if not texts:
        return items("pairs" if pairs else "passages", count)
    chosen = random.Random(1).sample(texts, 2 * count if pairs else count)
    return list(zip(chosen[:count], chosen[count:], strict=True)) if pairs else chosen


def _chosen(texts: Sequence[str], count: int, words: tuple[int, int]) -> list[str]:
    return random.Random(0).sample([text for text in texts if _fits(text, words)], count)


def _shuffled(texts: Sequence[str]) -> list[str]:
    return random.Random(0).sample(texts, len(texts))


def _fits(text: str, words: tuple[int, int]) -> bool:
    return words[0] <= len(text.split()) <= words[1]


@cache
def _texts(name: str) -> list[str]:
    if name == "STS-B":
        return sorted({text for first, second, _ in scored_sentences() for text in (first, second)})
    if name == "Wikipedia":
        return [text for paragraphs in _wikipedia() for text in paragraphs]
    question = name == "questions"
    return sorted({pair[0 if question else 1] for pair in _squad()})


@cache
def _wikipedia() -> list[list[str]]:
    with gzip.open(DATA / "text/wikipedia-7949-articles.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["paragraphs"] for line in islice(lines, _ARTICLES)]


@cache
def _articles() -> list[str]:
    """The first 650 words of each article that has so many."""
    joined = (" ".join(paragraphs).split() for paragraphs in _wikipedia())
    return [" ".join(words[:650]) for words in joined if len(words) >= 650]


@cache
def _squad() -> list[tuple[str, str]]:
    content = json.loads((DATA / "squad/dev-v1.1.json").read_text(encoding="utf-8"))
    paragraphs = [it for article in content["data"] for it in article["paragraphs"]]
    return [(qa["question"].strip(), it["context"]) for it in paragraphs for qa in it["qas"]]


def _table(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def of_fables(task: str, count: int) -> Sequence[str] | Sequence[tuple[str, str]]:
    lines = (ROOT / "fastbert/assets/fables.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(json.loads(line)["text"] for line in lines).split()
    draw = random.Random(0)

    def piece(between: tuple[int, int]) -> str:
        start, length = draw.randrange(len(words)), round(between[0] + (between[1] - between[0]) * draw.random() ** 3)
        return " ".join((words[start:] + words)[:length])

    it = TASKS[task]
    if not it.pairs:
        return [piece(it.words) for _ in range(count)]
    question = piece(QUESTION)
    return [(question if task == "rerank" else piece(QUESTION), piece(it.words)) for _ in range(count)]
