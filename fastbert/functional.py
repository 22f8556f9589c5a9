"""The public operators: free leading dimensions, autocast, dropout, and checks that name the argument.

Dropout draws its seed from PyTorch's generator, so `torch.manual_seed` and gradient checkpointing work as usual; the
mask itself is a function of (seed, stream), see `fastbert.reference`. The drop probability is rounded to 1/256.

Dimension key:  T packed tokens   N features   K input features   V vocabulary   B batch   H heads   D head size
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.kernels import _product
from fastbert.kernels.attention import attention_fwd
from fastbert.kernels.cross_entropy import linear_cross_entropy_fwd
from fastbert.kernels.embedding import embedding_fwd
from fastbert.kernels.ffn import feed_forward_fwd, linear_gelu_fwd
from fastbert.kernels.layer_norm import layer_norm_fwd
from fastbert.kernels.linear import linear_fwd
from fastbert.kernels.linear_int8 import linear_int8_fwd
from fastbert.kernels.quantize import layer_norm_int8_fwd, quantize_rows_fwd
from fastbert.packing import DEBUG, check_cu_seqlens

__all__ = [
    "attention",
    "divide",
    "draw_seed",
    "embedding",
    "feed_forward",
    "layer_norm",
    "layer_norm_int8",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "linear_int8",
    "quantize_rows",
    "without_gradient_of_row",
]

MAX_HEAD_DIM, MAX_FEATURES = 256, 8192  # of the kernels
MAX_SUMMANDS = 2**31 // 128**2  # of int8 products in an int32


def draw_seed(device: torch.device | str) -> Tensor:
    """A () int64 seed for a forward pass's dropout masks, from PyTorch's generator on that device."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_weight: Tensor,
    position_weight: Tensor,
    token_type_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    task_type_ids: Tensor | None = None,
    task_type_weight: Tensor | None = None,
    eps: float = 1e-12,
    padding_idx: int | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """dropout(LayerNorm(word + token type + position (+ task type))): BERT's and ERNIE's embeddings from packed ids.

    Ids out of range are undefined behaviour on a GPU; `fastbert`'s models check them first.

    Args:
        input_ids, position_ids, token_type_ids: (...,) integers of one shape.
        word_weight: (V, N).  position_weight, token_type_weight: (_, N).  weight, bias: (N,) of the LayerNorm.
        task_type_ids, task_type_weight: ERNIE's fourth table, both or neither.
        padding_idx: the row of word_weight that gets no gradient.
        dropout_p: probability of dropping an element, in [0, 1].  seed: () int64, drawn where it is None.

    Returns:
        (..., N) in word_weight.dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    if (task_type_ids is None) != (task_type_weight is None):
        raise ValueError("task_type_ids and task_type_weight must both be given, or neither")
    ids = {"input_ids": input_ids, "position_ids": position_ids, "token_type_ids": token_type_ids}
    if task_type_ids is not None:
        ids["task_type_ids"] = task_type_ids
    for name, t in ids.items():
        if t.shape != input_ids.shape:
            raise ValueError(f"{name} is {_shape(t)}, but input_ids {_shape(input_ids)}")
        if t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{name} must be int64 or int32, but is {t.dtype}")
    N = word_weight.shape[-1]
    tables = {"word_weight": word_weight, "position_weight": position_weight, "token_type_weight": token_type_weight}
    if task_type_weight is not None:
        tables["task_type_weight"] = task_type_weight
    for name, table in tables.items():
        if table.ndim != 2 or table.shape[1] != N:
            raise ValueError(f"{name} is {_shape(table)}, not (_, {N}) as word_weight")
    _check_norm(weight, bias, N)
    _check_devices(input_ids, **ids, **tables, weight=weight, bias=bias)
    seed = _seed(seed, dropout_p, input_ids)
    flat = {name: t.reshape(-1).long().contiguous() for name, t in ids.items()}  # of broadcast ids a view has stride 0
    rows = {name: _rows(t) for name, t in tables.items()}
    y, _, _ = embedding_fwd(
        flat["input_ids"],
        flat["position_ids"],
        flat["token_type_ids"],
        flat.get("task_type_ids"),
        rows["word_weight"],
        rows["position_weight"],
        rows["token_type_weight"],
        rows.get("task_type_weight"),
        weight.contiguous(),
        bias.contiguous(),
        -1 if padding_idx is None else padding_idx,
        eps,
        dropout_p,
        seed,
        stream,
    )
    return cast(Tensor, y.view(*input_ids.shape, N))


def without_gradient_of_row(table: Tensor, row: int | None) -> Tensor:
    """The table, one of whose rows gets no gradient: as PyTorch's `padding_idx`, for a small table."""
    if row is None or not (torch.is_grad_enabled() and table.requires_grad):
        return table
    return cast(Tensor, _WithoutGradientOfRow.apply(table, row))  # type: ignore[no-untyped-call]


class _WithoutGradientOfRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, row: int) -> Tensor:
        ctx.row = row
        return table.view_as(table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient[ctx.row] = 0
        return gradient, None


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    rows: Tensor | None = None,
) -> Tensor:
    """LayerNorm(dropout(x + x_bias) + residual).

    Args:
        x, residual: (..., N).  weight, bias, x_bias: (N,).
        dropout_p: probability of dropping an element, in [0, 1].  seed: () int64, drawn where it is None.
        rows: (...,) int64, where x holds some rows of a larger tensor: their numbers in it, so that each has the
            dropout mask that it has there.

    Returns:
        (..., N) in the residual's dtype, else in x's.

    Raises:
        ValueError: if shapes or devices do not fit together, or N is not in [1, 8192].
    """
    _check_layer_norm(x, weight, bias, residual, x_bias)
    if rows is not None and (rows.shape != x.shape[:-1] or rows.dtype != torch.int64):
        raise ValueError(f"rows is {_shape(rows)} {rows.dtype}, not {_shape(x[..., 0])} int64")
    _check_devices(x, rows=rows)
    y, _, _ = layer_norm_fwd(
        _rows(x),
        None if x_bias is None else x_bias.contiguous(),
        None if residual is None else _rows(residual),
        weight.contiguous(),
        bias.contiguous(),
        eps,
        dropout_p,
        _seed(seed, dropout_p, x),
        stream,
        None if rows is None or dropout_p == 0 else rows.reshape(-1).contiguous(),
    )
    return cast(Tensor, y.view(x.shape))


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """softmax(scale * q k^T) v within each sequence of a packed batch.

    Args:
        q, k, v: (T, H, D), all sequences end to end; any strides. Or q: (T, 3, H, D), one product with all three, and
            k and v None: then the gradient, too, is one tensor.
        cu_seqlens: (B + 1,) int32, where each sequence starts, and T.  max_seqlen: tokens in the longest.
            Their values are looked at only with FASTBERT_DEBUG=1 in the environment, for that waits for a GPU. There,
            rows of a sequence longer than max_seqlen, and of tokens that are no sequence's, become NaN.
        scale: 1 / sqrt(D) where it is None.
        causal: a token sees itself and what is to its left in its sequence, as in a decoder. Dropout masks are those
            of the same call without it.
        dropout_p: probability of dropping a probability, in [0, 1].  seed: () int64, drawn where it is None.

    Returns:
        (T, H, D), in autocast's dtype where that is on.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or scale is not above 0.
    """
    if k is None or v is None:
        if k is not None or v is not None:
            raise ValueError("k and v must both be given, or neither")
        if q.ndim != 4 or q.shape[1] != 3:
            raise ValueError(f"without k and v, q must be (tokens, 3, heads, head_dim), but is {_shape(q)}")
    elif q.ndim != 3:
        raise ValueError(f"q must be (tokens, heads, head_dim), but is {_shape(q)}")
    for name, t in (("k", k), ("v", v)):
        if t is not None and t.shape != q.shape:
            raise ValueError(f"{name} is {_shape(t)}, but q {_shape(q)}")
    D = q.shape[-1]
    if not 0 < D <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be in [1, {MAX_HEAD_DIM}], but is {D}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be (batch + 1,) int32, but is {_shape(cu_seqlens)} {cu_seqlens.dtype}")
    _check_devices(q, k=k, v=v, cu_seqlens=cu_seqlens)
    if DEBUG and not torch.compiler.is_compiling():
        check_cu_seqlens(cu_seqlens, max_seqlen, q.shape[0])
    scale = D**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be above 0, but is {scale}")
    dtype = _autocast_dtype(q)
    if q.dtype != dtype:
        q = q.to(dtype)
    k, v = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (k, v))
    seed = _seed(seed, dropout_p, q)
    o, _ = attention_fwd(q, k, v, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed, stream)
    return cast(Tensor, o)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: `torch.nn.functional.linear`, or a Triton product where that was measured to be faster.

    Args:
        x: (..., K).  weight: (N, K).  bias: (N,).

    Returns:
        (..., N), in autocast's dtype where that is on.

    Raises:
        ValueError: if shapes or devices do not fit together.
    """
    if not _product.TILES:
        return F.linear(x, weight, bias)
    _check_linear(x, weight, bias)
    x, weight = _in_product_dtype(x, weight)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    rows = _rows(x)
    if _product.tiles_for(rows, weight, None) is None:
        return F.linear(x, weight, bias)
    y = linear_fwd(rows, _rows(weight), bias)
    return cast(Tensor, y.view(*x.shape[:-1], weight.shape[0]))


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(x weight^T + bias).

    Args:
        x: (..., K).  weight: (N, K).  bias: (N,).
        approximate: "none" for the exact, erf form, "tanh" for the tanh form.

    Returns:
        (..., N), in autocast's dtype where that is on.

    Raises:
        ValueError: if shapes or devices do not fit together, or `approximate` is neither.
    """
    _check_approximate(approximate)
    _check_linear(x, weight, bias)
    x, weight, bias = _in_product_dtype(x, weight, bias)
    keep_pre = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    y, _ = linear_gelu_fwd(_rows(x), _rows(weight), bias.contiguous(), approximate, keep_pre)
    return cast(Tensor, y.view(*x.shape[:-1], weight.shape[0]))


def feed_forward(x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(x weight^T + bias) out_weight^T: a layer's feed-forward, but for its last bias.

    The backward computes gelu(...) again, in a pass that it makes anyway, so that nothing of its size is kept.

    Args:
        x: (..., K).  weight: (N, K).  bias: (N,).  out_weight: (K', N).
        approximate: "none" for the exact, erf form, "tanh" for the tanh form.

    Returns:
        (..., K'), in autocast's dtype where that is on.

    Raises:
        ValueError: if shapes or devices do not fit together, or `approximate` is neither.
    """
    _check_approximate(approximate)
    _check_linear(x, weight, bias)
    if out_weight.ndim != 2 or out_weight.shape[1] != weight.shape[0]:
        raise ValueError(f"out_weight is {_shape(out_weight)}, not (_, {weight.shape[0]})")
    _check_devices(x, out_weight=out_weight)
    x, weight, bias, out_weight = _in_product_dtype(x, weight, bias, out_weight)
    keep_pre = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias, out_weight))
    out, _ = feed_forward_fwd(_rows(x), _rows(weight), bias.contiguous(), _rows(out_weight), approximate, keep_pre)
    return cast(Tensor, out.view(*x.shape[:-1], out_weight.shape[0]))


def quantize_rows(x: Tensor, *, gelu: str | None = None) -> tuple[Tensor, Tensor]:
    """Rows as int8 with a scale each, rounded to nearest: x, or gelu(x), is about q * scale. No gradients.

    Args:
        x: (..., N).  gelu: "none" for the exact, erf form, "tanh" for the tanh form; None for no GELU.

    Returns:
        q: (..., N) int8 in [-127, 127].  scale: (...,) float32, max |x| / 127; NaN for a row that is not finite.

    Raises:
        ValueError: if N is not in [1, 8192], or `gelu` is none of these.
    """
    _check_features(x.shape[-1])
    if gelu is not None:
        _check_approximate(gelu)
    q, scale = quantize_rows_fwd(_rows(x.detach()), gelu)
    return q.view(x.shape), scale.view(x.shape[:-1])


def layer_norm_int8(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm` without dropout, and `quantize_rows` of it in the same pass. No gradients.

    Returns:
        y: (..., N) in the residual's dtype, else in x's.  q: (..., N) int8.  scale: (...,) float32.

    Raises:
        ValueError: as `layer_norm`.
    """
    _check_layer_norm(x, weight, bias, residual, x_bias)
    y, q, scale = layer_norm_int8_fwd(
        _rows(x.detach()),
        None if x_bias is None else x_bias.detach().contiguous(),
        None if residual is None else _rows(residual.detach()),
        weight.detach().contiguous(),
        bias.detach().contiguous(),
        eps,
    )
    return y.view(x.shape), q.view(x.shape), scale.view(x.shape[:-1])


def linear_int8(
    x_int8: Tensor,
    x_scale: Tensor,
    weight_int8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    gelu: str | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """act((x_int8 weight_int8^T) * x_scale weight_scale^T + bias), with exact sums. No gradients.

    Args:
        x_int8: (..., K).  x_scale: (...,) float32. Both as `quantize_rows` gives them.
        weight_int8: (N, K).  weight_scale: (N,) float32.  bias: (N,).
        gelu: "none" for the exact, erf form, "tanh" for the tanh form; None for no GELU.
        out_dtype: floating point.

    Returns:
        (..., N) in out_dtype.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together, or `gelu` is none of these.
    """
    if gelu is not None:
        _check_approximate(gelu)
    _check_linear(x_int8, weight_int8, bias)
    K, N = x_int8.shape[-1], weight_int8.shape[0]
    scales = {"x_scale": (x_scale, x_int8.shape[:-1]), "weight_scale": (weight_scale, (N,))}
    for name, t in {"x_int8": x_int8, "weight_int8": weight_int8}.items():
        if t.dtype != torch.int8:
            raise ValueError(f"{name} must be int8, but is {t.dtype}")
    for name, (t, shape) in scales.items():
        if t.shape != shape or not t.is_floating_point():
            raise ValueError(f"{name} is {_shape(t)} {t.dtype}, not {tuple(shape)} floating point")
    if K > MAX_SUMMANDS:
        raise ValueError(f"there may be {MAX_SUMMANDS} features at most, but there are {K}")
    if not out_dtype.is_floating_point:
        raise ValueError(f"out_dtype must be floating point, but is {out_dtype}")
    _check_devices(x_int8, x_scale=x_scale, weight_scale=weight_scale)
    y = linear_int8_fwd(
        _rows(x_int8),
        x_scale.detach().reshape(-1).contiguous(),
        _rows(weight_int8),
        weight_scale.detach().contiguous(),
        None if bias is None else bias.detach().contiguous(),
        gelu,
        out_dtype,
    )
    return cast(Tensor, y.view(*x_int8.shape[:-1], N))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of x weight^T + bias, without keeping the logits.

    Args:
        x: (..., N).  weight: (V, N).  bias: (V,).
        labels: (...,) int64 in [0, V), or ignore_index.
        num_items: what the sum is divided by; the number of labels where it is None.

    Returns:
        () at least float32. NaN where there is no label and no num_items, as in PyTorch, with gradients of 0; on a
        GPU, where nothing waits for the labels, NaN also where one is out of range.

    Raises:
        ValueError: if shapes or devices do not fit together, or on a CPU a label is out of range.
    """
    _check_linear(x, weight, bias)
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels are {_shape(labels)}, but x is {_shape(x)}")
    _check_devices(x, labels=labels)
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    counted = labels != ignore_index
    items = num_items
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        items = int(counted.sum()) if num_items is None else num_items
        V = weight.shape[0]
        wrong = counted & ((labels < 0) | (labels >= V))
        if wrong.any():
            raise ValueError(f"labels has {int(labels[wrong][0])}, not in [0, {V})")
    x, weight = _in_product_dtype(x, weight)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    need_dx, need_dweight, need_dbias = (
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)
    )
    loss, *_ = linear_cross_entropy_fwd(
        _rows(x), _rows(weight), bias, labels, ignore_index, need_dx, need_dweight or need_dbias
    )
    return divide(loss, counted.sum() if items is None else items)


def divide(total: Tensor, items: Tensor | int) -> Tensor:
    """total / items; of no items it is NaN or infinite as ever, but its gradient 0: there was nothing to learn."""
    if isinstance(items, int):
        return total / items if items != 0 else total.detach() / items + 0.0 * total
    nothing = items == 0
    return torch.where(nothing, total.detach() / items, total / items.masked_fill(nothing, 1))


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', but is {approximate!r}")


def _in_product_dtype(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All in the dtype that a matrix product of x computes in."""
    dtype = _autocast_dtype(x)
    return tuple(t if t.dtype == dtype else t.to(dtype) for t in (x, *others))


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x computes in."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _rows(x: Tensor) -> Tensor:
    """(M, N), each row's features side by side in memory; rows may lie anywhere."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _seed(seed: Tensor | None, dropout_p: float, like: Tensor) -> Tensor | None:
    if dropout_p == 0:
        return None
    if not 0 < dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], but is {dropout_p}")
    return draw_seed(like.device) if seed is None else seed


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> None:
    N = x.shape[-1]
    _check_norm(weight, bias, N)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {_shape(residual)}, but x {_shape(x)}")
    if x_bias is not None and x_bias.shape != (N,):
        raise ValueError(f"x_bias is {_shape(x_bias)}, not ({N},)")
    _check_devices(x, weight=weight, bias=bias, residual=residual, x_bias=x_bias)


def _check_features(N: int) -> None:
    if not 0 < N <= MAX_FEATURES:
        raise ValueError(f"there must be 1 to {MAX_FEATURES} features, but there are {N}")


def _check_norm(weight: Tensor, bias: Tensor, N: int) -> None:
    _check_features(N)
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != (N,):
            raise ValueError(f"{name} is {_shape(t)}, not ({N},)")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight is {_shape(weight)}, but x has {x.shape[-1]} features")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {_shape(bias)}, not ({weight.shape[0]},)")
    _check_devices(x, weight=weight, bias=bias)


def _check_devices(first: Tensor, **others: Tensor | None) -> None:
    device = first.device
    for name, t in others.items():
        if t is not None and t.device != device:
            raise ValueError(f"{name} is on {t.device}, but the first argument on {device}")


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))
