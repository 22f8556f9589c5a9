"""A BERT from raw text: its vocabulary, the token store, the model. A tiny one, of the fables that come with fastbert.

pip install 'fastbert-kernels[pretrain]'
python examples/pretrain_from_scratch.py [FILES...] [--output scratch] [--steps 1000]
"""

import argparse
from functools import partial
from pathlib import Path

import fastbert
from fastbert.data.prepare import prepare, train_vocabulary
from fastbert.data.pretraining import Sampling
from fastbert.data.readers import Reader
from fastbert.training.pretraining import pretrain
from fastbert.training.recipe import Recipe

FABLES = Path(fastbert.__file__).with_name("assets") / "fables.jsonl"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("files", nargs="*", type=Path, default=[FABLES], help=".txt, .jsonl or .md, also .gz")
    options.add_argument("--output", type=Path, default=Path("scratch"))
    options.add_argument("--steps", type=int, default=1000)
    given = options.parse_args()

    corpus, size, reader = given.output / "corpus", 600, Reader()  # 30,522 tokens for English at large
    train = partial(train_vocabulary, given.files, reader, size, cased=False)
    prepare(given.files, corpus, train, asked={"train": size}, reader=reader)
    sampling = Sampling(batch_size=32)
    recipe = Recipe("tiny", None, given.steps, ((64, 1.0),), sampling, learning_rate=2e-3, warmup=given.steps // 20)
    print(pretrain(recipe, corpus, given.output / "run"))  # killed at any moment, the same command goes on


if __name__ == "__main__":
    main()
