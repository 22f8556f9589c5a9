"""Vocabulary projection + cross-entropy of the labelled rows. PyTorch at its best takes those rows too, and eager
PyTorch as transformers has it, all rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Bench, Inputs, Provider, compiled
from bench.record import OURS, Work
from bench.rivals import liger_cross_entropy
from bench.shapes import VOCABULARY
from fastbert import functional

SHARE = 0.15  # of the tokens have a label


def _case(pass_: str, tokens: int, hidden: int, dtype: str, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    labelled = round(SHARE * tokens)
    return {
        "pass": pass_,
        "tokens": tokens,
        "labelled": labelled,
        "hidden": hidden,
        "vocabulary": vocabulary,
        "dtype": dtype,
    }


PASSES = ("forward", "both")  # Liger makes the gradients in its forward
SMALLEST = [_case(pass_, 40, 384, "float32", 591) for pass_ in PASSES]
GOALS = {"cuda": [_case(p, 65536, 1024, "bfloat16") for p in PASSES]}
CASES = {
    "cpu": [_case(p, 1024, 384, dtype) for dtype in ("float32", "bfloat16") for p in PASSES],
    "cuda": [
        _case(p, tokens, N, dtype)
        for dtype in ("bfloat16", "float16")
        for tokens in (65536, 16384)
        for N in (1024, 768)
        for p in PASSES
    ],
}


def all_rows(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias).float(), labels)


def labelled_rows(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x[rows], weight, bias).float(), labels[rows])


def liger(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return liger_cross_entropy(x[rows], weight, bias, labels[rows])


def fast(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
    return functional.linear_cross_entropy(x[rows], weight, bias, labels[rows])


def test_linear_cross_entropy(case: dict[str, Any], bench: Bench) -> None:
    M, N, V, n = case["tokens"], case["hidden"], case["vocabulary"], case["labelled"]
    dtype = getattr(torch, case["dtype"])

    def inputs() -> Inputs:
        leaves = torch.randn(M, N), torch.randn(V, N) * N**-0.5, torch.randn(V)
        rows = torch.randperm(M)[:n].sort().values
        labels = torch.full((M,), -100).index_put((rows,), torch.randint(0, V, (n,)))
        rest = labels.to(bench.device), rows.to(bench.device)
        return Inputs(tuple(t.to(bench.device, dtype) for t in leaves), rest)

    providers = {OURS: Provider(fast), "PyTorch": Provider(labelled_rows), "PyTorch, all rows": Provider(all_rows)}
    if bench.compiles:
        providers["torch.compile"] = Provider(compiled(labelled_rows, dynamic=False))
    if bench.device == "cuda":
        providers["Liger"] = Provider(liger, graph=False)
    passes = ("forward",) if case["pass"] == "forward" else ("forward", "dgrad", "wgrad")
    work = Work(flops=2 * n * V * N * len(passes), products=tuple((name, n, N, V) for name in passes))
    bench.operator("cross_entropy", case, providers, inputs, work, exact=labelled_rows)
