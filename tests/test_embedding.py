"""embedding_fwd, embedding_bwd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import functional, reference
from fastbert.kernels import embedding as kernels
from fastbert.kernels.embedding import embedding_bwd, embedding_fwd
from tests.optional import given, settings, st
from tests.oracle import assert_operator_accurate, far_rows, opcheck

pytestmark = pytest.mark.kernel
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


ROWS = (40, 9, 2, 3)  # of the word, position, token type and task type tables
IDS = {  # of T tokens in a table of n rows
    "many repeat": lambda T, n: torch.randint(0, n, (T,)),
    "one is everywhere": lambda T, n: torch.where(torch.rand(T) < 0.9, n - 1, torch.randint(0, n, (T,))),
    "in order": lambda T, n: torch.arange(T) % n,
    "runs": lambda T, n: (torch.arange(T) // 32) % n,
    "nothing but padding": lambda T, n: torch.zeros(T, dtype=torch.int64),
}


def _inputs(
    T: int,
    N: int,
    dtype: torch.dtype,
    device: str,
    dropout_p: float = 0.0,
    padding_idx: int = 0,
    task_types: bool = False,
    ids: str = "many repeat",
) -> list:
    chosen = [IDS[ids](T, n).to(device) for n in ROWS]
    tables = [torch.randn(n, N, device=device).to(dtype) for n in ROWS]
    if not task_types:
        chosen[3] = tables[3] = None
    weight, bias = torch.randn(2, N, device=device).to(dtype)
    seed = torch.tensor(987654321, device=device) if dropout_p else None
    return [*chosen, *tables, weight, bias, padding_idx, 1e-12, dropout_p, seed, 3]


def _backward_inputs(forward: list) -> list:
    *tensors, _bias, padding_idx, _eps, p, seed, stream = forward
    y, mean, rstd = reference.embedding(*forward)
    return [torch.randn_like(y), *tensors, mean, rstd, padding_idx, p, seed, stream]


def _check_accuracy(forward: list) -> None:
    assert_operator_accurate(embedding_fwd, reference.embedding, forward)
    backward = _backward_inputs(forward)
    assert_operator_accurate(embedding_bwd, reference.embedding_backward, backward, factor=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "N", "task_types"), [(1, 768, False), (37, 1024, True), (33, 100, True), (0, 16, False)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.usefixtures("poisoned_allocations")
def test_accuracy(T: int, N: int, task_types: bool, dtype: torch.dtype, dropout_p: float, device: str) -> None:
    _check_accuracy(_inputs(T, N, dtype, device, dropout_p, task_types=task_types))


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(("T", "padding_idx"), [(31, 0), (64, 39), (101, -1)])
@pytest.mark.usefixtures("poisoned_allocations")
def test_runs_of_ids(ids: str, T: int, padding_idx: int, device: str) -> None:
    """Within a chunk of sorted ids, over its borders, to the very last token."""
    _check_accuracy(_inputs(T, 24, torch.float32, device, padding_idx=padding_idx, ids=ids))


@pytest.mark.usefixtures("poisoned_allocations")
def test_a_run_over_many_chunks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are joined in one step; and the same id as padding, which gets nothing."""
    monkeypatch.setattr(kernels, "CHUNK", 4)
    forward = _inputs(90, 16, torch.float32, device, padding_idx=39, ids="one is everywhere")
    _check_accuracy(forward)
    assert not embedding_bwd(*_backward_inputs(forward))[0][39].any()
    forward[10] = -1
    dword, *_ = embedding_bwd(*_backward_inputs(forward))
    assert dword[39].all()


@given(st.integers(0, 80), st.integers(8, 90), st.sampled_from(DTYPES[1:]), st.sampled_from(sorted(IDS)), st.booleans())
@settings(max_examples=8, deadline=None)
def test_accuracy_of_anything(T: int, N: int, dtype: torch.dtype, ids: str, task_types: bool) -> None:
    torch.manual_seed(N)  # for an example to be the same when it is run again
    forward = _inputs(T, N, dtype, "cpu", 0.2, task_types=task_types, ids=ids)
    forward[4] += 3.0  # a mean that happens to be near 0 has no accuracy to speak of
    _check_accuracy(forward)


def test_rows_of_a_wider_table(device: str) -> None:
    forward = _inputs(20, 48, torch.float32, device, task_types=True)
    for i in range(4, 8):
        forward[i] = torch.cat((forward[i], *[torch.full_like(forward[i], float("nan"))] * i), dim=1)[:, :48]
    _check_accuracy(forward)


def test_offsets_beyond_32_bits() -> None:
    forward = _inputs(9, 32, torch.float16, "cpu", ids="in order")
    forward[6] = torch.randn(4, 32).half()
    forward[2] = forward[2] + 2
    expected = embedding_fwd(*forward)
    forward[6] = far_rows(forward[6])
    for actual, e in zip(embedding_fwd(*forward), expected, strict=True):
        assert torch.equal(actual, e)


@pytest.mark.plain
def test_two_runs_are_bitwise_equal(device: str) -> None:
    forward = _inputs(80, 64, torch.float32, device, 0.1, task_types=True)
    backward = _backward_inputs(forward)
    for first, second in zip(embedding_bwd(*backward), embedding_bwd(*backward), strict=True):
        assert torch.equal(first, second)


@pytest.mark.plain
@pytest.mark.parametrize("dropout_p", [0.0, 0.3, 1.0])
def test_gradcheck(dropout_p: float) -> None:
    arguments = _inputs(7, 5, torch.float64, "cpu", dropout_p, padding_idx=-1, task_types=dropout_p > 0)
    tensors = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    assert torch.autograd.gradcheck(lambda *a: embedding_fwd(*a)[0], tensors)


def test_registration() -> None:
    for dropout_p, task_types in ((0.0, False), (0.1, True)):
        forward = _inputs(6, 16, torch.float32, "cpu", dropout_p, task_types=task_types)
        opcheck(embedding_bwd, _backward_inputs(forward))
        for a in forward[4:10]:
            if a is not None:
                a.requires_grad_()
        opcheck(embedding_fwd, forward)


def test_equals_pytorch() -> None:
    ids, positions, types, _, word, position, token_type, _, weight, bias, *_ = _inputs(50, 24, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (word, position, token_type, weight, bias)]
    h = F.embedding(ids, word, padding_idx=0) + F.embedding(positions, position) + F.embedding(types, token_type)
    expected = F.layer_norm(h, (24,), weight, bias, 1e-12)
    actual = functional.embedding(ids, positions, types, *leaves, padding_idx=0)
    torch.testing.assert_close(actual, expected)
    dy = torch.randn_like(expected)
    actual_gradients, expected_gradients = (torch.autograd.grad(y, leaves, dy) for y in (actual, expected))
    torch.testing.assert_close(actual_gradients, expected_gradients)
    assert (ids == 0).any()
    assert (actual_gradients[0][0] == 0).all()


def test_leading_dimensions_and_narrow_ids() -> None:
    ids, positions, types, _, *rest = _inputs(12, 8, torch.float32, "cpu")[:10]
    tables = [t for t in rest if t is not None]
    flat = functional.embedding(ids, positions, types, *tables)
    shaped = functional.embedding(*(t.view(3, 4).int() for t in (ids, positions, types)), *tables)
    assert torch.equal(shaped, flat.view(3, 4, 8))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("N", [40, 64])
@pytest.mark.usefixtures("poisoned_allocations")
def test_type_tables_of_any_size(rows: int, N: int, device: str) -> None:
    """Small ones are summed in registers, by more tokens than there are programs; the last row does not occur."""
    forward = _inputs(37, N, torch.float32, device, task_types=True)
    forward[2] = torch.randint(0, max(1, rows - 1), (37,), device=device)
    forward[6] = torch.randn(rows, N, device=device)
    _check_accuracy(forward)
    _, _, dtoken_type, *_ = embedding_bwd(*_backward_inputs(forward))
    assert dtoken_type.shape == (rows, N)
    assert rows == 1 or not dtoken_type[-1].any()


@pytest.mark.parametrize("N", [768, 1024])
@pytest.mark.usefixtures("poisoned_allocations")
def test_four_types_at_usual_sizes(N: int, device: str) -> None:
    forward = _inputs(11, N, torch.float32, device)
    forward[2], forward[6] = torch.arange(11, device=device) % 4, torch.randn(4, N, device=device)
    _check_accuracy(forward)


def test_wide_rows_sort_their_types(device: str) -> None:
    _check_accuracy(_inputs(3, 4096, torch.float32, device, 0.1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_another_dtype(dtype: torch.dtype, device: str) -> None:
    forward = _inputs(21, 48, torch.float32, device, 0.1)
    for i in range(4, 7):
        forward[i] = forward[i].to(dtype)
    _check_accuracy(forward)
    y, mean, _ = embedding_fwd(*forward)
    assert (y.dtype, mean.dtype) == (dtype, torch.float32)
