"""Layers prepared for inference on a CPU: one call of C++ for all, over weights in the order in which they are read.

What `fastbert.encoder` does, without a call for each module and operator: csrc/encoder.h. The weights are copied, so a
model that has run so holds them twice; a copy is made anew when one of them is another, and dropped in training.

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
    """What a layer consists of, whose LayerNorms stand behind its sums.

    Attributes:
        scale: of the attention's scores.
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
        }


def why_no_precision(precision: str) -> str | None:
    """Why this machine cannot have layers of that precision, or None."""
    if _C is None:
        return "the C++ extension was not built"
    if INTERPRETED:
        return "operators run in Triton's interpreter"
    return None if _C.can_encode(precision) else f"the CPU has no {PRECISIONS[precision]}"


def precision_of(dtype: torch.dtype, wanted: str | None) -> str | None:
    """Of the layers of a model of that dtype, or None; `wanted`: what the user asked for instead."""
    own = {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype)
    return own if own is None or wanted is None else wanted


def why_not(layers: Sequence[Parts | None], precision: str) -> str | None:
    """Why these layers cannot be prepared, or None: for people."""
    found = [layer for layer in layers if layer is not None]
    if len(found) < len(layers) or not found:
        return "layers of another kind than BERT's"
    if any(touched.gelu_form(layer.activation) is None for layer in found):
        return f"{type(found[0].activation).__name__} is no GELU"
    if any(layer.sizes() != found[0].sizes() or layer.attention_norm.eps != layer.norm.eps for layer in found):
        return "layers that differ"
    weights = [_weight(module, name) for layer in found for module, name in layer.weights()]
    kinds = {type(w) for w in weights if w is not None}
    if not kinds <= {nn.Parameter, Tensor}:
        return "weights that are no plain tensors"
    if len({(w.dtype, w.device.type) for w in weights if w is not None}) != 1 or weights[0].device.type != "cpu":
        return "weights of several dtypes, or not on the CPU"
    if any(w is not None and (w.is_inference() or w.layout != torch.strided) for w in weights):
        return "weights that were made in inference mode"
    return why_no_precision(precision)


def _weight(module: nn.Module, name: str) -> Any:
    return module._parameters.get(name, module.__dict__.get(name))


class Watch:
    """Sees when a weight is another, or was written to; writes through `.data` by a few words of each weight.

    It keeps the weights, so that no other can come to have the same identity or address.
    """

    def __init__(self, layers: Sequence[Parts]) -> None:
        self._homes = [(module._parameters, name) for layer in layers for module, name in layer.weights()]
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
        words = 0 if _C is None else _C.some_words(addresses, self._sizes)
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
    """

    def __init__(self, layers: Sequence[Parts], precision: str) -> None:
        self.precision = precision
        unique = list(dict.fromkeys(layers))
        self._order = [unique.index(layer) for layer in layers]
        self._encoder = _C.Encoder(precision=precision, **unique[0].sizes())
        for layer in unique:
            self._encoder.add_layer([_as_array(_weight(module, name)) for module, name in layer.weights()])

    def run(self, hidden_TN: Tensor, packing: Packing, *, first_only: bool = False) -> Tensor:
        """(T, N) to (T, N); with first_only to (B, N), each sequence's first token, zeros for an empty sequence."""
        profiled = record_function(NAME) if torch._C._autograd._profiler_enabled() else contextlib.nullcontext()
        with profiled:
            out = self._encoder.run(
                hidden_TN.detach().float().contiguous().numpy(),
                packing.cu_seqlens.numpy(),
                self._order,
                first_only,
                torch.get_num_threads(),
            )
        return torch.from_numpy(out).to(hidden_TN.dtype)


def _as_array(weight: Tensor | None) -> Any:
    return None if weight is None else cast(Any, np.ascontiguousarray(weight.detach().float().numpy()))
