"""Search by meaning, with any BERT sentence encoder: patch it, and it runs without padding.

pip install 'fastbert-kernels[demo]' sentence-transformers
python examples/embed.py "sleeping through a race" [--texts notes.txt] [--model MODEL]
"""

import argparse
from pathlib import Path

from sentence_transformers import SentenceTransformer

import fastbert
from fastbert.demo import find_model

SENTENCES = """The goose that laid golden eggs was cut open, and there was nothing in it.
A crow dropped pebbles into a pitcher until the water rose to her beak.
The hare lay down for a nap, and the tortoise walked past him.
The mice agreed that the cat should wear a bell, and nobody went to put it on her.
A dog snapped at its reflection in the water, and lost the meat it had."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("query", nargs="?", default="sleeping through a race")
    options.add_argument("--texts", type=Path, help="a text a line")
    options.add_argument("--model", default=find_model(), help="a folder, or on the hub")
    given = options.parse_args()

    model = fastbert.patch(SentenceTransformer(str(given.model)))
    texts = (given.texts.read_text(encoding="utf-8") if given.texts else SENTENCES).splitlines()
    scores = model.similarity(model.encode([given.query]), model.encode(texts))[0]
    for i in scores.argsort(descending=True)[:3].tolist():
        print(f"{scores[i]:.2f}  {texts[i]}")


if __name__ == "__main__":
    main()
