"""Attention on a CPU: in C++ and by PyTorch, on any number of threads, after a fork."""

import subprocess
import sys
from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from fastbert import reference
from fastbert.kernels import _attention_cpu
from fastbert.kernels.attention import attention_bwd, attention_fwd
from tests.optional import needs
from tests.oracle import assert_operator_accurate

SEQLENS = [[1, 13, 0, 64, 57, 2], [200, 1, 130], [55, 56, 57, 113], []]
FLAGS = [(False, 0.0), (True, 0.0), (False, 0.1), (True, 0.6), (False, 1.0)]  # causal, dropout_p


def _inputs(seqlens: list[int], D: int, causal: bool, dropout_p: float, dtype: torch.dtype = torch.float32) -> list:
    q, k, v = torch.randn(sum(seqlens), 3, 3, D).to(dtype).unbind(1)
    cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32)
    seed = torch.randint(1 << 62, ()) if dropout_p else None
    return [q, k, v, cu_seqlens, max(seqlens, default=0), D**-0.5, causal, dropout_p, seed, 7]


def _all(forward: list, do: Tensor) -> tuple[Tensor, ...]:
    o, lse = attention_fwd(*forward)
    return o, lse, *attention_bwd(do, *forward[:3], o, lse, *forward[3:])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("extension", [pytest.param(True, marks=needs("fastbert._C")), False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("causal", "dropout_p"), FLAGS)
@pytest.mark.parametrize("seqlens", SEQLENS, ids=str)
def test_with_and_without_the_extension(
    extension: bool,
    dtype: torch.dtype,
    causal: bool,
    dropout_p: float,
    seqlens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every gradient too, for heads of odd and of even sizes."""
    if not extension:
        monkeypatch.setattr(_attention_cpu, "_C", None)
    D = (7, 16, 32, 40, 64, 100)[int(torch.randint(6, ()))]
    forward = _inputs(seqlens, D, causal, dropout_p, dtype)

    def output(*inputs: object) -> Tensor:
        return attention_fwd(*inputs)[0]

    def exact(*inputs: object) -> Tensor:
        return reference.attention(*inputs)[0]

    assert_operator_accurate(output, exact, forward, naive=exact)
    o, lse = reference.attention(*forward)
    backward = [torch.randn_like(o), *forward[:3], o, lse, *forward[3:]]
    assert_operator_accurate(
        attention_bwd, reference.attention_backward, backward, naive=reference.attention_backward, factor=4.0
    )


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("causal", "dropout_p"), FLAGS)
def test_the_same_bits_on_any_number_of_threads(causal: bool, dropout_p: float) -> None:
    forward = _inputs([40, 1, 130, 7, 0, 64], 32, causal, dropout_p)
    do = torch.randn_like(forward[0])
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(_all(forward, do))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs("fastbert._C")
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_has_the_same_bits_in_any_batch(causal: bool) -> None:
    """But for dropout, whose masks depend on where in the batch a token stands."""
    seqlens = [40, 1, 130, 7]
    forward = _inputs(seqlens, 32, causal, 0.0)
    do = torch.randn_like(forward[0])
    together = _all(forward, do)
    for start, end in pairwise([0, *accumulate(seqlens)]):
        cu_seqlens = torch.tensor([0, end - start], dtype=torch.int32)
        alone = _all([*(t[start:end] for t in forward[:3]), cu_seqlens, end - start, *forward[5:]], do[start:end])
        for i, (a, b) in enumerate(zip(alone, together, strict=True)):
            assert torch.equal(a, b[:, start:end] if i == 1 else b[start:end])


@needs("fastbert._C")
@pytest.mark.parametrize("bounds", [[0, 5], [1, 9], [0, 7, 5, 9], [0, 12], [-1, 9]])
def test_sequences_that_are_none_are_refused(bounds: list[int]) -> None:
    q, k, v, _, *rest = _inputs([9], 16, False, 0.0)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of tokens"):
        attention_fwd(q, k, v, torch.tensor(bounds, dtype=torch.int32), *rest)


_FORKS = """
import os, sys, torch
from fastbert.kernels.attention import attention_bwd, attention_fwd
torch.set_num_threads(2)
x = torch.randn(600, 600)
x @ x, (x * 2).sum()  # PyTorch has its threads, and in the child would wait for them as well
q, k, v = torch.randn(177, 3, 3, 32).unbind(1)
rest = torch.tensor([0, 40, 170, 177], dtype=torch.int32), 130, 0.2, False, 0.1, torch.tensor(5), 7
child = os.fork()
o, lse = attention_fwd(q, k, v, *rest)
total = sum(float(abs(t.numpy()).sum()) for t in attention_bwd(o, q, k, v, o, lse, *rest))
os.write(1, f"{total}\\n".encode())  # a whole line: print may write the number and the line's end apart
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs("fastbert._C")
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_a_forked_process_does_not_hang() -> None:
    """Threads that a process has do not come along into its children, and it may be PyTorch that made them."""
    done = subprocess.run([sys.executable, "-c", _FORKS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second
