"""The operators' CPU sides: PyTorch's fused kernels where there are any.

Attention is in `_attention_cpu`. Dropout is `reference.keep_mask`, from C++ where the extension is built.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import reference

try:
    from fastbert import _C
except ImportError:  # a bare checkout: right, but slower
    _C = None  # type: ignore[assignment]


CHUNK = 1 << 20  # elements of features that are worked on at a time
LOGITS = 1 << 25  # likewise of logits, whose products are slow in small pieces


def dropout_(x: Tensor, first_row: int, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    """Drop elements of features, (M, N), or of scores, (heads, rows, cols), in place, and scale what is kept."""
    return _drop_(x, _dropped(x, first_row, dropout_p, seed, stream), dropout_p)


def _dropped(
    x: Tensor, first_row: int, dropout_p: float, seed: Tensor | None, stream: int, numbers: Tensor | None = None
) -> Tensor | None:
    """Which elements are dropped, like x; None for none. numbers: (_,), as of `reference.keep_mask`."""
    if dropout_p == 0:
        return None
    assert seed is not None
    scores = x.ndim == 3
    heads, rows, cols = x.shape if scores else (1, *x.shape)
    sizes = heads, first_row, rows, cols
    if _C is None:
        keep = reference.keep_mask(*sizes, dropout_p, seed, stream, scores=scores, numbers=numbers)
    else:
        given = None if numbers is None else numbers.numpy()
        mask = _C.keep_mask(*sizes, reference.drop_threshold(dropout_p), int(seed), stream, scores, given)
        keep = torch.from_numpy(mask)
    return keep.view(x.shape).logical_not_()


def _drop_(x: Tensor, dropped: Tensor | None, dropout_p: float) -> Tensor:
    return x if dropped is None else x.mul_(reference.keep_scale(dropout_p)).masked_fill_(dropped, 0.0)


def _row_chunks(x: Tensor) -> list[slice]:
    """Rows whose wide intermediate results stay in the cache; what is allocated once is not mapped again each time."""
    M, N = x.shape
    rows = max(1, CHUNK // N)
    return [slice(start, start + rows) for start in range(0, M, rows)]


def _before_norm(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, dropped: Tensor | None, dropout_p: float
) -> Tensor:
    """h of some rows, in x_bias's and the statistics' dtype."""
    wide = reference.accumulator(x)
    if x_bias is not None and x.dtype == wide:
        h = x + x_bias
    else:
        h = x.to(wide, copy=True)
        if x_bias is not None:
            h.add_(x_bias)
    _drop_(h, dropped, dropout_p)
    if residual is not None:
        h.add_(residual.to(wide))  # adding in one dtype is faster than adding mixed ones
    return h


def layer_norm(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.accumulator(x)
    y = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty(x.shape[0], 1, dtype=wide) for _ in range(2))
    x_bias = x_bias if x_bias is None else x_bias.to(wide)
    weight, bias = weight.to(wide), bias.to(wide)
    for chunk in _row_chunks(x):
        dropped = _dropped(x[chunk], chunk.start, dropout_p, seed, stream, rows)
        h = _before_norm(x[chunk], x_bias, None if residual is None else residual[chunk], dropped, dropout_p)
        y[chunk], mean[chunk], rstd[chunk] = torch.native_layer_norm(h, h.shape[1:], weight, bias, eps)
    return y, mean.view(-1), rstd.view(-1)


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, wide = x.shape[1], reference.accumulator(x)
    same = residual is None or (dropout_p == 0 and residual.dtype == x.dtype)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dresidual = x.new_empty(0) if same or residual is None else residual.new_empty(residual.shape)
    dx_bias, dweight, dbias = (x.new_zeros(N, dtype=wide) for _ in range(3))
    stats = mean.view(-1, 1), rstd.view(-1, 1)
    wide_bias, wide_weight = x_bias if x_bias is None else x_bias.to(wide), weight.to(wide)
    for chunk in _row_chunks(x):
        dropped = _dropped(x[chunk], chunk.start, dropout_p, seed, stream, rows)
        h = _before_norm(x[chunk], wide_bias, None if residual is None else residual[chunk], dropped, dropout_p)
        dh, *sums = torch.ops.aten.native_layer_norm_backward(
            dy[chunk].to(wide), h, [N], *(t[chunk] for t in stats), wide_weight, wide_weight, [True, True, True]
        )
        dweight += sums[0]
        dbias += sums[1]
        if dresidual.numel():
            dresidual[chunk] = dh
        _drop_(dh, dropped, dropout_p)
        if x_bias is not None:
            dx_bias += dh.sum(0)
        dx[chunk] = dh
    return (
        dx,
        dresidual,
        x.new_empty(0) if x_bias is None else dx_bias.to(x_bias.dtype),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype),
    )


def _embedding_sum(*tables: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """`reference.embedding_sum`, in place."""
    (word_weight, input_ids), *others = tables
    assert word_weight is not None
    assert input_ids is not None
    wide = reference.accumulator(word_weight)
    h = F.embedding(input_ids, word_weight).to(wide)
    for table, ids in others:
        if table is not None and ids is not None:
            h.add_(F.embedding(ids, table.to(wide)))
    return h


def embedding(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    task_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor,
    token_type_weight: Tensor,
    task_type_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    padding_idx: int,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    h = _embedding_sum(
        (word_weight, input_ids),
        (token_type_weight, token_type_ids),
        (position_weight, position_ids),
        (task_type_weight, task_type_ids),
    )
    y, mean, rstd = torch.native_layer_norm(h, [h.shape[-1]], weight.to(h.dtype), bias.to(h.dtype), eps)
    return dropout_(y, 0, dropout_p, seed, stream).to(word_weight.dtype), mean.view(-1), rstd.view(-1)


def embedding_backward(
    dy: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    task_type_ids: Tensor | None,
    word_weight: Tensor,
    position_weight: Tensor,
    token_type_weight: Tensor,
    task_type_weight: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    padding_idx: int,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    h = _embedding_sum(
        (word_weight, input_ids),
        (token_type_weight, token_type_ids),
        (position_weight, position_ids),
        (task_type_weight, task_type_ids),
    )
    dy = dropout_(dy.to(h.dtype, copy=True), 0, dropout_p, seed, stream)
    stats = mean.view(-1, 1), rstd.view(-1, 1)
    dh, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy, h, [h.shape[-1]], *stats, weight.to(h.dtype), weight.to(h.dtype), [True, True, True]
    )
    return (
        _table_gradient(dh, input_ids, word_weight, padding_idx),
        _table_gradient(dh, position_ids, position_weight, -1),
        _table_gradient(dh, token_type_ids, token_type_weight, -1),
        weight.new_empty(0)
        if task_type_weight is None or task_type_ids is None
        else _table_gradient(dh, task_type_ids, task_type_weight, -1),
        dweight.to(weight.dtype),
        dbias.to(weight.dtype),
    )


def _table_gradient(dh: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    """Summed in dh's dtype over the rows that occur, then spread over a table of zeros."""
    rows, row_of = ids.unique(return_inverse=True)
    sums = torch.ops.aten.embedding_dense_backward(dh, row_of, rows.shape[0], -1, False)
    gradient = torch.zeros_like(table).index_copy_(0, rows, sums.to(table.dtype))
    if padding_idx >= 0:
        gradient[padding_idx] = 0
    return gradient


def gelu_backward(dy: Tensor, pre: Tensor, approximate: str, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    dpre = torch.empty_like(pre)
    y = torch.empty_like(pre) if keep_y else pre.new_empty(0)
    dbias = pre.new_zeros(pre.shape[1], dtype=reference.accumulator(pre))
    for rows in _row_chunks(pre):
        torch.ops.aten.gelu_backward.grad_input(dy[rows], pre[rows], approximate=approximate, grad_input=dpre[rows])
        dbias += dpre[rows].sum(0, dtype=dbias.dtype)
        if keep_y:
            torch.ops.aten.gelu.out(pre[rows], approximate=approximate, out=y[rows])
    return dpre, dbias.to(pre.dtype), y


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, (M, V) = reference.accumulator(x), (x.shape[0], weight.shape[0])
    loss = x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight: Tensor | None = None  # of one chunk as it comes; of several in float32
    dbias = weight.new_zeros(V if need_dweight and bias is not None else 0, dtype=wide)
    step = max(1, LOGITS // V)
    for start in range(0, M, step):
        rows = slice(start, start + step)
        ignored = labels[rows, None] == ignore_index
        label = labels[rows, None].masked_fill(ignored, 0)
        log_p = F.linear(x[rows], weight, bias).to(wide).log_softmax(-1)
        loss -= log_p.gather(1, label).masked_fill_(ignored, 0.0).sum()
        if not need_dx and not need_dweight:
            continue
        dlogits = log_p.exp_().scatter_add_(1, label, log_p.new_full(label.shape, -1.0)).masked_fill_(ignored, 0.0)
        if dbias.numel():
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(x.dtype)
        if need_dx:
            torch.mm(dlogits, weight, out=dx[rows])
        if need_dweight:
            product = dlogits.T @ x[rows]
            dweight = product if dweight is None else dweight.to(wide).add_(product)
    if dweight is None:
        dweight = weight.new_zeros(weight.shape if need_dweight else 0)
    return loss, dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _quantize_(h: Tensor, q: Tensor, scale: Tensor) -> None:
    """Rows of h, which is overwritten, into q and scale."""
    torch.div(reference.row_magnitude(h), 127, out=scale)
    torch.round(h.div_(scale[:, None]), out=h)
    q.copy_(h.nan_to_num_(nan=0.0))


def quantize_rows(x: Tensor, gelu: str | None) -> tuple[Tensor, Tensor]:
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=reference.accumulator(x))
    for rows in _row_chunks(x):
        h = x[rows].to(scale.dtype, copy=True)
        if gelu is not None:
            h = torch.ops.aten.gelu_(h, approximate=gelu)
        _quantize_(h, q[rows], scale[rows])
    return q, scale


def layer_norm_int8(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.accumulator(x)
    q, scale = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=wide)
    y = torch.empty_like(x if residual is None else residual, memory_format=torch.contiguous_format)
    x_bias, weight, bias = x_bias if x_bias is None else x_bias.to(wide), weight.to(wide), bias.to(wide)
    for rows in _row_chunks(x):
        h = _before_norm(x[rows], x_bias, None if residual is None else residual[rows], None, 0.0)
        h = F.layer_norm(h, h.shape[1:], weight, bias, eps)
        y[rows] = h
        _quantize_(h, q[rows], scale[rows])
    return y, q, scale


def linear_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    if x.shape[1] == 1:  # where _int_mm is wrong on a CPU, in PyTorch 2.13 too
        sums = x.int() * weight.int().T
    else:
        sums = torch._int_mm(x, weight.T)
    y = sums.to(wide).mul_(x_scale[:, None]).mul_(weight_scale)
    if bias is not None:
        y.add_(bias)
    if gelu is not None:
        y = torch.ops.aten.gelu_(y, approximate=gelu)
    return y.to(out_dtype)
