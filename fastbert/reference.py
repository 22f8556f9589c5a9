"""What every kernel must compute, in plain PyTorch: one short function per operator.

What they make together, a whole encoder, is in `reference_encoder`.

These functions are the specification. They run in any dtype (the tests call them in float64) and on any device,
and need neither transformers nor the rest of fastbert.

Dimension key:  T packed tokens   M rows   N features   V vocabulary   B batch   L length   H heads   D head size

Dropout is counter-based: element (head, row, col) is kept if byte `col % 16` of
Philox4x32-7(key = seed, counter = (col // 16, row, head, stream)) is at least `drop_threshold(dropout_p)`; for
attention's probabilities, col is `score_slot(col)` instead.
So a mask is never stored: forward, backward and every device compute the same one from (seed, stream).
Philox: Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405; 7 rounds are the fewest that pass BigCrush there.
"""

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF


def drop_threshold(dropout_p: float) -> int:
    """Of 256 byte values, how many mean "dropped". A probability above 0 drops at least 1 in 256."""
    return max(1, round(256 * dropout_p)) if dropout_p > 0 else 0


def keep_scale(dropout_p: float) -> float:
    """What kept elements are multiplied with: one over the exact probability of keeping. 0 where nothing is kept."""
    kept = 256 - drop_threshold(dropout_p)
    return 256 / kept if kept else 0.0


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over x and statistics of it are kept in: at least float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7: four words of 32 random bits for each counter, held in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(7):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Low and high word of a 32 x 32 bit product, by halves: int64 has no room for the whole."""
    low, high = a * (factor & 0xFFFF), a * (factor >> 16)
    middle = (low >> 16) + (high & 0xFFFF)
    return (low & 0xFFFF) | ((middle & 0xFFFF) << 16), (high >> 16) + (middle >> 16)


def keep_mask(
    heads: int,
    first_row: int,
    rows: int,
    cols: int,
    dropout_p: float,
    seed: Tensor,
    stream: int,
    *,
    scores: bool = False,
    numbers: Tensor | None = None,
) -> Tensor:
    """The dropout mask of rows `first_row`, `first_row + 1`, ...

    Args:
        seed: () int64.  stream: which of a model's dropout layers this is.
        scores: of attention's probabilities instead of features.
        numbers: (_,) int64: row i has the mask of row numbers[i], i = first_row, first_row + 1, ...

    Returns:
        (heads, rows, cols) bool, True where an element is kept.
    """
    numbered = torch.arange(first_row, first_row + rows, device=seed.device)
    head, row, block = torch.meshgrid(
        torch.arange(heads, device=seed.device),
        numbered if numbers is None else numbers[numbered],
        torch.arange(-(-cols // 64) * 4, device=seed.device),
        indexing="ij",
    )
    words = torch.stack(philox((block, row, head, torch.full_like(head, stream)), seed), dim=-1)
    bytes_ = (words[..., None] >> torch.arange(0, 32, 8, device=seed.device)) & 0xFF
    col = torch.arange(cols, device=seed.device)
    return bytes_.flatten(2)[..., score_slot(col) if scores else col] >= drop_threshold(dropout_p)


def score_slot(col: Tensor) -> Tensor:
    """Where among 64 neighbouring elements of a mask a column of scores finds its own.

    A thread holds columns 8 j + 2 t + i of a tensor core's accumulator, i = 0 or 1, for one t of 0, 1, 2, 3: here the
    16 of them that lie within 64 columns share a counter.
    """
    return col // 64 * 64 + col % 8 // 2 * 16 + col % 64 // 8 * 2 + col % 2


def dropout(x: Tensor, dropout_p: float, seed: Tensor | None, stream: int, rows: Tensor | None = None) -> Tensor:
    """x * keep / P(keep), for rows of features. x: (M, N). rows: (M,) int64, their numbers where not 0, 1, ..."""
    if dropout_p == 0:
        return x
    assert seed is not None
    M, N = x.shape
    (keep_MN,) = keep_mask(1, 0, M, N, dropout_p, seed, stream, numbers=rows)
    return torch.where(keep_MN, x * keep_scale(dropout_p), 0.0)


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
    """y = (h - mean) * rstd * weight + bias,  with h = dropout(x + x_bias) + residual.

    Args:
        x, residual: (M, N).  x_bias, weight, bias: (N,).
        rows: (M,) int64, the rows' numbers for dropout, where x holds some of a larger tensor's; else 0, 1, ...

    Returns:
        y: (M, N) in the residual's dtype, else x's.  mean, rstd: (M,), at least float32.
    """
    h_MN = _before_norm(x, x_bias, residual, dropout_p, seed, stream, rows)
    y_MN, mean_M, rstd_M = _normalise(h_MN, weight, bias, eps)
    return y_MN.to(x.dtype if residual is None else residual.dtype), mean_M, rstd_M


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
    """Gradients of `layer_norm`.

    Returns:
        dx: (M, N).  dresidual: (M, N), or empty where it equals dx (no dropout, one dtype) or there is no residual.
        dx_bias: (N,), or empty without x_bias.  dweight, dbias: (N,).
    """
    h_MN = _before_norm(x, x_bias, residual, dropout_p, seed, stream, rows)
    dh_MN, dweight, dbias = _normalise_backward(dy, h_MN, weight, mean, rstd)
    dx_MN = dropout(dh_MN, dropout_p, seed, stream, rows)
    same = residual is None or (dropout_p == 0 and residual.dtype == x.dtype)
    return (
        dx_MN.to(x.dtype),
        x.new_empty(0) if same or residual is None else dh_MN.to(residual.dtype),
        x.new_empty(0) if x_bias is None else dx_MN.sum(0).to(x_bias.dtype),
        dweight,
        dbias,
    )


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
    """y = dropout(LayerNorm(word_weight[input_ids] + token_type_weight[...] + position_weight[...] + ...)).

    Args:
        input_ids, position_ids, token_type_ids: (T,) int64; task_type_ids too, or None (ERNIE has them).
        word_weight: (V, N).  position_weight, token_type_weight, task_type_weight: (_, N).  weight, bias: (N,).
        padding_idx: the row of word_weight that gets no gradient, or -1 (unused here).

    Returns:
        y: (T, N) in word_weight.dtype.  mean, rstd: (T,), at least float32.
    """
    h_TN = embedding_sum(
        (word_weight, input_ids),
        (token_type_weight, token_type_ids),
        (position_weight, position_ids),
        (task_type_weight, task_type_ids),
    )
    y_TN, mean_T, rstd_T = _normalise(h_TN, weight, bias, eps)
    return dropout(y_TN, dropout_p, seed, stream).to(word_weight.dtype), mean_T, rstd_T


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
    """Gradients of `embedding`: dword_weight, dposition_weight, dtoken_type_weight, dtask_type_weight, dweight, dbias.

    All of them dense; dtask_type_weight is empty where there is none.
    """
    h_TN = embedding_sum(
        (word_weight, input_ids),
        (token_type_weight, token_type_ids),
        (position_weight, position_ids),
        (task_type_weight, task_type_ids),
    )
    dy_TN = dropout(dy.to(mean.dtype), dropout_p, seed, stream)
    dh_TN, dweight, dbias = _normalise_backward(dy_TN, h_TN, weight, mean, rstd)
    tables = [
        (word_weight, input_ids),
        (position_weight, position_ids),
        (token_type_weight, token_type_ids),
        (task_type_weight, task_type_ids),
    ]
    dword, dposition, dtoken_type, dtask_type = (
        mean.new_empty(0, dtype=weight.dtype)
        if table is None or ids is None
        else torch.zeros_like(table, dtype=dh_TN.dtype).index_add(0, ids, dh_TN).to(table.dtype)
        for table, ids in tables
    )
    if padding_idx >= 0:
        dword[padding_idx] = 0
    return dword, dposition, dtoken_type, dtask_type, dweight, dbias


def embedding_sum(*tables: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The rows that ids choose in each table, (T, N), summed in at least float32; tables that are None left out."""
    rows = [table[ids].to(accumulator(table)) for table, ids in tables if table is not None and ids is not None]
    return functools.reduce(torch.add, rows)


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """o = dropout(softmax(scale * q k^T)) v within each sequence of the packed batch.

    Args:
        q, k, v: (T, H, D), all sequences end to end; or q: (T, 3, H, D), one product with all three, k and v None.
        cu_seqlens: (B + 1,) int32, where each sequence starts, and T.
        max_seqlen: length of the longest sequence (unused here).
        causal: a token sees itself and what is to its left.

    Returns:
        o: (T, H, D) in q.dtype.  lse: (H, T), log of the sum of exp of the scores, at least float32.
    """
    q, k, v = separate(q, k, v)
    T, H, _ = q.shape
    o_THD, lse_HT = q.new_empty(q.shape), q.new_empty(H, T, dtype=accumulator(q))
    for start, end in pairwise(cu_seqlens.tolist()):
        seq = slice(start, end)
        q_HLD, k_HLD, v_HLD = (t[seq].transpose(0, 1).to(accumulator(q)) for t in (q, k, v))
        s_HLL = _scores(q_HLD, k_HLD, scale, causal)
        p_HLL = _drop_scores(s_HLL.softmax(-1), start, dropout_p, seed, stream)
        o_THD[seq] = (p_HLL @ v_HLD).transpose(0, 1).to(q.dtype)
        lse_HT[:, seq] = s_HLL.logsumexp(-1)
    return o_THD, lse_HT


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention`, from probabilities recomputed out of lse: p = exp(s - lse), ds = p * (dp - delta).

    Returns:
        dq, dk, dv: (T, H, D); or dq: (T, 3, H, D) and two empty ones, where q, k, v came as one.
    """
    gradients = attention_gradients(q, k, v)
    dq_THD, dk_THD, dv_THD = separate(gradients[0], *gradients[1:] if k is not None else (None, None))
    q, k, v = separate(q, k, v)
    for start, end in pairwise(cu_seqlens.tolist()):
        seq = slice(start, end)
        q_HLD, k_HLD, v_HLD, o_HLD, do_HLD = (t[seq].transpose(0, 1).to(lse.dtype) for t in (q, k, v, o, do))
        p_HLL = (_scores(q_HLD, k_HLD, scale, causal) - lse[:, seq, None]).exp()
        dropped_HLL = _drop_scores(p_HLL, start, dropout_p, seed, stream)
        dp_HLL = _drop_scores(do_HLD @ v_HLD.mT, start, dropout_p, seed, stream)
        delta_HL1 = (do_HLD * o_HLD).sum(-1, keepdim=True)
        ds_HLL = scale * p_HLL * (dp_HLL - delta_HL1)
        dq_THD[seq] = (ds_HLL @ k_HLD).transpose(0, 1).to(q.dtype)
        dk_THD[seq] = (ds_HLL.mT @ q_HLD).transpose(0, 1).to(k.dtype)
        dv_THD[seq] = (dropped_HLL.mT @ do_HLD).transpose(0, 1).to(v.dtype)
    return gradients


def separate(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: (T, H, D), views of q where that is all three."""
    if k is None or v is None:
        q, k, v = q.unbind(1)
    return q, k, v


def attention_gradients(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `attention_backward` returns."""
    if k is None or v is None:
        return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias. x: (M, K).  weight: (N, K).  bias: (N,). Returns (M, N)."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, keep_pre: bool) -> tuple[Tensor, Tensor]:
    """y = gelu(pre),  with pre = x weight^T + bias.

    Args:
        x: (M, K).  weight: (N, K).  bias: (N,).
        approximate: "none" for the exact, erf form, "tanh" for the tanh form.
        keep_pre: whether the backward will need pre.

    Returns:
        y: (M, N).  pre: (M, N), or empty.
    """
    pre_MN = F.linear(x, weight, bias)
    return F.gelu(pre_MN, approximate=approximate), pre_MN if keep_pre else x.new_empty(0)


def gelu_backward(dy: Tensor, pre: Tensor, approximate: str, keep_y: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dpre: (M, N) = dy * gelu'(pre), dbias: (N,) = the sum of its rows, and gelu(pre): (M, N), or empty."""
    z_MN, dy_MN = pre.to(accumulator(pre)), dy.to(accumulator(pre))
    if approximate == "tanh":
        u_MN = math.sqrt(2 / math.pi) * (z_MN + 0.044715 * z_MN**3)
        du_MN = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z_MN**2)
        slope_MN = 0.5 * (1 + u_MN.tanh()) + 0.5 * z_MN * (1 - u_MN.tanh() ** 2) * du_MN
    else:
        slope_MN = 0.5 * (1 + (z_MN / math.sqrt(2)).erf()) + z_MN * (-0.5 * z_MN**2).exp() / math.sqrt(2 * math.pi)
    dpre_MN = dy_MN * slope_MN
    y_MN = F.gelu(pre, approximate=approximate) if keep_y else pre.new_empty(0)
    return dpre_MN.to(pre.dtype), dpre_MN.sum(0).to(pre.dtype), y_MN


def feed_forward(
    x: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, approximate: str, keep_pre: bool
) -> tuple[Tensor, Tensor]:
    """out = gelu(x weight^T + bias) out_weight^T.

    Args:
        x: (M, K).  weight: (N, K).  bias: (N,).  out_weight: (K', N).  approximate, keep_pre: as of `linear_gelu`.

    Returns:
        out: (M, K').  pre: (M, N), or empty.
    """
    y_MN, pre = linear_gelu(x, weight, bias, approximate, keep_pre)
    return F.linear(y_MN, out_weight), pre


def quantize_rows(x: Tensor, gelu: str | None) -> tuple[Tensor, Tensor]:
    """q = round(h / scale), to even, with scale = max |h| / 127 of each row, and h = x or gelu(x).

    Args:
        x: (M, N).  gelu: "none" for the exact form, "tanh" for the other; None for no GELU.

    Returns:
        q: (M, N) int8.  scale: (M,), at least float32; NaN for a row that is not finite.
    """
    h_MN = x.to(accumulator(x))
    return _quantize(h_MN if gelu is None else F.gelu(h_MN, approximate=gelu))


def layer_norm_int8(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y as of `layer_norm` without dropout, and its rows as int8, before y is rounded to its dtype.

    Returns:
        y: (M, N) in the residual's dtype, else x's.  q, scale: as of `quantize_rows`.
    """
    h_MN = _before_norm(x, x_bias, residual, 0.0, None, 0, None)
    y_MN, _, _ = _normalise(h_MN, weight, bias, eps)
    return y_MN.to(x.dtype if residual is None else residual.dtype), *_quantize(y_MN)


def linear_int8(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    gelu: str | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """act((x weight^T) x_scale weight_scale^T + bias), with exact sums.

    Args:
        x: (M, K) int8.  x_scale: (M,).  weight: (N, K) int8.  weight_scale, bias: (N,).
        gelu: as of `quantize_rows`.

    Returns:
        (M, N) in out_dtype.
    """
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    sums_MN = F.linear(x.double(), weight.double()).to(wide)
    y_MN = sums_MN * x_scale.to(wide)[:, None] * weight_scale.to(wide)
    y_MN = y_MN if bias is None else y_MN + bias.to(wide)
    return (y_MN if gelu is None else F.gelu(y_MN, approximate=gelu)).to(out_dtype)


def row_magnitude(h_MN: Tensor) -> Tensor:
    """(M,) the largest |h| of a row, at least 1e-30, so that a row of zeros can be divided; NaN if it is not finite."""
    largest_M = h_MN.abs().amax(-1)
    return largest_M.clamp(min=1e-30).masked_fill(largest_M.isinf(), float("nan"))


def _quantize(h_MN: Tensor) -> tuple[Tensor, Tensor]:
    scale_M = row_magnitude(h_MN) / 127
    return (h_MN / scale_M[:, None]).round().nan_to_num(nan=0.0).to(torch.int8), scale_M


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss = sum over rows of -log softmax(x weight^T + bias)[label], and its gradients.

    Args:
        x: (M, N).  weight: (V, N).  bias: (V,).
        labels: (M,) int64 in [0, V), or ignore_index, for a loss of 0.
        need_dx, need_dweight: which gradients; that of the bias comes with the weight's.

    Returns:
        loss: (), at least float32.  dx: (M, N), dweight: (V, N), dbias: (V,) in the dtypes of x, weight and bias;
        empty where they are not needed.
    """
    wide = accumulator(x)
    loss = x.new_zeros((), dtype=wide)
    dx = torch.empty_like(x) if need_dx else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=wide) if need_dweight else weight.new_empty(0)
    dbias = weight.new_zeros(weight.shape[0] if need_dweight and bias is not None else 0, dtype=wide)
    for rows in _row_chunks(x.shape[0], weight.shape[0]):
        logits_MV = F.linear(x[rows], weight, bias).to(wide)
        loss += F.cross_entropy(logits_MV, labels[rows], ignore_index=ignore_index, reduction="sum")
        if not need_dx and not need_dweight:
            continue
        counted_M1 = (labels[rows] != ignore_index)[:, None]
        onehot_MV = torch.zeros_like(logits_MV).scatter_(1, torch.where(counted_M1, labels[rows, None], 0), 1.0)
        dlogits_MV = torch.where(counted_M1, logits_MV.softmax(-1) - onehot_MV, 0.0)
        if dbias.numel():
            dbias += dlogits_MV.sum(0)
        if need_dx:
            dx[rows] = dlogits_MV.to(x.dtype) @ weight
        if need_dweight:
            dweight += dlogits_MV.to(x.dtype).T @ x[rows]
    return loss, dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def rescale(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, a () tensor that is not rounded to x's dtype first."""
    return (x.to(accumulator(x)) * factor).to(x.dtype)


def _before_norm(
    x: Tensor,
    x_bias: Tensor | None,
    residual: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    stream: int,
    rows: Tensor | None,
) -> Tensor:
    h_MN = x.to(accumulator(x))
    if x_bias is not None:
        h_MN = h_MN + x_bias.to(h_MN)
    h_MN = dropout(h_MN, dropout_p, seed, stream, rows)
    return h_MN if residual is None else h_MN + residual.to(h_MN)


def _normalise(h_MN: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean_M = h_MN.mean(-1)
    rstd_M = torch.rsqrt(h_MN.var(-1, correction=0) + eps)
    x_hat_MN = (h_MN - mean_M[:, None]) * rstd_M[:, None]
    return x_hat_MN * weight.to(h_MN) + bias.to(h_MN), mean_M, rstd_M


def _normalise_backward(
    dy: Tensor, h_MN: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy_MN = dy.to(mean.dtype)
    x_hat_MN = (h_MN - mean[:, None]) * rstd[:, None]
    g_MN = dy_MN * weight.to(mean.dtype)
    dh_MN = rstd[:, None] * (g_MN - g_MN.mean(-1, True) - x_hat_MN * (g_MN * x_hat_MN).mean(-1, True))
    return dh_MN, (dy_MN * x_hat_MN).sum(0).to(weight.dtype), dy_MN.sum(0).to(weight.dtype)


def _scores(q_HLD: Tensor, k_HLD: Tensor, scale: float, causal: bool) -> Tensor:
    s_HLL = scale * q_HLD @ k_HLD.mT
    if causal:
        left = torch.ones(s_HLL.shape[-2:], dtype=torch.bool, device=s_HLL.device).tril()
        s_HLL = s_HLL.masked_fill(~left, float("-inf"))
    return s_HLL


def _drop_scores(s_HLL: Tensor, first_row: int, dropout_p: float, seed: Tensor | None, stream: int) -> Tensor:
    if dropout_p == 0:
        return s_HLL
    assert seed is not None
    H, M, N = s_HLL.shape
    keep_HLL = keep_mask(H, first_row, M, N, dropout_p, seed, stream, scores=True)
    return torch.where(keep_HLL, s_HLL * keep_scale(dropout_p), 0.0)


def _row_chunks(rows: int, vocabulary: int) -> list[slice]:
    """Rows a chunk's logits may have: 2^26 of them, 256 MiB in float32."""
    step = max(1, 2**26 // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]
