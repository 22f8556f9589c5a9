"""What other libraries have for an operator, each at its best; where one is missing it says so.

Dimension key:  B sequences   L padded length   T packed tokens   H heads   D head size   N features
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import NotApplicableError, Provider
from fastbert.packing import Packing

_BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def installed(module: str, name: str) -> Any:
    """A library's function.

    Raises:
        NotApplicableError: if it is not installed, or has no such function.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise NotApplicableError(f"{module}.{name} is not here") from error


def padded_attention(packing: Packing, attend: Callable[..., Tensor]) -> Provider:
    """A provider of q, k, v: (T, H, D) for a function of them padded, (B, H, L, D), and of a mask or None."""
    mask = None
    if packing.indices is not None:
        lengths = packing.cu_seqlens.diff()
        columns = torch.arange(packing.shape[1], device=lengths.device)
        mask = (columns < lengths[:, None])[:, None, None]
    return Provider(
        partial(attend, mask=mask),
        prepare=lambda t: packing.unpack(t).transpose(1, 2),
        finish=lambda t: packing.pack(t.transpose(1, 2)),
    )


def math_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout_p: float) -> Tensor:
    """Product, softmax, product."""
    s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    p = (s if mask is None else s.masked_fill(~mask, float("-inf"))).softmax(-1)
    return (F.dropout(p, dropout_p) if dropout_p else p) @ v


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, dropout_p: float, backend: SDPBackend | None = None
) -> Tensor:
    """PyTorch's own choice of backend, or one."""
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)
    if mask is not None and backend == SDPBackend.FLASH_ATTENTION:
        raise NotApplicableError("takes no mask")
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def sdpa_backends(packing: Packing, dropout_p: float, device: str) -> dict[str, Provider]:
    if device == "cpu":
        return {"SDPA": padded_attention(packing, partial(sdpa, dropout_p=dropout_p))}
    return {
        name: padded_attention(packing, partial(sdpa, dropout_p=dropout_p, backend=backend))
        for name, backend in _BACKENDS.items()
    }


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, *, packing: Packing, dropout_p: float) -> Tensor:
    """PyTorch's FlashAttention on packed sequences."""
    if dropout_p:
        raise NotApplicableError("has no dropout")
    function = installed("torch.nn.attention.varlen", "varlen_attn")
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    return function(q, k, v, cu, cu, longest, longest)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, packing: Packing, dropout_p: float) -> Tensor:
    """The flash-attn package on packed sequences, https://github.com/Dao-AILab/flash-attention."""
    function = installed("flash_attn", "flash_attn_varlen_func")
    cu, longest = packing.cu_seqlens, packing.max_seqlen
    return function(q, k, v, cu, cu, longest, longest, dropout_p=dropout_p)


def liger_layer_norm(
    x: Tensor, residual: Tensor, x_bias: Tensor, weight: Tensor, bias: Tensor, *, dropout_p: float
) -> Tensor:
    """Liger's LayerNorm after PyTorch's sum, https://github.com/linkedin/Liger-Kernel: it fuses no residual into it."""
    norm = installed("liger_kernel.ops.layer_norm", "LigerLayerNormFunction").apply
    h = x + x_bias
    return norm((F.dropout(h, dropout_p) if dropout_p else h) + residual, weight, bias, 1e-12)


def liger_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy."""
    function = installed("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction").apply
    loss = function(x, weight, labels, bias)
    return loss[0] if isinstance(loss, tuple) else loss
