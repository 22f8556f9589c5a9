"""Layers prepared for inference on a CPU: one call of C++ for all, over weights in the order in which they are read.

On a GPU there is something to prepare for int8 alone: `fastbert.prepared_int8`.

What `fastbert.encoder` does, without a call for each module and operator: csrc/encoder.h. The layers' weights are
copied, so a model that has run so holds them twice; a copy is made anew when one of them is another, and dropped in
training. Embedding tables are read where they lie, and their sum is a part of the call.

Dimension key:  B sequences   T packed tokens   N features
"""

import contextlib
import operator
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

from fastbert import touched
from fastbert.packing import Packing

try:
    from fastbert import _C
except ImportError:  # a bare checkout
    _C = None  # type: ignore[assignment]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # then it is the kernels that are looked at
NAME = "fastbert::layers"  # what a profiler sees
PRECISIONS = {"fp32": "AVX2", "bf16": "AVX-512 BF16", "int8": "AVX-512 VNNI"}  # and what they need


class Parts(NamedTuple):
    """What a layer consists of.

    Attributes:
        attention_norm, norm: the attention's and the feed-forward's, behind their sums.
        scale: of the attention's scores.
        norm_first: the LayerNorms stand in front of attention and feed-forward instead.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_out: nn.Linear
    attention_norm: nn.LayerNorm
    inner: nn.Linear
    activation: nn.Module
    out: nn.Linear
    norm: nn.LayerNorm
    head_dim: int
    scale: float
    norm_first: bool = False

    def weights(self) -> list[tuple[nn.Module, str]]:
        """The modules that have them, and their names, in the order that C++ takes."""
        of = (
            self.query,
            self.key,
            self.value,
            self.attention_out,
            self.attention_norm,
            self.inner,
            self.out,
            self.norm,
        )
        return [(module, name) for module in of for name in ("weight", "bias")]

    def sizes(self) -> dict[str, Any]:
        """What C++ must know, the same for all layers."""
        return {
            "hidden": self.query.in_features,
            "heads": self.query.out_features // self.head_dim,
            "head_dim": self.head_dim,
            "inner": self.inner.out_features,
            "eps": self.norm.eps,
            "scale": self.scale,
            "tanh_gelu": touched.gelu_form(self.activation) == "tanh",
            "norm_first": self.norm_first,
        }


class Embeddings(NamedTuple):
    """What goes into the first layer: the LayerNorm of the sum of a row of each table, or without a norm the sum.

    Attributes:
        parts: tables, (_, N), each with its ids, (T,) int64.
    """

    parts: Sequence[tuple[Tensor, Tensor]]
    norm: nn.LayerNorm | None

    def can_be_read(self, features: int) -> bool:
        """Whether the tables are what C++ takes."""
        dtype = self.parts[0][0].dtype
        return dtype in (torch.float32, torch.bfloat16) and all(
            type(table) in (nn.Parameter, Tensor)
            and table.dtype == dtype
            and table.device.type == "cpu"
            and table.layout == torch.strided
            and table.shape[1:] == (features,)
            and table.stride(1) == 1
            for table, _ in self.parts
        )

    def arrays(self) -> tuple[list[tuple[Any, Any]], tuple[Any, Any, float] | None]:
        """For C++, without a copy of a table."""
        parts = [(_as_rows(table), ids.numpy()) for table, ids in self.parts]
        norm = self.norm
        return parts, None if norm is None else (_as_array(norm.weight), _as_array(norm.bias), norm.eps)


def by_operators(device: str) -> bool:
    """Whether layers on that kind of device run operator by operator: on a GPU, and in Triton's interpreter."""
    return INTERPRETED or device != "cpu"


def why_no_precision(precision: str, device: str = "cpu") -> str | None:
    """Why layers on that kind of device cannot have products of that precision, or None."""
    if by_operators(device):
        there = "in Triton's interpreter" if INTERPRETED else "on a GPU"
        return None if precision == "int8" else f"{there} products are in the weights' dtype: model.to(torch.bfloat16)"
    if _C is None:
        return "the C++ extension was not built"
    return None if _C.can_encode(precision) else f"the CPU has no {PRECISIONS[precision]}"


def precision_of(dtype: torch.dtype, wanted: str | None) -> str | None:
    """Of the layers of a model of that dtype, or None; `wanted`: what the user asked for instead."""
    own = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
    return own if own is None or wanted is None else wanted


def why_not(layers: Sequence[Parts | None], precision: str, norm: nn.LayerNorm | None) -> str | None:
    """Why these layers cannot be prepared, or None: for people."""
    found = [layer for layer in layers if layer is not None]
    if len(found) < len(layers) or not found:
        return "layers of another kind than BERT's"
    if any(touched.gelu_form(layer.activation) is None for layer in found):
        return f"{type(found[0].activation).__name__} is no GELU"
    if any(layer.sizes() != found[0].sizes() or layer.attention_norm.eps != layer.norm.eps for layer in found):
        return "layers that differ"
    weights = [_weight(module, name) for module, name in _homes(found, norm)]
    kinds = {type(w) for w in weights if w is not None}
    if not kinds <= {nn.Parameter, Tensor}:
        return "weights that are no plain tensors"
    if len({(w.dtype, w.device) for w in weights if w is not None}) != 1:
        return "weights of several dtypes, or on several devices"
    if any(w is not None and (w.is_inference() or w.layout != torch.strided) for w in weights):
        return "weights that were made in inference mode"
    return why_no_precision(precision, weights[0].device.type)


def _homes(layers: Sequence[Parts], norm: nn.LayerNorm | None) -> list[tuple[nn.Module, str]]:
    """Where weights are, that of the last LayerNorm too."""
    last = [] if norm is None else [(norm, "weight"), (norm, "bias")]
    return [home for layer in layers for home in layer.weights()] + last


def _weight(module: nn.Module, name: str) -> Any:
    return module._parameters.get(name, module.__dict__.get(name))


class Watch:
    """Sees when a weight is another, or was written to; on a CPU writes through `.data` by a few words of each weight.

    It keeps the weights, so that no other can come to have the same identity or address.
    """

    def __init__(self, layers: Sequence[Parts], norm: nn.LayerNorm | None) -> None:
        self._homes = [(module._parameters, name) for module, name in _homes(layers, norm)]
        self._weights = self._now()
        there = [w for w in self._weights if w is not None]
        self._storages = [w.detach() for w in there]
        self._sizes = [w.nbytes if w.is_contiguous() else w.element_size() for w in there]
        self._state = self._state_of(there)

    def _now(self) -> list[Tensor | None]:
        return [of.get(name) for of, name in self._homes]

    def _state_of(self, weights: list[Tensor]) -> list[Any] | None:
        if any(map(Tensor.is_inference, weights)):  # which count no versions
            return None
        addresses = [w.data_ptr() for w in weights]
        on_cpu = all(w.device.type == "cpu" for w in weights)
        words = _C.some_words(addresses, self._sizes) if _C is not None and on_cpu else 0
        return [words, *addresses, *[w._version for w in weights]]

    def holds(self) -> bool:
        """Whether nothing has changed since."""
        weights = self._now()
        if self._state is None or not all(map(operator.is_, weights, self._weights)):
            return False
        return self._state_of([w for w in weights if w is not None]) == self._state


class Prepared:
    """A model's layers with the weights of now.

    Args:
        layers: in the order in which they run; one that runs twice is there twice. `why_not` of them is None.
        norm: behind the last layer, or None.
    """

    def __init__(self, layers: Sequence[Parts], precision: str, norm: nn.LayerNorm | None = None) -> None:
        self.precision = precision
        unique = list(dict.fromkeys(layers))
        self.features: int = unique[0].query.in_features
        self._order = [unique.index(layer) for layer in layers]
        self._encoder = _C.Encoder(precision=precision, **unique[0].sizes())
        for layer in unique:
            self._encoder.add_layer([_as_array(_weight(module, name)) for module, name in layer.weights()])
        if norm is not None:
            self._encoder.set_norm(_as_array(norm.weight), _as_array(norm.bias), norm.eps)

    def run(self, begin: Tensor | Embeddings, packing: Packing, *, first_only: bool = False) -> Tensor:
        """From (T, N) or embeddings that can be read.

        Returns:
            (T, N); with first_only (B, N), each sequence's first token, zeros for an empty sequence.
        """
        profiled = record_function(NAME) if torch._C._autograd._profiler_enabled() else contextlib.nullcontext()
        how: Any = packing.cu_seqlens.numpy(), self._order, first_only, torch.get_num_threads()
        with profiled:
            if isinstance(begin, Tensor):
                dtype, out = begin.dtype, self._encoder.run(_as_array(begin), *how)
            else:
                dtype, out = begin.parts[0][0].dtype, self._encoder.embed_and_run(*begin.arrays(), *how)
        return torch.from_numpy(out).to(dtype)


def _as_array(weight: Tensor | None) -> Any:
    return None if weight is None else cast(Any, np.ascontiguousarray(weight.detach().float().numpy()))


def _as_rows(table: Tensor) -> Any:
    table = table.detach()
    return (table if table.dtype == torch.float32 else table.view(torch.int16)).numpy()
