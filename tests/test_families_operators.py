"""What runs for each family: operators per layer and around them, counted against BERT's; and what `report` says.

Dimension key:  L padded length
"""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.roberta.modeling_roberta import RobertaPreTrainedModel

import fastbert
from tests.families import BASES, both, dropping, packed_and_padded
from tests.models import batch, config_of, mask_named

VIEWS = {"view", "t", "detach", "permute", "select", "slice", "unsqueeze", "expand", "transpose"}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function).split(".")[1]
        self.counts[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


def _counts(name: str, layers: int) -> tuple[Counter[str], Counter[str]]:
    """Of a training step's forward and backward pass, of a packed batch, with dropout."""
    sizes = {"num_hidden_layers": layers, "num_hidden_groups": 1, "inner_group_num": 1}
    model = fastbert.patch(getattr(fastbert, name)(config_of(name, **sizes, **dropping(0.1))), strict=True).train()
    inputs, _ = packed_and_padded(name)
    model(**inputs)
    with _Counting() as forward:
        output = model(**inputs).last_hidden_state
    with _Counting() as backward:
        output.sum().backward()
    return forward.counts, backward.counts


def _layer_and_rest(name: str) -> list[Counter[str]]:
    """A layer's forward and backward, and what is around the layers."""
    one, two = _counts(name, 1), _counts(name, 2)
    layer = [Counter({key: n for key in b if (n := b[key] - a[key])}) for a, b in zip(one, two, strict=True)]
    rest = [Counter({key: n for key in a if (n := a[key] - of[key])}) for a, of in zip(one, layer, strict=True)]
    return layer + rest


# PyTorch's dropout behind a product, for none is fused where no LayerNorm comes behind it.
DROPS = {"mul": 1, "empty_like": 1, "bernoulli_": 1, "div_": 1}
# The sums of a layer that normalises first, and products with biases: no LayerNorm behind them takes these.
SUMS = {"add": 2, "addmm": 2, "linear_gelu_fwd": 1}
# Positions are counted over the ids that are not the padding id, and begin anew in each sequence.
COUNTED = {"arange": 1, "sub": 3, "index": 1, "_to_copy": 1, "ne": 1, "cumsum": 1, "mul": 1, "add": 1}
UNPADDED = {"clone": 1, "lift_fresh": 1, "fill_": 1}  # no gradient for the padding id's position

# What a family computes that BERT does not: in a layer's forward and backward, and around all layers.
EXTRAS: dict[str, list[dict[str, int]]] = {
    "AlbertModel": [{}, {"add": 16}, {"addmm": 1}, {"mm": 2, "sum": 1}],  # gradients of shared weights; the projection
    "DistilBertModel": [{}, {}, {"new_zeros": 1}, {}],  # one token type, that adds nothing
    "ElectraModel": [{}, {}, {}, {"mm": 2, "sum": 1}],  # the projection; its forward is in a pooler's place
    "ErnieModel": [{}, {}, {"zeros_like": 1, "aminmax": 1}, {}],  # task types, zeros where none are given
    "RobertaModel": [{}, {}, COUNTED, UNPADDED],
    "RobertaPreLayerNormModel": [
        {**SUMS, **{key: 2 * n for key, n in DROPS.items()}},
        {"mul": 2, "sum": 2},
        COUNTED | {"layer_norm_fwd": 1},
        UNPADDED | {"layer_norm_bwd": 1},
    ],
    "XLMRobertaXLModel": [
        {**SUMS, **DROPS},
        {"mul": 1, "sum": 2},
        COUNTED | {"add": 3, "embedding": 3, "layer_norm_fwd": 1, **DROPS, "mul": 2},  # a sum without a LayerNorm
        {"mul": 1, "embedding_dense_backward": 3, "layer_norm_bwd": 1},
    ],
}


@pytest.mark.parametrize("name", BASES)
def test_berts_operators_run(name: str) -> None:
    ours, berts = _layer_and_rest(name), _layer_and_rest("BertModel")
    for of_family, of_bert, extra in zip(ours, berts, EXTRAS[name], strict=True):
        assert dict(of_family - of_bert) == extra
    less = {"mm": 1, "feed_forward_fwd": 1} if "linear_gelu_fwd" in EXTRAS[name][0] else {}
    assert [berts[0] - ours[0], berts[1] - ours[1]] == [less, {}]


LAST = "last layer, in training: only the rows that are read"
NO_PADDING = "no padding from the embeddings to the last layer"
EMBEDDINGS = "embedding sum + LayerNorm + dropout"
NORM = "bias + dropout + residual + LayerNorm"
ATTENTION = "packed attention"
GELU = "linear + bias + GELU"
FEED_FORWARD = "feed-forward in one operator, its GELU not kept"
MLM = {LAST: 1, "MLM head: linear + bias + GELU": 1, "MLM head: labelled rows only": 1, NO_PADDING: 1}
ALL = {**MLM, EMBEDDINGS: 1, ATTENTION: 2, FEED_FORWARD: 2}
LAYER = {"48 -> 144": 2, "48 -> 48": 2, "48 -> 96 + GELU": 2, "96 -> 48": 2}
NARROW, WIDE = {"48 -> 24 + GELU": 1}, {"48 -> 48 + GELU": 1}
FIRST = {f"{NORM}: the LayerNorm comes first": 4, f"{FEED_FORWARD}: the LayerNorm comes first": 2}

# Of two layers: what is fused, what is not, and the products.
REPORTS: dict[str, tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    "AlbertForMaskedLM": (
        {**ALL, ATTENTION: 4, FEED_FORWARD: 4, NORM: 4},
        {},
        {**{key: 2 * n for key, n in LAYER.items()}, **NARROW},
    ),
    "DistilBertForMaskedLM": ({**ALL, "bias + residual + LayerNorm": 2}, {}, {**LAYER, **WIDE}),
    "ElectraForMaskedLM": ({**ALL, NORM: 4, GELU: 2}, {}, {**LAYER, **NARROW}),
    "ErnieForMaskedLM": ({**ALL, NORM: 4, GELU: 2}, {}, {**LAYER, **WIDE}),
    "RobertaForMaskedLM": ({**ALL, NORM: 4, GELU: 2}, {}, {**LAYER, **WIDE}),
    "RobertaPreLayerNormForMaskedLM": ({**MLM, EMBEDDINGS: 1, ATTENTION: 2, GELU: 2}, FIRST, {**LAYER, **WIDE}),
    "XLMRobertaXLForMaskedLM": (
        {**MLM, ATTENTION: 2, GELU: 2},
        {**FIRST, f"{EMBEDDINGS}: there is no LayerNorm": 1},
        {**LAYER, **WIDE},
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_report(name: str) -> None:
    _, fast = both(name, strict=True)
    fast(**batch(name, mask_named("right")))
    report = fastbert.report(fast)
    products = {text.partition(":")[0]: count for text, count in report.products.items()}
    assert (dict(report.fused), dict(report.plain), products) == REPORTS[name]
    assert f"{name} on cpu" in str(report)
    assert "1 packed, 0 fell back" in str(report)


class MyHead(RobertaPreTrainedModel):
    """Somebody's own head, which fastbert has not."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.roberta = transformers.RobertaModel(config, add_pooling_layer=False)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.score(self.roberta(input_ids, attention_mask=attention_mask).last_hidden_state)


def test_an_encoder_in_a_head_of_ones_own() -> None:
    stock = MyHead(config_of("RobertaModel", num_hidden_layers=2)).eval()
    fast = fastbert.patch(copy.deepcopy(stock), strict=True)
    inputs = batch("RobertaModel", mask_named("right"))
    del inputs["token_type_ids"]
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(fast(**inputs)[keep], stock(**inputs)[keep], atol=1e-5, rtol=1e-5)
    report = fastbert.report(fast)
    assert report.packed_calls == 1
    assert report.fused[ATTENTION] == 2
    assert report.plain == {"MyHead, around it: it comes from no class that fastbert knows": 1}
    assert type(fastbert.unpatch(fast).roberta) is transformers.RobertaModel
