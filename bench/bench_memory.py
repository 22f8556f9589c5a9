"""Bytes kept for the backward, per token and layer: what activations cost.  python -m bench.bench_memory

Counted by `torch.autograd.graph.saved_tensors_hooks`, every storage once, parameters left out; so the figures are
exact, and the same on every device. Two models of one and two layers: their difference is one layer.
"""

import torch
import transformers
from torch import Tensor, nn

import fastbert

BATCH, LENGTH = 4, 128


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
        inputs = {"input_ids": torch.randint(5, 1000, (BATCH, LENGTH)), "attention_mask": mask}
        totals.append(kept_bytes(model, inputs))
    return (totals[1] - totals[0]) / (BATCH * LENGTH)


def test_fastbert_keeps_less() -> None:
    stock, fast = (per_token_and_layer(128, "none", patched, torch.bfloat16) for patched in (False, True))
    assert 0 < fast < stock


def main() -> None:
    print("| hidden | dtype | padding | transformers, SDPA | fastbert | ratio |\n|---|---|---|---|---|---|")
    for hidden in (768, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            for padding in ("none", "half"):
                stock, fast = (per_token_and_layer(hidden, padding, patched, dtype) for patched in (False, True))
                name = str(dtype).removeprefix("torch.")
                print(f"| {hidden} | {name} | {padding} | {stock:.0f} | {fast:.0f} | {fast / stock:.2f} |")


if __name__ == "__main__":
    main()
