r"""Word + position + token-type (+ task-type) gather and sum, LayerNorm, dropout: from ids to the encoder's input.

    h = word_weight[input_ids] + token_type_weight[token_type_ids] + position_weight[position_ids] + ...
    y = dropout(LayerNorm(h))

Backward: dropout and LayerNorm undone as in `layer_norm`, then dh summed by id into the tables' gradients, which are
dense, as PyTorch's are; the word table's row `padding_idx` gets none. h is gathered again rather than kept.
Devlin et al. 2018, https://arxiv.org/abs/1810.04805. Specification: `fastbert.reference.embedding`.
Traffic, forward: 2 T N elements of word_weight and y; the small tables stay in cache.

A token type table of up to four rows is summed where dh is made, in registers, as LayerNorm's weights are. The
gradient of any other table is a sum over sorted ids (one sort a table, stable, so in one order always). A chunk of the
sorted tokens is summed by one program, run by run. What a run has in its first chunk and in all chunks after that goes
to memory, and a second kernel adds it up: so a token that is everywhere, [CLS] or a comma, keeps many programs busy and
not one. No atomics, and nothing waits for the GPU. dh is fp32: 16 bits would round every token once more.
"""

from typing import Any

import torch
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _launch
from fastbert.kernels._device import keep_features
from fastbert.kernels._norm import (
    input_gradient,
    load_rows,
    load_vector,
    normalise,
    parts,
    programs_and_warps,
    rows_and_warps,
    store_partial,
    store_rows,
    sum_partials,
    x_hat_of,
)
from fastbert.kernels._triton import tl, triton

CHUNK = 32  # sorted tokens that one program sums


@triton.jit
def _sum_of_tables(
    word_ptr, position_ptr, token_type_ptr, task_type_ptr, word_ids, position_ids, token_type_ids, task_type_ids,
    in_rows, stride_w, stride_p, stride_t, stride_k, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One part of the rows that the ids, [ROWS] int64, choose."""
    h = load_rows(word_ptr, word_ids, in_rows, stride_w, N, FIRST, COLS)
    h += load_rows(token_type_ptr, token_type_ids, in_rows, stride_t, N, FIRST, COLS)
    h += load_rows(position_ptr, position_ids, in_rows, stride_p, N, FIRST, COLS)
    if task_type_ptr is not None:
        h += load_rows(task_type_ptr, task_type_ids, in_rows, stride_k, N, FIRST, COLS)
    return h


@triton.jit(do_not_specialize=["T", "stream"])
def _embedding_fwd_kernel(
    input_ids_ptr,  # (T,) int64
    position_ids_ptr,  # (T,) int64
    token_type_ids_ptr,  # (T,) int64
    task_type_ids_ptr,  # (T,) int64, or None
    word_ptr,  # (V, N)
    position_ptr,  # (_, N)
    token_type_ptr,  # (_, N)
    task_type_ptr,  # (_, N), or None
    weight_ptr,  # (N,)
    bias_ptr,  # (N,)
    seed_ptr,  # () int64, or None
    y_ptr,  # (T, N)   out
    mean_ptr,  # (T,)  out, fp32
    rstd_ptr,  # (T,)  out, fp32
    stride_w: tl.constexpr,
    stride_p: tl.constexpr,
    stride_t: tl.constexpr,
    stride_k: tl.constexpr,
    stride_ym: tl.constexpr,
    T,
    eps,
    keep_scale,
    stream,
    THRESHOLD: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,  # per program
    COLS0: tl.constexpr,
    COLS1: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < T
    word_ids = tl.load(input_ids_ptr + rows, mask=in_rows, other=0)
    position_ids = tl.load(position_ids_ptr + rows, mask=in_rows, other=0)
    token_type_ids = tl.load(token_type_ids_ptr + rows, mask=in_rows, other=0)
    task_type_ids = token_type_ids
    if task_type_ptr is not None:
        task_type_ids = tl.load(task_type_ids_ptr + rows, mask=in_rows, other=0)
    h0 = _sum_of_tables(
        word_ptr, position_ptr, token_type_ptr, task_type_ptr, word_ids, position_ids, token_type_ids, task_type_ids,
        in_rows, stride_w, stride_p, stride_t, stride_k, N, 0, COLS0,
    )  # fmt: skip
    h1 = h0
    if COLS1 > 0:
        h1 = _sum_of_tables(
            word_ptr, position_ptr, token_type_ptr, task_type_ptr, word_ids, position_ids, token_type_ids,
            task_type_ids, in_rows, stride_w, stride_p, stride_t, stride_k, N, COLS0, COLS1,
        )  # fmt: skip
    x0, x1, mean, rstd = normalise(h0, h1, eps, N, COLS0, COLS1)
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    y0 = x0 * load_vector(weight_ptr, N, 0, COLS0) + load_vector(bias_ptr, N, 0, COLS0)
    if THRESHOLD > 0:
        y0 = tl.where(keep_features(seed, rows, 0, stream, THRESHOLD, COLS0), y0 * keep_scale, 0.0)
    store_rows(y_ptr, y0, rows, in_rows, stride_ym, N, 0, COLS0)
    if COLS1 > 0:
        y1 = x1 * load_vector(weight_ptr, N, COLS0, COLS1) + load_vector(bias_ptr, N, COLS0, COLS1)
        if THRESHOLD > 0:
            y1 = tl.where(keep_features(seed, rows, COLS0, stream, THRESHOLD, COLS1), y1 * keep_scale, 0.0)
        store_rows(y_ptr, y1, rows, in_rows, stride_ym, N, COLS0, COLS1)
    tl.store(mean_ptr + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)


@triton.jit
def _add_by_type(sums, part, ids, TYPES: tl.constexpr):
    """A token's part, [1, COLS], added to the row of `sums`, [TYPES, COLS], that its id, [1], chooses."""
    return sums + tl.where(tl.arange(0, TYPES)[:, None] == ids[:, None], part, 0.0)


@triton.jit
def _store_by_type(
    partials_ptr, sums, programs, N: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr, TYPES: tl.constexpr
):
    """This program's row of each type's sums, which follow those of dweight and dbias."""
    cols = FIRST + tl.arange(0, COLS)
    rows = (2 + tl.arange(0, TYPES)) * programs + tl.program_id(0)
    tl.store(partials_ptr + rows[:, None] * N + cols[None, :], sums, mask=(cols < N)[None, :])


@triton.jit(do_not_specialize=["T", "programs", "stream"])
def _embedding_bwd_dh_kernel(
    dy_ptr,  # (T, N)
    input_ids_ptr,  # (T,) int64
    position_ids_ptr,  # (T,) int64
    token_type_ids_ptr,  # (T,) int64
    task_type_ids_ptr,  # (T,) int64, or None
    word_ptr,  # (V, N)
    position_ptr,  # (_, N)
    token_type_ptr,  # (_, N)
    task_type_ptr,  # (_, N), or None
    weight_ptr,  # (N,)
    mean_ptr,  # (T,) fp32
    rstd_ptr,  # (T,) fp32
    seed_ptr,  # () int64, or None
    dh_ptr,  # (T, N)  out, fp32
    partials_ptr,  # (2 + TYPES, programs, N)  out, fp32: dweight, dbias, rows of dtoken_type_weight
    stride_dym: tl.constexpr,
    stride_w: tl.constexpr,
    stride_p: tl.constexpr,
    stride_t: tl.constexpr,
    stride_k: tl.constexpr,
    T,
    programs,
    keep_scale,
    stream,
    THRESHOLD: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,  # per step: one, for its type chooses where all of it is added
    COLS0: tl.constexpr,
    COLS1: tl.constexpr,
    TYPES: tl.constexpr,  # rows of a small token type table, up to a power of two; 0 where it is not summed here
):
    seed = 0
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    dweight0 = tl.zeros([ROWS, COLS0], tl.float32)
    dbias0 = tl.zeros([ROWS, COLS0], tl.float32)
    dtypes0 = tl.zeros([TYPES or 1, COLS0], tl.float32)
    dweight1 = dweight0
    dbias1 = dbias0
    dtypes1 = dtypes0
    if COLS1 > 0:
        dtypes1 = tl.zeros([TYPES or 1, COLS1], tl.float32)
        dweight1 = tl.zeros([ROWS, COLS1], tl.float32)
        dbias1 = tl.zeros([ROWS, COLS1], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(T, ROWS), programs):
        rows = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < T
        word_ids = tl.load(input_ids_ptr + rows, mask=in_rows, other=0)
        position_ids = tl.load(position_ids_ptr + rows, mask=in_rows, other=0)
        token_type_ids = tl.load(token_type_ids_ptr + rows, mask=in_rows, other=0)
        task_type_ids = token_type_ids
        if task_type_ptr is not None:
            task_type_ids = tl.load(task_type_ids_ptr + rows, mask=in_rows, other=0)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
        h0 = _sum_of_tables(
            word_ptr, position_ptr, token_type_ptr, task_type_ptr, word_ids, position_ids, token_type_ids,
            task_type_ids, in_rows, stride_w, stride_p, stride_t, stride_k, N, 0, COLS0,
        )  # fmt: skip
        x0 = x_hat_of(h0, mean, rstd, N, 0, COLS0)
        dy0 = load_rows(dy_ptr, rows, in_rows, stride_dym, N, 0, COLS0)
        if THRESHOLD > 0:
            dy0 = tl.where(keep_features(seed, rows, 0, stream, THRESHOLD, COLS0), dy0 * keep_scale, 0.0)
        dweight0 += dy0 * x0
        dbias0 += dy0
        g0 = dy0 * load_vector(weight_ptr, N, 0, COLS0)
        g1 = g0
        x1 = x0
        if COLS1 > 0:
            h1 = _sum_of_tables(
                word_ptr, position_ptr, token_type_ptr, task_type_ptr, word_ids, position_ids, token_type_ids,
                task_type_ids, in_rows, stride_w, stride_p, stride_t, stride_k, N, COLS0, COLS1,
            )  # fmt: skip
            x1 = x_hat_of(h1, mean, rstd, N, COLS0, COLS1)
            dy1 = load_rows(dy_ptr, rows, in_rows, stride_dym, N, COLS0, COLS1)
            if THRESHOLD > 0:
                dy1 = tl.where(keep_features(seed, rows, COLS0, stream, THRESHOLD, COLS1), dy1 * keep_scale, 0.0)
            dweight1 += dy1 * x1
            dbias1 += dy1
            g1 = dy1 * load_vector(weight_ptr, N, COLS0, COLS1)
        d0, d1 = input_gradient(g0, x0, g1, x1, rstd, N, COLS1)
        store_rows(dh_ptr, d0, rows, in_rows, N, N, 0, COLS0)
        if TYPES > 0:
            dtypes0 = _add_by_type(dtypes0, d0, token_type_ids, TYPES)
        if COLS1 > 0:
            store_rows(dh_ptr, d1, rows, in_rows, N, N, COLS0, COLS1)
            if TYPES > 0:
                dtypes1 = _add_by_type(dtypes1, d1, token_type_ids, TYPES)
    store_partial(partials_ptr, 0, dweight0, programs, N, 0, COLS0)
    store_partial(partials_ptr, 1, dbias0, programs, N, 0, COLS0)
    if TYPES > 0:
        _store_by_type(partials_ptr, dtypes0, programs, N, 0, COLS0, TYPES)
    if COLS1 > 0:
        store_partial(partials_ptr, 0, dweight1, programs, N, COLS0, COLS1)
        store_partial(partials_ptr, 1, dbias1, programs, N, COLS0, COLS1)
        if TYPES > 0:
            _store_by_type(partials_ptr, dtypes1, programs, N, COLS0, COLS1, TYPES)


@triton.jit(do_not_specialize=["T", "padding_idx"])
def _embedding_bwd_runs_kernel(
    dh_ptr,  # (T, N) fp32
    ids_ptr,  # (T,) int32, ascending
    order_ptr,  # (T,) int64: where in the batch each of them stands
    table_ptr,  # (_, N)       out: rows of ids whose run lies within a chunk
    heads_ptr,  # (chunks, N)  out, fp32: what belongs to the run that goes on from the chunk before
    tails_ptr,  # (chunks, N)  out, fp32: what belongs to a run that begins here and goes on in the next chunk
    T,
    N,
    padding_idx,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    begins_here = first == 0
    if first > 0:
        begins_here = tl.load(ids_ptr + first - 1) != tl.load(ids_ptr + first)
    acc = tl.zeros([BLOCK_N], tl.float32)
    last = tl.minimum(first + CHUNK, T) - 1
    for i in range(first, last + 1):
        row = tl.load(ids_ptr + i).to(tl.int64)
        acc += tl.load(dh_ptr + tl.load(order_ptr + i) * N + cols, mask=mask, other=0.0)
        ends_here = i + 1 == T
        if i + 1 < T:
            ends_here = tl.load(ids_ptr + i + 1) != row
        if ends_here | (i == last):
            if begins_here:
                if ends_here:
                    if row != padding_idx:
                        tl.store(table_ptr + row * N + cols, acc.to(table_ptr.dtype.element_ty), mask=mask)
                else:
                    tl.store(tails_ptr + chunk.to(tl.int64) * N + cols, acc, mask=mask)
            else:
                tl.store(heads_ptr + chunk.to(tl.int64) * N + cols, acc, mask=mask)
            acc = tl.zeros([BLOCK_N], tl.float32)
            begins_here = True


@triton.jit(do_not_specialize=["T", "padding_idx"])
def _embedding_bwd_join_kernel(
    ids_ptr,  # (T,) int32, ascending
    heads_ptr,  # (chunks, N) fp32
    tails_ptr,  # (chunks, N) fp32
    table_ptr,  # (_, N)  out: rows of ids whose run crosses chunks
    T,
    N,
    padding_idx,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,  # chunks per step
    BLOCK_N: tl.constexpr,
):
    chunk = tl.program_id(0)
    chunks = tl.cdiv(T, CHUNK)
    after = chunk * CHUNK + CHUNK  # the next chunk's first token
    if after >= T:
        return
    row = tl.load(ids_ptr + after).to(tl.int64)
    if tl.load(ids_ptr + after - 1) != row:
        return  # no run goes on from here
    if chunk > 0:
        if tl.load(ids_ptr + chunk * CHUNK - 1) == row:
            return  # it began before this chunk
    if row == padding_idx:
        return

    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    acc = tl.load(tails_ptr + chunk.to(tl.int64) * N + cols, mask=mask, other=0.0)
    first = chunk + 1
    goes_on = True
    while goes_on:
        offs_c = first + tl.arange(0, BLOCK_C)
        own = tl.load(ids_ptr + offs_c * CHUNK, mask=offs_c < chunks, other=-1) == row
        heads_ptrs = heads_ptr + offs_c[:, None].to(tl.int64) * N + cols[None, :]
        acc += tl.sum(tl.load(heads_ptrs, mask=own[:, None] & mask[None, :], other=0.0), axis=0)
        first += BLOCK_C
        goes_on = tl.sum(own.to(tl.int32), axis=0) == BLOCK_C
    tl.store(table_ptr + row * N + cols, acc.to(table_ptr.dtype.element_ty), mask=mask)


def _launch_fwd(
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
    ids = input_ids, position_ids, token_type_ids, task_type_ids
    tables = word_weight, position_weight, token_type_weight, task_type_weight
    if word_weight.dtype == torch.float64:
        return reference.embedding(*ids, *tables, weight, bias, padding_idx, eps, dropout_p, seed, stream)
    y, mean, rstd = _fake_fwd(*ids, *tables)
    T, N = y.shape
    rows, num_warps = rows_and_warps(N)
    COLS0, COLS1 = parts(N)
    _launch.launch(
        _embedding_fwd_kernel, (triton.cdiv(T, rows),),
        *ids, *tables, weight, bias, seed, y, mean, rstd,
        *(0 if table is None else table.stride(0) for table in tables), y.stride(0),
        T, eps, reference.keep_scale(dropout_p), stream,
        THRESHOLD=reference.drop_threshold(dropout_p), N=N, ROWS=rows, COLS0=COLS0, COLS1=COLS1, num_warps=num_warps,
    )  # fmt: skip
    return y, mean, rstd


def _launch_bwd(
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
    ids = input_ids, position_ids, token_type_ids, task_type_ids
    tables = word_weight, position_weight, token_type_weight, task_type_weight
    if word_weight.dtype == torch.float64:
        return reference.embedding_backward(
            dy, *ids, *tables, weight, mean, rstd, padding_idx, dropout_p, seed, stream
        )  # fmt: skip
    T, N = dy.shape
    TYPES = _summed_types(token_type_weight)
    programs, num_warps = _programs_and_warps(T, N, _launch.chip(dy.device), 2 + TYPES)
    COLS0, COLS1 = parts(N)
    dh = dy.new_empty(T, N, dtype=torch.float32)
    partials = dy.new_empty(2 + TYPES, programs, N, dtype=torch.float32)
    _launch.launch(
        _embedding_bwd_dh_kernel, (programs,),
        dy, *ids, *tables, weight, mean, rstd, seed, dh, partials,
        dy.stride(0), *(0 if table is None else table.stride(0) for table in tables),
        T, programs, reference.keep_scale(dropout_p), stream,
        THRESHOLD=reference.drop_threshold(dropout_p), N=N, ROWS=1, COLS0=COLS0, COLS1=COLS1,
        TYPES=TYPES, num_warps=num_warps,
    )  # fmt: skip
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    sum_partials(partials[:2], dweight, dbias, None)
    dword = _table_gradient(dh, input_ids, word_weight, padding_idx)
    dposition = _table_gradient(dh, position_ids, position_weight, -1)
    if TYPES > 0:
        dtoken_type = torch.empty_like(token_type_weight, memory_format=torch.contiguous_format)
        sum_partials(partials[2 : 2 + dtoken_type.shape[0]], dtoken_type, None, None)
    else:
        dtoken_type = _table_gradient(dh, token_type_ids, token_type_weight, -1)
    if task_type_weight is None or task_type_ids is None:
        dtask_type = weight.new_empty(0)
    else:
        dtask_type = _table_gradient(dh, task_type_ids, task_type_weight, -1)
    return dword, dposition, dtoken_type, dtask_type, dweight, dbias


def _summed_types(table: Tensor) -> int:
    """Rows of a table that is small enough to be summed in registers, up to a power of two; else 0."""
    types, N = table.shape
    return triton.next_power_of_2(types) if types <= 4 and N <= 2048 else 0


def _programs_and_warps(T: int, N: int, chip: _launch.Chip, sums: int) -> tuple[int, int]:
    """As in `layer_norm`, with warps enough that a thread keeps at most 72 sums."""
    _, num_warps = programs_and_warps(T, N, chip)
    num_warps = max(num_warps, triton.next_power_of_2(triton.cdiv(N * sums, 32 * 72)))
    return max(1, min(T, chip.processors * max(1, 8 // num_warps))), num_warps


def _table_gradient(dh: Tensor, ids: Tensor, table: Tensor, padding_idx: int) -> Tensor:
    T, N = dh.shape
    gradient = table.new_zeros(table.shape)
    chunks = triton.cdiv(T, CHUNK)
    if chunks == 0:
        return gradient
    in_order, order = torch.sort(ids.int(), stable=True)  # half the passes that 64 bits take
    heads, tails = dh.new_empty(2, chunks, N).unbind()
    BLOCK_N = min(256, max(16, triton.next_power_of_2(N)))
    grid = (chunks, triton.cdiv(N, BLOCK_N))
    _launch.launch(
        _embedding_bwd_runs_kernel, grid,
        dh, in_order, order, gradient, heads, tails, T, N, padding_idx, CHUNK=CHUNK, BLOCK_N=BLOCK_N, num_warps=1,
    )  # fmt: skip
    _launch.launch(
        _embedding_bwd_join_kernel, grid,
        in_order, heads, tails, gradient, T, N, padding_idx, CHUNK=CHUNK, BLOCK_C=16, BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
    return gradient


def _fake_fwd(
    input_ids: Tensor, position_ids: Any, token_type_ids: Any, task_type_ids: Any, word_weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    T, N = input_ids.shape[0], word_weight.shape[1]
    statistics = reference.accumulator(word_weight)
    y = word_weight.new_empty(T, N)
    return y, y.new_empty(T, dtype=statistics), y.new_empty(T, dtype=statistics)


def _fake_bwd(dy: Tensor, *tensors_and_rest: Any) -> tuple[Tensor, ...]:
    *tables, weight = tensors_and_rest[4:9]
    empty = weight.new_empty(0)
    gradients = [empty if table is None else table.new_empty(table.shape) for table in tables]
    return *gradients, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


embedding_bwd = _library.define(
    "embedding_bwd(Tensor dy, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor? task_type_ids,"
    " Tensor word_weight, Tensor position_weight, Tensor token_type_weight, Tensor? task_type_weight, Tensor weight,"
    " Tensor mean, Tensor rstd, int padding_idx, float dropout_p, Tensor? seed, int stream)"
    " -> (Tensor dword_weight, Tensor dposition_weight, Tensor dtoken_type_weight, Tensor dtask_type_weight,"
    " Tensor dweight, Tensor dbias)",
    cuda=_launch_bwd,
    cpu=_cpu.embedding_backward,
    fake=_fake_bwd,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _bias, ctx.padding_idx, _eps, ctx.dropout_p, seed, ctx.stream = inputs
    _y, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx: Any, dy: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    dword, dposition, dtoken_type, dtask_type, dweight, dbias = embedding_bwd(
        dy.contiguous(), *tensors, ctx.padding_idx, ctx.dropout_p, seed, ctx.stream
    )
    no_ids = None, None, None, None
    tables = dword, dposition, dtoken_type, None if tensors[7] is None else dtask_type
    return *no_ids, *tables, dweight, dbias, None, None, None, None, None


embedding_fwd = _library.define(
    "embedding_fwd(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor? task_type_ids,"
    " Tensor word_weight, Tensor position_weight, Tensor token_type_weight, Tensor? task_type_weight, Tensor weight,"
    " Tensor bias, int padding_idx, float eps, float dropout_p, Tensor? seed, int stream)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    cuda=_launch_fwd,
    cpu=_cpu.embedding,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
)
