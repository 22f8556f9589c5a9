"""fastbert answer: answers to questions from passages."""

from pathlib import Path
from typing import Annotated

import typer

from fastbert.commands.judged import JsonLinesOption, PairsArgument, Shared, with_shared_options
from fastbert.commands.options import Model


@with_shared_options
def answer(
    model: Model,
    pairs: PairsArgument = Path("-"),
    *,
    output: JsonLinesOption,
    question_key: Annotated[str, typer.Option(help="The column with the questions.")] = "question",
    passage_key: Annotated[str, typer.Option(help="The column with the passages.")] = "passage",
    max_answer_length: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 15,
    impossible: Annotated[bool, typer.Option("--impossible", help='Let "" be an answer.')] = False,
    doc_stride: Annotated[int, typer.Option(min=0, help="Tokens that windows of a passage have in common.")] = 128,
    shared: Shared,
) -> None:
    """The piece of a passage that answers its question best, with its place in characters, for each row."""
    shared.run(
        "Answerer",
        model,
        pairs,
        {"--question-key": question_key, "--passage-key": passage_key},
        output,
        lambda best: {"answer": best.text, "start": best.start, "end": best.end, "score": best.score},
        max_answer_length=max_answer_length,
        handle_impossible_answer=impossible,
        doc_stride=doc_stride,
    )
