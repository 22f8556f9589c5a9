"""Layers that are prepared for inference on a CPU: what their tests share.

Dimension key:  T packed tokens   N features
"""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastbert
from fastbert.families import _base
from fastbert.packing import Packing
from fastbert.prepared import PRECISIONS, Parts, why_no_precision
from tests.models import batch, config_of, mask_named

HERE = [precision for precision in PRECISIONS if why_no_precision(precision) is None]
needs_fp32 = pytest.mark.skipif("fp32" not in HERE, reason=str(why_no_precision("fp32")))
# Of LayerNorm's outputs, which are about 1, and of sums that two layers begin: two layers' worth of rounding.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "int8": 0.15}
NORM_FIRST = ["RobertaPreLayerNormModel", "XLMRobertaXLModel"]


def layer_of(
    N: int, heads: int, head_dim: int, inner: int, form: str, bias: bool, norm_first: bool = False
) -> tuple[Parts, nn.ModuleList]:
    context = heads * head_dim
    sizes = [(N, context)] * 3 + [(context, N), (N, inner), (inner, N)]
    linears = [nn.Linear(*size, bias=bias) for size in sizes]
    norms = [nn.LayerNorm(N, eps=1e-6), nn.LayerNorm(N, eps=1e-6)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.1)
        nn.init.normal_(norm.bias, 0, 0.1)
    q, k, v, o, up, down = linears
    parts = Parts(q, k, v, o, norms[0], up, nn.GELU(form), down, norms[1], head_dim, head_dim**-0.5, norm_first)
    return parts, nn.ModuleList([*linears, *norms])


def both(name: str = "BertModel", **options: Any) -> tuple[Any, Any]:
    stock = getattr(transformers, name)(config_of(name)).eval()
    with torch.no_grad():
        for weight in stock.parameters():  # biases too
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return stock, fastbert.patch(copy.deepcopy(stock), **options)


def copy_of(model: nn.Module) -> Any:
    return _base.state(model).copy


def hidden(model: Any, name: str = "BertModel") -> Tensor:
    """Of the same batch each time."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = batch(name, mask_named("right"))
        return model(**inputs)[0][inputs["attention_mask"].bool()]


def at_once(model: Any) -> Tensor | None:
    """What an engine asks for."""
    with torch.inference_mode():
        ids, bounds = torch.arange(5, 22)[None], torch.tensor([0, 7, 17], dtype=torch.int32)
        found: Tensor | None = model.encode_packed(ids, None, Packing.from_cu_seqlens(bounds, 10, 17))
        if found is not None:
            called = model(input_ids=ids, cu_seq_lens_q=bounds, max_length_q=10).last_hidden_state[0]
            torch.testing.assert_close(found, called, atol=1e-5, rtol=1e-5)
        return found
