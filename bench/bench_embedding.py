"""Word + position + token type + LayerNorm + dropout."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Bench, Inputs, Provider, compiled
from bench.record import OURS, Work
from bench.shapes import VOCABULARY
from fastbert import functional


def _case(pass_: str, tokens: int, hidden: int, dtype: str, dropout: float) -> dict[str, Any]:
    return {"pass": pass_, "tokens": tokens, "hidden": hidden, "dtype": dtype, "dropout": dropout}


PASSES = ("forward", "backward")
SMALLEST = [_case(pass_, 7, 384, "float32", 0.0) for pass_ in PASSES]
CASES = {
    "cpu": [_case(p, 8192, N, "float32", 0.0) for N in (384, 768) for p in PASSES],
    "cuda": [
        _case(p, tokens, N, dtype, dropout)
        for dtype in ("bfloat16", "float16")
        for tokens in (65536, 16384)
        for N in (768, 1024)
        for dropout in (0.1, 0.0)
        for p in PASSES
    ],
}


def eager(
    word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor, *ids: Tensor, dropout_p: float
) -> Tensor:
    h = F.embedding(ids[0], word) + F.embedding(ids[2], token_type) + F.embedding(ids[1], position)
    h = F.layer_norm(h, (word.shape[1],), weight, bias, 1e-12)
    return F.dropout(h, dropout_p) if dropout_p else h


def fast(
    word: Tensor, position: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor, *ids: Tensor, dropout_p: float
) -> Tensor:
    return functional.embedding(*ids, word, position, token_type, weight, bias, dropout_p=dropout_p)


def _providers(bench: Bench, dropout_p: float) -> dict[str, Provider]:
    providers = {"PyTorch": Provider(partial(eager, dropout_p=dropout_p))}
    if bench.compiles:
        providers["torch.compile"] = Provider(compiled(partial(eager, dropout_p=dropout_p), dynamic=False))
    return {OURS: Provider(partial(fast, dropout_p=dropout_p))} | providers


def test_embedding(case: dict[str, Any], bench: Bench) -> None:
    T, N, dtype = case["tokens"], case["hidden"], getattr(torch, case["dtype"])

    def inputs() -> Inputs:
        ids = (torch.randint(0, VOCABULARY, (T,)), torch.arange(T) % 512, torch.arange(T) // 256 % 2)
        tables = (torch.randn(rows, N) for rows in (VOCABULARY, 512, 2))
        leaves = (*tables, *torch.randn(2, N).unbind())
        return Inputs(tuple(t.to(bench.device, dtype) for t in leaves), tuple(t.to(bench.device) for t in ids))

    # forward: a row of the word table and y; backward: dy, the row again, and the whole table's gradient
    rows = 2 * T if case["pass"] == "forward" else 2 * T + VOCABULARY
    bench.operator(
        "embedding",
        case,
        _providers(bench, case["dropout"]),
        inputs,
        Work(bytes=rows * N * dtype.itemsize),
        exact=partial(eager, dropout_p=0.0),
        check=_providers(bench, 0.0),
    )
