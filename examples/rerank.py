"""The best of what a search has found, by a cross-encoder, which reads query and text together.

pip install fastbert-kernels sentence-transformers
python examples/rerank.py "how did the bird get to the water?" [--texts found.txt] [--model MODEL]
"""

import argparse
from pathlib import Path

from sentence_transformers import CrossEncoder

import fastbert

FOUND = """A dog snapped at its reflection in the water, and lost the meat it had.
A crow dropped pebbles into a pitcher until the water rose to her beak.
Two frogs found a well, and asked each other how they would get out of it."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("query", nargs="?", default="how did the bird get to the water?")
    options.add_argument("--texts", type=Path, help="a text a line")
    options.add_argument("--model", default="cross-encoder/ms-marco-MiniLM-L6-v2", help="a folder, or on the hub")
    given = options.parse_args()

    reranker = fastbert.patch(CrossEncoder(given.model))
    texts = (given.texts.read_text(encoding="utf-8") if given.texts else FOUND).splitlines()
    for hit in reranker.rank(given.query, texts):
        print(f"{hit['score']:6.2f}  {texts[hit['corpus_id']]}")


if __name__ == "__main__":
    main()
