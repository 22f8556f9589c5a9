"""Go on pretraining a model on the text of a domain, with its own vocabulary, and masked words only.

pip install 'fastbert-kernels[pretrain]'
python examples/continue_pretraining.py notes/*.txt --init-from bert-base-uncased [--steps 2000]
"""

import argparse
from pathlib import Path

import fastbert
from fastbert.data.prepare import prepare
from fastbert.data.pretraining import Sampling
from fastbert.data.readers import Reader
from fastbert.data.vocabulary import load_tokenizer
from fastbert.training.pretraining import pretrain
from fastbert.training.recipe import Recipe

FABLES = Path(fastbert.__file__).with_name("assets") / "fables.jsonl"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("files", nargs="*", type=Path, default=[FABLES], help=".txt, .jsonl or .md, also .gz")
    options.add_argument("--init-from", default="google-bert/bert-base-uncased", help="a folder, or on the hub")
    options.add_argument("--output", type=Path, default=Path("continued"))
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--batch-size", type=int, default=32)
    given = options.parse_args()

    name, corpus = given.init_from, given.output / "corpus"
    prepare(given.files, corpus, lambda: load_tokenizer(name), asked={"vocab": name}, reader=Reader())
    sampling = Sampling(objective="mlm", batch_size=given.batch_size)
    recipe = Recipe(None, name, given.steps, ((128, 1.0),), sampling, learning_rate=5e-5, warmup=given.steps // 10)
    print(pretrain(recipe, corpus, given.output / "run"))  # for from_pretrained of transformers or fastbert


if __name__ == "__main__":
    main()
