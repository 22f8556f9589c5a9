"""torch.utils.flop_counter counts our operators as it counts PyTorch's own."""

from itertools import accumulate

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastbert import functional
from tests.models import batch, pair


def test_attention_counts_the_scores_of_each_sequence() -> None:
    H, D, seqlens = 3, 8, [5, 1, 9]
    qkv = torch.randn(15, 3, H, D, requires_grad=True)
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        o = functional.attention(qkv, None, None, cu_seqlens, 9)
    assert counter.get_total_flops() == 4 * H * D * (25 + 1 + 81)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == 10 * H * D * (25 + 1 + 81)


def test_causal_attention_counts_the_scores_that_are_seen() -> None:
    H, D, seqlens = 3, 8, [5, 1, 9]
    qkv = torch.randn(15, 3, H, D, requires_grad=True)
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        o = functional.attention(qkv, None, None, cu_seqlens, 9, causal=True)
    assert counter.get_total_flops() == 4 * H * D * (15 + 1 + 45)
    with FlopCounterMode(display=False) as counter:
        o.sum().backward()
    assert counter.get_total_flops() == 10 * H * D * (15 + 1 + 45)


@pytest.mark.parametrize(("causal", "scores"), [(False, 15 * 9), (True, 15 * 5)])
def test_attention_while_tracing(causal: bool, scores: int) -> None:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        cu_seqlens = torch.zeros(4, dtype=torch.int32)
        functional.attention(torch.randn(15, 3, 2, 8), None, None, cu_seqlens, 9, causal=causal)
    assert counter.get_total_flops() == 4 * 2 * 8 * scores


def test_a_model_without_padding_counts_as_transformers_counts_it() -> None:
    stock, fast = pair("BertModel")
    stock.set_attn_implementation("eager")  # PyTorch has no formula for its fused attention on a CPU
    counts = []
    for model in (stock, fast):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch("BertModel", None))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_cross_entropy() -> None:
    x, weight = torch.randn(7, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        functional.linear_cross_entropy(x, weight, None, torch.arange(7)).backward()
    assert counter.get_total_flops() == 6 * 7 * 20 * 8
