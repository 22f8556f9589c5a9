"""The input pipeline: tokens a second of masked, packed batches, from a token store in memory.

fastbert cuts sentence pairs, masks and packs; transformers' collator gets sequences that are cut already, masks and
pads. Both with as many threads as the case says: with one it is speed per core.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

pytest.importorskip("fastbert._C", reason="needs fastbert's C++ extension")

from bench.harness import Bench, Ready
from bench.record import OURS, Work
from fastbert.data.pretraining import Batch, Phase, PretrainingBatches, Sampling
from tests.corpora import SPECIAL, VOCABULARY, random_store

BATCH = 256
COLLATOR = "transformers DataCollatorForLanguageModeling"
SMALLEST = [{"masking": "token", "S": 32, "threads": 1}]
_CASES = [
    {"masking": masking, "S": S, "threads": threads}
    for threads in (1, 2)
    for S in (128, 512)
    for masking in ("token", "whole-word", "span")
]
CASES: dict[str, list[dict[str, Any]]] = {"cpu": _CASES, "cuda": []}  # the GPU has no part in it


def _fast(case: dict[str, Any]) -> Callable[[], Batch]:
    """The next batch, planned, written and masked; not made ahead."""
    store, sampling = random_store(2000, sentences=30, tokens=50), Sampling(masking=case["masking"], batch_size=BATCH)
    batches: Any = PretrainingBatches(store, sampling, (Phase(case["S"], 10**9),), threads=case["threads"])
    return partial(next, batches._micro_batches())


class _Tokenizer(transformers.PreTrainedTokenizerFast):
    """As many tokens as the store has, and its special ones."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import WordPiece

        names = {"[PAD]": SPECIAL.pad, "[UNK]": SPECIAL.unk, "[CLS]": SPECIAL.cls}
        names |= {"[SEP]": SPECIAL.sep, "[MASK]": SPECIAL.mask}
        words = {("##" if i >= 400 else "") + str(i): i for i in range(len(names), VOCABULARY)}
        backend = Tokenizer(WordPiece(names | words, unk_token="[UNK]"))
        special = {f"{name[1:-1].lower()}_token": name for name in names}
        super().__init__(tokenizer_object=backend, **special)


def _collator(lengths: list[int]) -> Callable[[], Any]:
    generator = np.random.default_rng(0)
    examples = [{"input_ids": generator.integers(5, VOCABULARY, n).tolist()} for n in lengths]
    return partial(transformers.DataCollatorForLanguageModeling(_Tokenizer()), examples)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def _rate_is_wrong(labels: Tensor, tokens: int) -> str | None:
    rate = float((labels != -100).sum()) / tokens
    return None if 0.1 < rate < 0.2 else f"{rate:.1%} of the tokens have a label, not 15%"


def test_input(case: dict[str, Any], bench: Bench) -> None:
    pytest.importorskip("fastbert._C", reason="needs the C++ extension, which is not built")
    step = _fast(case)
    sample = [step() for _ in range(8)]
    tokens = round(float(np.mean([batch["input_ids"].shape[1] for batch in sample])))
    lengths = sample[0]["cu_seq_lens_q"].diff().tolist()

    def fast() -> Ready:
        wrong = _rate_is_wrong(sample[0]["labels"], sample[0]["input_ids"].shape[1])
        return Ready([step], wrong)

    def stock() -> Ready:
        collate = _collator(lengths)
        return Ready([collate], _rate_is_wrong(collate()["labels"], sum(lengths)))

    providers = {OURS: fast}
    if case["masking"] == "token":  # for whole words the collator wants offsets into the text
        providers[COLLATOR] = stock
    with _threads(case["threads"]):
        bench.steps("input", case, providers, Work(tokens=tokens, sequences=BATCH))
