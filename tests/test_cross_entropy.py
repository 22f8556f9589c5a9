"""linear_cross_entropy_fwd, rescale."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels import _cpu, cross_entropy
from fastbert.kernels.cross_entropy import linear_cross_entropy_fwd, rescale
from tests.optional import given, settings, st
from tests.oracle import assert_accurate, opcheck, to_float64

pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _inputs(M: int, N: int, V: int, dtype: torch.dtype, device: str = "cpu", with_bias: bool = True) -> list:
    """x, weight, bias, labels, ignore_index; a third of the rows without a label."""
    x, weight, bias = (torch.randn(*shape, device=device) for shape in ((M, N), (V, N), (V,)))
    labels = torch.randint(0, V, (M,), device=device)
    labels[1::3] = -100
    return [x.to(dtype), (weight * N**-0.5).to(dtype), bias.to(dtype) if with_bias else None, labels, -100]


ALL = ((True, True), (False, False), (True, False), (False, True))


def _assert_accurate(arguments: list, needs: tuple[tuple[bool, bool], ...] = ALL) -> None:
    """With any of the gradients.

    The loss, float32 also where logits have 16 bits, may be off by what rounding the logits to these makes of it: of
    each row half a unit in the last place of the largest, in its lse and in its own logit.
    """
    x, weight, bias, labels, ignore = exactly = [to_float64(a) for a in arguments]
    largest = F.linear(x, weight, bias).abs().amax() if x.shape[0] else 0.0
    rounding = torch.finfo(arguments[0].dtype).eps * largest * (labels != ignore).sum()
    for need in needs:
        (loss, *gradients), naive, exact = (
            function(*given, *need)
            for function, given in (
                (linear_cross_entropy_fwd, arguments),
                (reference.linear_cross_entropy, arguments),
                (reference.linear_cross_entropy, exactly),
            )
        )
        assert (loss.dtype, loss.shape) == (naive[0].dtype, exact[0].shape)
        summing = 16 * torch.finfo(loss.dtype).eps * exact[0]
        assert (loss.double() - exact[0]).abs() <= 2 * (naive[0].double() - exact[0]).abs() + rounding + summing
        for a, n, e in zip(gradients, naive[1:], exact[1:], strict=True):
            assert_accurate(a, n, e, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("M", "N", "V"), [(1, 64, 591), (37, 48, 1000), (6, 16, 5003), (0, 8, 10)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(M: int, N: int, V: int, dtype: torch.dtype, with_bias: bool, device: str) -> None:
    _assert_accurate(_inputs(M, N, V, dtype, device, with_bias))


@pytest.mark.parametrize("V", [30522, 28996, 21128, 591])
def test_vocabularies_of_checkpoints(V: int, device: str) -> None:
    """None is a multiple of 64."""
    _assert_accurate(_inputs(5, 32, V, torch.float16, device))


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_and_pytorch(with_bias: bool) -> None:
    x, weight, bias, labels, ignore = _inputs(7, 4, 11, torch.float64, with_bias=with_bias)
    leaves = [t.requires_grad_() for t in (x, weight, bias) if t is not None]
    rest = [] if with_bias else [None]
    assert torch.autograd.gradcheck(
        lambda *a: linear_cross_entropy_fwd(*a, *rest, labels, ignore, True, True)[0], leaves
    )
    actual = functional.linear_cross_entropy(x, weight, bias, labels)
    expected = F.cross_entropy(F.linear(x, weight, bias), labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("frozen", [None, 0, 1, 2])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_all_gradients_in_all_dtypes(dtype: torch.dtype, frozen: int | None, loss_scale: float, device: str) -> None:
    """Of the mean, through autograd, with one input that needs none."""
    *leaves, labels, _ = _inputs(37, 24, 300, dtype, device)

    def gradients(function, dtype: torch.dtype) -> list[Tensor]:
        copies = [leaf.detach().to(dtype).requires_grad_(i != frozen) for i, leaf in enumerate(leaves)]
        loss = function(*copies, labels)
        (loss * loss_scale).backward()
        return [loss.detach(), *(copy.grad for copy in copies if copy.grad is not None)]

    def pytorch(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits if dtype == torch.float64 else logits.to(reference.accumulator(x)), labels)

    actual = gradients(functional.linear_cross_entropy, dtype)
    naive, exact = gradients(pytorch, dtype), gradients(pytorch, torch.float64)
    assert len(actual) == (4 if frozen is None else 3)
    for a, n, e in zip(actual, naive, exact, strict=True):
        assert_accurate(a, n, e, factor=4.0)


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how many rows of logits exist at a time."""
    arguments = _inputs(29, 6, 17, torch.float32)
    whole = linear_cross_entropy_fwd(*arguments, True, True)
    for module in (_cpu, cross_entropy):
        monkeypatch.setattr(module, "LOGITS", 5 * 17)
    torch.testing.assert_close(linear_cross_entropy_fwd(*arguments, True, True), whole, atol=1e-5, rtol=1e-5)
    _assert_accurate(_inputs(29, 6, 17, torch.bfloat16))
    monkeypatch.setattr(reference, "_row_chunks", lambda rows, vocabulary: [slice(0, 5), slice(5, 6), slice(6, 29)])
    in_chunks = reference.linear_cross_entropy(*arguments, True, True)
    torch.testing.assert_close(in_chunks, whole, atol=1e-5, rtol=1e-5)


def test_chunks_cover_all_rows() -> None:
    for rows, vocabulary in ((1, 10), (5000, 30522), (4397, 30522), (3, 2**30), (100_000, 30522), (0, 10)):
        for chunks in (reference._row_chunks(rows, vocabulary), cross_entropy._row_chunks(rows, vocabulary)):
            assert [i for c in chunks for i in range(*c.indices(rows))] == list(range(rows))
        for chunk in cross_entropy._row_chunks(rows, vocabulary):
            assert (chunk.stop - chunk.start) * vocabulary <= cross_entropy.LOGITS or chunk.stop - chunk.start == 1


def test_logits_of_all_rows_never_exist_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most a chunk of logits, and nothing of their size in float32."""
    for module in (_cpu, cross_entropy):
        monkeypatch.setattr(module, "LOGITS", 4 * 400)
    x, weight, bias, labels, _ = _inputs(40, 8, 400, torch.bfloat16)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    launcher = cross_entropy._launch_fwd if INTERPRETED else _cpu.linear_cross_entropy
    with Watch():
        launcher(x, weight, bias, labels, -100, True, True)
    assert max(largest) < 40 * 400 / 2


def test_num_items_and_ignored_rows() -> None:
    x, weight, bias, labels, _ = _inputs(9, 4, 11, torch.float64)
    counted = int((labels != -100).sum())
    assert 0 < counted < 9
    mean = functional.linear_cross_entropy(x, weight, bias, labels)
    torch.testing.assert_close(
        functional.linear_cross_entropy(x, weight, bias, labels, num_items=100), mean * counted / 100
    )
    other = torch.where(labels == -100, 10, labels)
    torch.testing.assert_close(
        functional.linear_cross_entropy(x, weight, bias, labels.where(labels != -100, 7), ignore_index=7),
        F.cross_entropy(F.linear(x, weight, bias), labels.where(labels != -100, 7), ignore_index=7),
    )
    assert functional.linear_cross_entropy(x, weight, bias, other) != mean
    assert functional.linear_cross_entropy(x, weight, bias, torch.full((9,), -100)).isnan()


def test_an_ignored_row_changes_no_gradient(device: str) -> None:
    """Whatever it holds: its dlogits are zeros, not what was in the memory."""
    x, weight, bias, labels, ignore = _inputs(9, 16, 600, torch.float32, device)
    _, dx, dweight, dbias = linear_cross_entropy_fwd(x, weight, bias, labels, ignore, True, True)
    counted = labels != -100
    assert (dx[~counted] == 0).all()
    assert (dx[counted] != 0).any(-1).all()
    alone = linear_cross_entropy_fwd(x[counted], weight, bias, labels[counted], ignore, True, True)
    torch.testing.assert_close((dweight, dbias), alone[2:], atol=1e-5, rtol=1e-5)


def test_a_label_out_of_range_is_never_a_number(device: str) -> None:
    x, weight, bias, labels, ignore = _inputs(4, 8, 12, torch.float32, device)
    for wrong in (12, -1, 2**40):
        labels[0] = wrong
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"labels has {wrong}, not in \[0, 12\)"):
                functional.linear_cross_entropy(x, weight, bias, labels)
        if device == "cuda" or INTERPRETED:
            assert linear_cross_entropy_fwd(x, weight, bias, labels, ignore, False, False)[0].isnan()


def test_large_logits_and_no_number(device: str) -> None:
    """Their exponentials would be infinite."""
    x, weight, bias, labels, ignore = _inputs(6, 16, 700, torch.float32, device)
    _assert_accurate([x * 1000, weight, bias, labels, ignore])
    x[0, 0] = float("nan")
    assert linear_cross_entropy_fwd(x, weight, bias, labels, ignore, False, False)[0].isnan()


def test_two_runs_are_bitwise_equal(device: str) -> None:
    arguments = [*_inputs(40, 24, 700, torch.bfloat16, device), True, True]
    for first, second in zip(linear_cross_entropy_fwd(*arguments), linear_cross_entropy_fwd(*arguments), strict=True):
        assert torch.equal(first, second)


@given(
    M=st.integers(0, 20),
    N=st.integers(1, 40),
    V=st.integers(2, 5000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    columns=st.integers(0, 3),
)
@settings(max_examples=12, deadline=None)
def test_any_size(M: int, N: int, V: int, dtype: torch.dtype, columns: int) -> None:
    """Rows of x and weight as they lie in wider tensors, too."""
    torch.manual_seed(V)
    x, weight, *rest = _inputs(M, N, V, dtype)
    x, weight = (F.pad(t, (0, columns), value=float("nan"))[:, :N] for t in (x, weight))
    _assert_accurate([x, weight, *rest], needs=ALL[:1])


@given(shift=st.floats(-20, 20))
@settings(max_examples=20, deadline=None)
def test_a_constant_bias_changes_nothing(shift: float) -> None:
    x, weight, bias, labels, _ = _inputs(5, 8, 40, torch.float64)
    torch.testing.assert_close(
        functional.linear_cross_entropy(x, weight, bias + shift, labels),
        functional.linear_cross_entropy(x, weight, bias, labels),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rescale_does_not_round_the_factor(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(33, 70, device=device).to(dtype)
    factor = torch.tensor(1 / 30000, device=device, dtype=reference.accumulator(x))  # float16 has 4 bits of it
    actual = rescale(x, factor)
    assert_accurate(actual, reference.rescale(x, factor), x.double() * factor.double(), factor=1.0)
    opcheck(rescale, [x, factor])


def test_registration() -> None:
    x, weight, bias, labels, ignore = _inputs(5, 8, 12, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    opcheck(linear_cross_entropy_fwd, [*leaves, labels, ignore, True, True])
    opcheck(linear_cross_entropy_fwd, [x.detach(), weight.detach(), None, labels, ignore, False, False])


@pytest.mark.plain
def test_compiles_into_one_graph() -> None:
    *leaves, labels, _ = _inputs(6, 8, 16, torch.float32)
    leaves = [t.requires_grad_() for t in leaves]
    compiled = torch.compile(functional.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = functional.linear_cross_entropy(*leaves, labels)
    torch.testing.assert_close(compiled(*leaves, labels), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves, labels), leaves), torch.autograd.grad(expected, leaves)
    )
