"""Layers prepared for inference with products of int8, operator by operator: what a GPU runs.

    q, scale = quantize_rows(hidden)                       once, in front of the first layer
    qkv      = linear_int8(q, scale),  o = attention(qkv)
    h        = LayerNorm(linear_int8(quantize_rows(o)) + hidden), and its rows as int8 in the same pass
    pre      = linear_int8(h's rows)
    hidden   = LayerNorm(linear_int8(quantize_rows(gelu(pre))) + h), and its rows as int8: the next layer's

Weights have a scale for each output, tokens one for each row, as they come: there is nothing to calibrate. Softmax,
LayerNorm, GELU and residual stream are in the model's own dtype, with sums in float32. Numbers are those of
`fastbert.prepared`'s int8 on a CPU, but for attention's products, and what is rounded to the dtype between operators.

Dimension key:  B sequences   T packed tokens   N features   K features of a product's input
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastbert import functional, touched
from fastbert.packing import Packing
from fastbert.prepared import Parts


class Weight(NamedTuple):
    """Of a product. int8: (N, K).  scale: (N,) float32.  bias: (N,), or None."""

    int8: Tensor
    scale: Tensor
    bias: Tensor | None


class PreparedInt8:
    """A model's layers with the weights of now, as int8.

    Args:
        layers: in the order in which they run; one that runs twice is there twice. `why_not` of them is None.
    """

    def __init__(self, layers: Sequence[Parts]) -> None:
        self._weights = {layer: _weights(layer) for layer in dict.fromkeys(layers)}
        self._layers = list(layers)

    def run(self, hidden_TN: Tensor, packing: Packing, *, first_only: bool = False) -> Tensor:
        """All layers.

        Returns:
            (T, N); with first_only (B, N), each sequence's first token, zeros for an empty sequence.
        """
        rows, scale = functional.quantize_rows(hidden_TN)
        for i, layer in enumerate(self._layers):
            qkv, attention_out, inner, out = self._weights[layer]
            dtype = hidden_TN.dtype
            q = functional.linear_int8(rows, scale, *qkv, out_dtype=dtype).unflatten(-1, (3, -1, layer.head_dim))
            context = functional.attention(
                q, None, None, packing.cu_seqlens, packing.max_seqlen, scale=layer.scale
            ).flatten(1)
            if first_only and i + 1 == len(self._layers):
                firsts = packing.first_rows()
                context, hidden_TN = context.index_select(0, firsts), hidden_TN.index_select(0, firsts)
            x = functional.linear_int8(*functional.quantize_rows(context), *attention_out[:2], out_dtype=dtype)
            hidden_TN, rows, scale = _add_and_normalise(x, attention_out.bias, layer.attention_norm, hidden_TN)
            x = functional.linear_int8(rows, scale, *inner, out_dtype=dtype)
            inside = functional.quantize_rows(x, gelu=touched.gelu_form(layer.activation))
            x = functional.linear_int8(*inside, *out[:2], out_dtype=dtype)
            hidden_TN, rows, scale = _add_and_normalise(x, out.bias, layer.norm, hidden_TN)
        return packing.blank_empty(hidden_TN) if first_only else hidden_TN


def why_not(layers: Sequence[Parts]) -> str | None:
    """Why these layers cannot run so, or None: for people."""
    if layers[0].norm_first:
        return "int8 on a GPU is for layers that normalise last"
    widest = max(layers[0].inner.out_features, layers[0].query.in_features)
    if widest > functional.MAX_FEATURES:
        return f"int8 on a GPU is for {functional.MAX_FEATURES:,} features at most, and a layer has {widest:,}"
    return None


def _weights(layer: Parts) -> tuple[Weight, Weight, Weight, Weight]:
    return (
        _quantized(layer.query, layer.key, layer.value),
        _quantized(layer.attention_out),
        _quantized(layer.inner),
        _quantized(layer.out),
    )


def _quantized(*of: nn.Linear) -> Weight:
    """Of one product, or of several with the same input, one below the other."""
    int8, scale = functional.quantize_rows(torch.cat([linear.weight.detach() for linear in of]))
    if all(linear.bias is None for linear in of):
        return Weight(int8, scale, None)
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach() for linear in of
    ]
    return Weight(int8, scale, torch.cat(biases))


def _add_and_normalise(
    x: Tensor, x_bias: Tensor | None, norm: nn.LayerNorm, residual_TN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return functional.layer_norm_int8(x, norm.weight, norm.bias, residual=residual_TN, x_bias=x_bias, eps=norm.eps)
