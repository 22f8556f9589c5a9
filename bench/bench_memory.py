"""Bytes kept for the backward, per token and layer: what activations cost.

Counted by `torch.autograd.graph.saved_tensors_hooks`, every storage once, parameters left out; so the figures are
exact, and the same on every device. Two models of one and two layers: their difference is one layer.
"""

from functools import partial
from itertools import product
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import fastbert
from bench.harness import Bench, Figures
from bench.record import OURS

BATCH, LENGTH = 4, 128
SMALLEST = [{"hidden": 128, "dtype": "bfloat16", "padding": "none"}]
_CASES = [
    {"hidden": hidden, "dtype": dtype, "padding": padding}
    for hidden, dtype, padding in product((768, 1024), ("bfloat16", "float32"), ("none", "half"))
]
CASES: dict[str, list[dict[str, Any]]] = {"cpu": _CASES, "cuda": []}  # the same on every device


def kept_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """What the graph of the last hidden state keeps alive, without the parameters."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0

    def keep(t: Tensor) -> Tensor:
        nonlocal total
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        last = model(**inputs).last_hidden_state  # alive until everything is counted: no address is used twice
    del last
    return total


def per_token_and_layer(hidden: int, padding: str, patched: bool, dtype: torch.dtype) -> float:
    """Bytes of one layer for each slot of the (padded) batch."""
    torch.manual_seed(0)
    lengths = torch.full((BATCH,), LENGTH) if padding == "none" else torch.tensor([128, 84, 40, 4])
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    totals = []
    for layers in (1, 2):
        config = transformers.BertConfig(
            hidden_size=hidden,
            num_attention_heads=hidden // 64,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            vocab_size=1000,
            attention_probs_dropout_prob=0.0,  # with it, transformers would keep all probabilities on a CPU
        )
        model = transformers.BertModel(config, add_pooling_layer=False).to(dtype).train()
        if patched:
            fastbert.patch(model)
        inputs = {"input_ids": torch.randint(5, 1000, (BATCH, LENGTH)) * mask, "attention_mask": mask}
        totals.append(kept_bytes(model, inputs))
    return (totals[1] - totals[0]) / (BATCH * LENGTH)


def test_memory(case: dict[str, Any], untimed: Bench) -> None:
    def kept(name: str) -> Figures:
        dtype = getattr(torch, case["dtype"])
        return Figures(values={name: per_token_and_layer(case["hidden"], case["padding"], name == OURS, dtype)})

    providers = {name: partial(kept, name) for name in ("transformers SDPA", OURS)}
    row = untimed.figures("memory", case, providers, unit="B per token and layer")
    assert row.failures or 0 < row.values[OURS] < row.values["transformers SDPA"]
