r"""Vocabulary projection + softmax cross-entropy, for the rows that have a label, with its gradients.

    logits  = x weight^T + bias,   loss = sum over rows of lse - logits[label],   lse = log sum_v exp(logits_v)
    dlogits = exp(logits - lse) - onehot(label)
    dx = dlogits weight,   dweight = dlogits^T x,   dbias = sum of the rows of dlogits

The gradients are made in the forward, while the logits are there, and the backward only scales them: three products
instead of the four that computing the logits again would need, and kept are (M + V) N elements instead of M V.
They are of the sum over rows, whose dlogits are large enough for float16; the mean's would underflow.

The products are cuBLAS's, on chunks of rows whose logits are at most LOGITS. Logits have the dtype of x, and their rows
are padded to 128 bytes, so that products with a vocabulary of 30522 load and store 16 bytes at a time. A kernel then
takes a row a program: it reads the row for lse, and again, from the cache, to write dlogits in its place.
Rows with ignore_index cost time, but nothing waits for their number. A label that is neither that nor in [0, V) makes
the loss NaN.
Specification: `fastbert.reference.linear_cross_entropy`. Arithmetic: 2 M V N flops, with the gradients 6 M V N.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import _library, reference
from fastbert.kernels import _cpu, _launch
from fastbert.kernels._device import LN_2, LOG2_E
from fastbert.kernels._triton import tl, triton

LOGITS = 1 << 29  # of a chunk: 1 GiB at 16 bits
BLOCK_N = 4096


@triton.jit(do_not_specialize=["labels_ptr", "losses_ptr"])  # a chunk of rows begins anywhere
def _cross_entropy_fwd_kernel(
    logits_ptr,  # (M, width), V of them without bias  in, and out: dlogits
    bias_ptr,  # (width,), or None
    labels_ptr,  # (M,) int64
    losses_ptr,  # (M,)  out, fp32
    width,  # V, rounded up: masks with it leave loads and stores 16 bytes wide
    V,
    ignore_index,
    GRADIENT: tl.constexpr,  # whether dlogits are wanted
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * width
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, V, BLOCK_N):
                cols = first + tl.arange(0, BLOCK_N)
                tl.store(logits_ptr + cols, tl.zeros([BLOCK_N], logits_ptr.dtype.element_ty), mask=cols < width)
    else:
        # Lane by lane: no thread waits for another before the end. Not -inf, for a lane may have no column at all.
        m_i = tl.full([BLOCK_N], -1e38, tl.float32)
        l_i = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, V, BLOCK_N):
            s = _scaled_logits(logits_ptr, bias_ptr, first + tl.arange(0, BLOCK_N), width, V)
            m_new = tl.maximum(m_i, s)
            l_i = l_i * tl.exp2(m_i - m_new) + tl.exp2(s - m_new)
            m_i = m_new
        largest = tl.max(m_i, axis=0)
        lse = largest + tl.log2(tl.sum(l_i * tl.exp2(m_i - largest), axis=0))  # of log2(e) times the logits
        in_range = (label >= 0) & (label < V)
        target = tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(tl.float32) * LOG2_E
        if bias_ptr is not None:
            target += tl.load(bias_ptr + label, mask=in_range, other=0.0).to(tl.float32) * LOG2_E
        tl.store(losses_ptr + row, (lse - target) * LN_2)
        if GRADIENT:
            tl.debug_barrier()  # all warps have read logits[label], before another warp overwrites it
            for first in range(0, V, BLOCK_N):
                cols = first + tl.arange(0, BLOCK_N)
                p = tl.exp2(_scaled_logits(logits_ptr, bias_ptr, cols, width, V) - lse)
                d = tl.where(cols == label, p - 1.0, p)
                tl.store(logits_ptr + cols, d.to(logits_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def _scaled_logits(logits_ptr, bias_ptr, cols, width, V):
    """log2(e) times the logits of some columns; the least there is beyond V."""
    s = tl.load(logits_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)
    return tl.where(cols < V, s * LOG2_E, -1e38)


@triton.jit
def _rescale_kernel(
    x_ptr,  # (elements,)
    factor_ptr,  # () fp32
    y_ptr,  # (elements,)  out
    elements,
    BLOCK_N: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(x_ptr + offs, mask=offs < elements, other=0.0).to(tl.float32) * tl.load(factor_ptr).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < elements)


def _launch_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return reference.linear_cross_entropy(x, weight, bias, labels, ignore_index, need_dx, need_dweight)
    (M, V), gradient = (x.shape[0], weight.shape[0]), need_dx or need_dweight
    _, dx, dweight, dbias = _fake_fwd(x, weight, bias, labels, ignore_index, need_dx, need_dweight)
    losses = x.new_empty(M, dtype=torch.float32)
    aligned = 128 // x.element_size()
    width = triton.cdiv(V, aligned) * aligned
    padded_bias = None if bias is None else F.pad(bias, (0, width - V))
    sums = [dweight, dbias]  # of one chunk; of several in float32
    for rows in _row_chunks(M, V):
        padded = x.new_empty(rows.stop - rows.start, width)
        logits = padded[:, :V]
        torch.mm(x[rows], weight.T, out=logits)
        _launch.launch(
            _cross_entropy_fwd_kernel, (padded.shape[0],),
            padded, padded_bias, labels[rows], losses[rows], width, V, ignore_index,
            GRADIENT=gradient, BLOCK_N=BLOCK_N, num_warps=8,
        )  # fmt: skip
        if need_dx:
            torch.mm(logits, weight, out=dx[rows])
        if not need_dweight:
            continue
        of_chunk = [logits.T @ x[rows], logits.sum(0, dtype=torch.float32) if dbias.numel() else dbias]
        sums = of_chunk if rows.start == 0 else [a.float().add_(b) for a, b in zip(sums, of_chunk, strict=True)]
    if need_dweight and M == 0:
        sums = [dweight.zero_(), dbias.zero_()]
    return losses.sum(), dx, sums[0].to(weight.dtype), sums[1].to(weight.dtype)


def _row_chunks(M: int, V: int) -> list[slice]:
    """Chunks of one size, with at most LOGITS logits each, but for rows that have more."""
    chunks = triton.cdiv(M * V, LOGITS)
    step = triton.cdiv(M, max(1, chunks))
    return [slice(start, min(M, start + step)) for start in range(0, M, max(1, step))]


def _fake_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Any, ignore_index: Any, need_dx: bool, need_dweight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty((), dtype=reference.accumulator(x)),
        x.new_empty(x.shape if need_dx else 0),
        weight.new_empty(weight.shape if need_dweight else 0),
        weight.new_empty(weight.shape[0] if need_dweight and bias is not None else 0),
    )


def _launch_rescale(x: Tensor, factor: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return reference.rescale(x, factor)
    y, BLOCK_N = torch.empty_like(x), 2048
    _launch.launch(_rescale_kernel, (triton.cdiv(x.numel(), BLOCK_N),), x, factor, y, x.numel(), BLOCK_N, num_warps=4)
    return y


rescale = _library.define(
    "rescale(Tensor x, Tensor factor) -> Tensor",
    cuda=_launch_rescale,
    cpu=reference.rescale,
    fake=lambda x, factor: torch.empty_like(x),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _loss, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)  # of the first three inputs
    dx, dweight, dbias = (rescale(gradient, dloss) if needed else None for gradient, needed in gradients)
    return dx, dweight, dbias, None, None, None, None


def _flops(x: Tensor, weight: Tensor, _bias: Any, _labels: Any, _ignore: Any, need_dx: bool, need_dweight: bool) -> int:
    return 2 * (1 + need_dx + need_dweight) * x.shape[0] * weight.numel()


linear_cross_entropy_fwd = _library.define(
    "linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor labels, int ignore_index,"
    " bool need_dx, bool need_dweight) -> (Tensor loss, Tensor dx, Tensor dweight, Tensor dbias)",
    cuda=_launch_fwd,
    cpu=_cpu.linear_cross_entropy,
    fake=_fake_fwd,
    setup_context=_save,
    backward=_backward,
    flops=_flops,
)
