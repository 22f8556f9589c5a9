"""attention_fwd, attention_bwd."""

import os
from itertools import accumulate, pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels import _attention_tiles, _launch
from fastbert.kernels.attention import attention_bwd, attention_fwd
from tests.optional import given, settings, st
from tests.oracle import assert_operator_accurate, opcheck, to_float64

pytestmark = pytest.mark.kernel
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def _inputs(
    seqlens: list[int],
    D: int = 32,
    H: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    causal: bool = False,
    dropout_p: float = 0.0,
) -> list:
    """q, k, v are strided views of one packed product."""
    q, k, v = torch.randn(sum(seqlens), 3, H, D, device=device).to(dtype).unbind(1)
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)
    seed = torch.tensor(-42, device=device) if dropout_p else None
    return [q, k, v, cu_seqlens, max(seqlens, default=0), D**-0.5, causal, dropout_p, seed, 7]


def _backward_inputs(forward: list) -> list:
    q, k, v, *rest = forward
    o, lse = reference.attention(*forward)
    return [torch.randn_like(o), q, k, v, o, lse, *rest]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float, causal: bool, *_: object):
    """PyTorch's fused attention, one sequence after the other; its fast exponential errs more than `reference`."""
    parts = [q[:0] + k[:0] + v[:0]]
    for start, end in pairwise(cu_seqlens.tolist()):
        if end > start:
            qs, ks, vs = (t[None, start:end].transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale)
            parts.append(o[0].transpose(0, 1))
    return torch.cat(parts)


def _output(*forward: object) -> Tensor:
    return attention_fwd(*forward)[0]


def _naive(*forward: object) -> Tensor:
    return reference.attention(*forward)[0] if forward[7] else _sdpa(*forward)


def _naive_backward(do: Tensor, *forward: object) -> tuple[Tensor, ...]:
    q, k, v, _o, _lse, *rest = forward
    if rest[4]:
        return reference.attention_backward(do, *forward)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(_sdpa(*leaves, *rest), leaves, do)


RAGGED = [1, 13, 0, 64, 65, 65, 0]  # one short block, whole ones, one token more, nothing
LONG = [200, 1, 130]  # several blocks, and the backward in two passes
FLAGS = [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.6)]  # causal, dropout_p
CASES = [
    *((64, dtype, seqlens, *flags) for dtype in DTYPES for seqlens in (RAGGED, [64, 64]) for flags in FLAGS),
    *(
        (D, dtype, RAGGED, *FLAGS[(i + j) % 4])
        for i, D in enumerate((16, 26, 32, 128))
        for j, dtype in enumerate(DTYPES)
    ),
    *((D, torch.float16, [40, 7], *flags) for D in (80, 256) for flags in FLAGS[1:3]),
    *((32, dtype, LONG, *flags) for dtype in DTYPES[1:] for flags in FLAGS[1:3]),
    *((32, dtype, seqlens, False, 0.1) for dtype in DTYPES for seqlens in ([], [0], [1])),
]


@pytest.mark.parametrize(("D", "dtype", "seqlens", "causal", "dropout_p"), CASES)
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(D: int, dtype: torch.dtype, seqlens: list[int], causal: bool, dropout_p: float, device: str) -> None:
    _check_accuracy(_inputs(seqlens, D, 2, dtype, device, causal, dropout_p))


def _check_accuracy(forward: list) -> None:
    assert_operator_accurate(_output, lambda *a: reference.attention(*a)[0], forward, naive=_naive)
    (_, lse), (_, exact) = attention_fwd(*forward), reference.attention(*map(to_float64, forward))
    tolerance = 1e-4 if forward[0].dtype.itemsize == 2 else 1e-5
    torch.testing.assert_close(lse.double(), exact, atol=tolerance, rtol=tolerance)
    backward = _backward_inputs(forward)
    assert_operator_accurate(attention_bwd, reference.attention_backward, backward, naive=_naive_backward, factor=4.0)


@pytest.mark.parametrize("seqlens", [[100, 28, 1], LONG], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_tiles_of_hopper(seqlens: list[int], dropout_p: float, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter, too, runs the largest tiles; a GPU has its own."""
    if device == "cpu":
        monkeypatch.setattr(_launch, "chip", lambda device: _launch.Chip((9, 0), 132))
    _check_accuracy(_inputs(seqlens, 64, 1, torch.float16, device, False, dropout_p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("seqlens", [[1, 63, 64], [65, 1, 129], [300]], ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_causal(
    seqlens: list[int], dropout_p: float, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths around a block's, with blocks of both shapes: more queries than keys, and the largest tiles there are."""
    if device == "cpu" and dtype == torch.float16:
        monkeypatch.setattr(_launch, "chip", lambda device: _launch.Chip((9, 0), 132))
    _check_accuracy(_inputs(seqlens, 64, 1, dtype, device, True, dropout_p))


@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (32, 32)], ids=str)
@pytest.mark.parametrize("seqlens", [[129], [1, 63, 65, 0]], ids=str)
@pytest.mark.usefixtures("poisoned_allocations")
def test_causal_on_any_tile(
    tile: tuple[int, int], seqlens: list[int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of keys that some of a block's queries see nothing of, before and after those that they see."""
    monkeypatch.setattr(_attention_tiles, "blocks", lambda *_: _launch.Blocks(*tile, 4, 1))
    monkeypatch.setattr(_attention_tiles, "takes_one_block", lambda *_: False)
    _check_accuracy(_inputs(seqlens, 32, 2, torch.float32, device, True, 0.1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("seqlens", [[40, 9], [9, 140]], ids=str)
def test_what_is_to_the_right_changes_nothing(seqlens: list[int], dropout_p: float, device: str) -> None:
    """Other numbers there change no bit of a causal output or of its gradients, and no gradient reaches them."""
    q, k, v, cu_seqlens, *rest = _inputs(seqlens, 32, 2, torch.float32, device, True, dropout_p)
    T, cut = q.shape[0], 37 if seqlens[0] == 40 else 100
    right = torch.zeros(T, dtype=torch.bool, device=device)
    right[cut : int(cu_seqlens[1]) if cut < seqlens[0] else T] = True
    do = torch.randn(T, *q.shape[1:], device=device)
    do[right] = 0.0

    def run(poison: bool) -> tuple[Tensor, ...]:
        leaves = [t.clone() for t in (q, k, v)]
        for t in leaves if poison else ():
            t[right] = 3.0 * torch.randn_like(t[right])
        leaves = [t.requires_grad_() for t in leaves]
        o, lse = attention_fwd(*leaves, cu_seqlens, *rest)
        return o.detach(), lse.T, *torch.autograd.grad(o, leaves, do)

    clean, changed = run(False), run(True)
    for before, after in zip(clean, changed, strict=True):
        assert torch.equal(before[~right], after[~right])
    for gradient in changed[2:]:
        assert (gradient[right] == 0).all()
    assert all(gradient[~right].any() for gradient in changed[2:])


def test_causal_dropout_has_the_same_masks(device: str) -> None:
    """With values that are one, an output is the sum of a row's probabilities that were kept."""
    T, p = 70, 0.25
    q, k, v, *rest = _inputs([T], 16, 2, torch.float32, device, True, p)
    seed, stream = rest[-2:]
    o, _ = attention_fwd(torch.zeros_like(q), k, torch.ones_like(v), *rest)
    keep = reference.keep_mask(2, 0, T, T, p, seed, stream, scores=True)
    expected = (keep.tril().sum(-1) / torch.arange(1, T + 1, device=device)).T * 256 / 192
    torch.testing.assert_close(o, expected[..., None].expand_as(o).float())


def test_many_sequences(device: str) -> None:
    """More than `_tile` looks at in one step, and one of them much longer than the others."""
    _check_accuracy(_inputs([1] * 150 + [70] + [2] * 110, 16, 1, torch.float32, device))


def test_scores_far_from_zero(device: str) -> None:
    """exp would overflow without the maximum taken off, and so it would for masked keys in the backward."""
    forward = _inputs([70, 33], 32, 2, torch.float32, device)
    forward[0] = forward[0] * 30 + 20
    forward[1] = forward[1] - 10
    _check_accuracy(forward)


def test_tf32_is_the_users_choice() -> None:
    matmul = torch.backends.cuda.matmul
    assert _launch.precision(torch.float32) == "ieee"
    matmul.allow_tf32 = True
    try:
        assert _launch.precision(torch.float32) == "tf32"
        assert _launch.precision(torch.bfloat16) == "ieee"
    finally:
        matmul.allow_tf32 = False
    assert _launch.precision(torch.float32) == "ieee"


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("seqlens", [RAGGED, LONG], ids=str)
def test_one_product_with_all_three(seqlens: list[int], dropout_p: float, device: str) -> None:
    """The same bits as from three tensors, and the gradients in one."""
    q, k, v, *rest = _inputs(seqlens, 32, 2, torch.float32, device, False, dropout_p)
    separate = [t.clone().requires_grad_() for t in (q, k, v)]
    packed = torch.stack((q, k, v), dim=1).requires_grad_()
    expected, actual = attention_fwd(*separate, *rest)[0], attention_fwd(packed, None, None, *rest)[0]
    assert torch.equal(actual, expected)
    do = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, separate, do)
    assert torch.equal(torch.autograd.grad(actual, packed, do)[0], torch.stack(gradients, dim=1))


def test_any_strides(device: str) -> None:
    q, k, v, *rest = _inputs([100, 9], 16, 2, torch.float32, device)
    strided = [
        q.transpose(0, 1).contiguous().transpose(0, 1),
        k.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        torch.cat((v, v), dim=-1)[..., 16:],
    ]
    assert len({t.stride() for t in (q, *strided)}) == 4
    _check_accuracy([*strided, *rest])


@pytest.mark.skipif(not INTERPRETED, reason="of the kernels: needs TRITON_INTERPRET=1")
def test_offsets_beyond_32_bits() -> None:
    """Tokens are 2^24 elements apart, and only the last three of 136 belong to a sequence."""
    q, k, v, _, longest, *rest = _inputs([3], 16, 1, torch.float16)
    near = torch.tensor([0, 3], dtype=torch.int32)
    T = 2**7 + 8
    far = [torch.empty(T << 24, dtype=q.dtype).as_strided((T, 1, 16), (1 << 24, 16, 1)) for _ in range(3)]
    for t, own in zip(far, (q, k, v), strict=True):
        t[-3:] = own
    cu_seqlens = torch.tensor([T - 3, T], dtype=torch.int32)
    (expected, lse), (actual, far_lse) = (
        attention_fwd(q, k, v, near, longest, *rest),
        attention_fwd(*far, cu_seqlens, longest, *rest),
    )
    assert torch.equal(actual[-3:], expected)
    gradients = attention_bwd(expected, q, k, v, expected, lse, near, longest, *rest)
    far_gradients = attention_bwd(actual, *far, actual, far_lse, cu_seqlens, longest, *rest)
    for a, e in zip(far_gradients, gradients, strict=True):
        assert torch.equal(a[-3:], e)


WRONG = [  # cu_seqlens, tokens, max_seqlen
    ([0, 40], 40, 16),
    ([0, 5, 45, 50, 50], 50, 16),
    ([3, 20, 30], 37, 17),  # tokens before the first sequence, and behind the last
    ([0, 3, 3, 12], 60, 9),
    ([0, 100, 101, 102, 104], 110, 50),  # programs go by slots
    ([0, 33, 34], 34, 32),
    ([0, 7], 7, 0),
    ([0, 0, 0], 4, 8),
    ([0], 3, 8),
]


@pytest.mark.parametrize(("bounds", "T", "max_seqlen"), WRONG, ids=str)
@pytest.mark.parametrize("tile", [None, (16, 32)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_rows_without_a_result_are_nan(
    bounds: list[int],
    T: int,
    max_seqlen: int,
    tile: tuple[int, int] | None,
    dropout_p: float,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a sequence longer than max_seqlen, and of tokens that are no sequence's; all others are as ever."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("of the kernels: needs TRITON_INTERPRET=1")
    if tile is not None:
        monkeypatch.setattr(_attention_tiles, "blocks", lambda *_: _launch.Blocks(*tile, 4, 1))
        monkeypatch.setattr(_attention_tiles, "takes_one_block", lambda *_: False)
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda t, *sizes, **options: new_empty(t, *sizes, **options).fill_(7))
    q, k, v, _, _, *rest = _inputs([T], 16, 2, torch.float32, device, False, dropout_p)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    o, lse = attention_fwd(q, k, v, cu_seqlens, max_seqlen, *rest)
    do = torch.randn_like(o)
    outputs = o, lse.T, *attention_bwd(do, q, k, v, o, lse, cu_seqlens, max_seqlen, *rest)

    exact_o, exact_lse = reference.attention(q, k, v, cu_seqlens, max_seqlen, *rest)
    backward = do, q, k, v, exact_o, exact_lse, cu_seqlens, max_seqlen, *rest
    exact = exact_o, exact_lse.T, *reference.attention_backward(*backward)
    owned = torch.zeros(T, dtype=torch.bool, device=device)
    for start, end in pairwise(bounds):
        owned[start:end] = end - start <= max_seqlen
    for actual, expected in zip(outputs, exact, strict=True):
        torch.testing.assert_close(actual[owned], expected[owned], atol=1e-5, rtol=1e-5)
        assert actual[~owned].isnan().all()


@pytest.mark.plain
def test_two_runs_are_bitwise_equal(device: str) -> None:
    for seqlens in (RAGGED, LONG):
        forward = _inputs(seqlens, 64, 2, torch.float16, device, False, 0.1)
        backward = _backward_inputs(forward)
        for first, second in zip(
            (*attention_fwd(*forward), *attention_bwd(*backward)),
            (*attention_fwd(*forward), *attention_bwd(*backward)),
            strict=True,
        ):
            assert torch.equal(first, second)


@pytest.mark.plain
@pytest.mark.parametrize(("causal", "dropout_p"), [(False, 0.0), (True, 0.0), (False, 0.3), (True, 1.0)])
def test_gradcheck(causal: bool, dropout_p: float) -> None:
    arguments = _inputs([3, 1, 4, 4], 3, 2, torch.float64, "cpu", causal, dropout_p)
    tensors = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(lambda *a: attention_fwd(*a)[0], tensors)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch(causal: bool) -> None:
    """Not our own formulas: softmax of scores one sequence at a time, and autograd."""
    q, k, v, cu_seqlens, *_ = _inputs([5, 1, 8], 6, 2, torch.float64)
    leaves = [t.contiguous().requires_grad_() for t in (q, k, v)]
    parts = []
    for start, end in pairwise(cu_seqlens.tolist()):
        qs, ks, vs = (t[start:end].transpose(0, 1) for t in leaves)
        s = qs @ ks.mT / 6**0.5
        if causal:
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
        parts.append((s.softmax(-1) @ vs).transpose(0, 1))
    expected = torch.cat(parts)
    actual = functional.attention(*leaves, cu_seqlens, 8, causal=causal)
    torch.testing.assert_close(actual, expected)
    do = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves, do), torch.autograd.grad(expected, leaves, do))


def test_dropout_equals_pytorch_with_the_mask_given() -> None:
    arguments = _inputs([5, 20], 4, 3, torch.float64, dropout_p=0.25)
    q, k, v, _, _, scale, *_, seed, stream = arguments
    actual, _ = attention_fwd(*arguments)
    for start, end in ((0, 5), (5, 25)):
        keep = reference.keep_mask(3, start, end - start, end - start, 0.25, seed, stream, scores=True)
        p = (scale * q[start:end].transpose(0, 1) @ k[start:end].permute(1, 2, 0)).softmax(-1)
        expected = ((p * keep * 256 / 192) @ v[start:end].transpose(0, 1)).transpose(0, 1)
        torch.testing.assert_close(actual[start:end], expected)


def test_registration() -> None:
    for causal, dropout_p in ((False, 0.0), (True, 0.1)):
        forward = _inputs([3, 9], dropout_p=dropout_p, causal=causal)
        packed = [torch.stack(forward[:3], dim=1), None, None, *forward[3:]]
        for inputs in (forward, packed):
            opcheck(attention_bwd, _backward_inputs(inputs))
            leaves = [t if t is None else t.clone().requires_grad_() for t in inputs[:3]]
            opcheck(attention_fwd, [*leaves, *inputs[3:]])


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_neighbours_never_leak(dropout_p: float) -> None:
    """NaN in the other sequences changes no bit of this one, forward or backward."""
    arguments = _inputs([4, 7, 5], dropout_p=dropout_p)
    q, k, v = (t.contiguous() for t in arguments[:3])
    do = torch.randn_like(q)
    own = slice(4, 11)

    def run(poison: bool) -> tuple[Tensor, ...]:
        leaves = [t.clone() for t in (q, k, v)]
        for t in leaves if poison else ():
            t[:4] = t[11:] = float("nan")
        leaves = [t.requires_grad_() for t in leaves]
        o, lse = attention_fwd(*leaves, *arguments[3:])
        gradients = torch.autograd.grad(o, leaves, do)
        return (o[own].detach(), lse[:, own], *(g[own] for g in gradients))

    for clean, poisoned in zip(run(False), run(True), strict=True):
        assert torch.equal(clean, poisoned)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), st.randoms())
@settings(max_examples=25, deadline=None)
def test_permuting_sequences_permutes_outputs(seqlens: list[int], random: object) -> None:
    q, k, v, cu_seqlens, longest, *_ = _inputs(seqlens, 8)
    order = list(range(len(seqlens)))
    random.shuffle(order)
    bounds = list(pairwise(cu_seqlens.tolist()))
    rows = torch.cat([torch.arange(0), *(torch.arange(*bounds[i]) for i in order)])
    permuted = torch.tensor([0, *accumulate(seqlens[i] for i in order)], dtype=torch.int32)
    actual = functional.attention(q[rows], k[rows], v[rows], permuted, longest)
    torch.testing.assert_close(actual, functional.attention(q, k, v, cu_seqlens, longest)[rows], atol=1e-5, rtol=1e-5)


@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from(["packed", "heads first", "features first"]),
    st.sampled_from(FLAGS),
)
@settings(max_examples=8, deadline=None)
def test_accuracy_of_anything(seqlens: list[int], D: int, dtype: torch.dtype, layout: str, flags: tuple) -> None:
    forward = _inputs(seqlens, D, 2, dtype, "cpu", *flags)
    order = {"packed": (0, 1, 2), "heads first": (1, 0, 2), "features first": (2, 1, 0)}[layout]
    forward[:3] = [t.permute(order).contiguous().permute(order) for t in forward[:3]]
    _check_accuracy(forward)
