"""This machine's ceilings: a copy, plain matrix products, also at BERT's own shapes, and what a launch costs.

Every other bench is quoted as a share of these, measured in the same run (PyTorch: a copy, cuBLAS or oneDNN), before,
between and after the others (`bench/ceilings.py`).
"""

from itertools import product
from typing import Any

import torch

from bench.harness import Bench, Ready
from bench.record import Work
from bench.shapes import VOCABULARY

LAUNCHES = 200


def _copy(bytes_: int) -> dict[str, Any]:
    return {"what": "copy", "bytes": bytes_}


def _product(pass_: str, tokens: int, K: int, N: int, dtype: str) -> dict[str, Any]:
    return {"what": "product", "pass": pass_, "tokens": tokens, "in": K, "out": N, "dtype": dtype}


def _products(tokens: tuple[int, ...], hidden: tuple[int, ...], dtypes: tuple[str, ...]) -> list[dict[str, Any]]:
    """An encoder's: query, key and value in one, the output projection, both of the feed-forward."""
    return [
        _product(pass_, M, K, N, dtype)
        for dtype, M, n in product(dtypes, tokens, hidden)
        for K, N in ((n, 3 * n), (n, n), (n, 4 * n), (4 * n, n))
        for pass_ in ("forward", "dgrad", "wgrad")
    ]


def _vocabularies(labelled: int, dtype: str) -> list[dict[str, Any]]:
    """A masked-LM head's: of BERT's columns; of those in rows of the next multiple of 64; and of so many columns."""
    wide = -(-VOCABULARY // 64) * 64
    return [
        _product(pass_, labelled, hidden, columns, dtype) | pitch
        for hidden in (768, 1024)
        for columns, pitch in ((VOCABULARY, {}), (VOCABULARY, {"pitch": wide}), (wide, {}))
        for pass_ in ("forward", "dgrad", "wgrad")
    ]


SMALLEST = [
    _copy(1 << 20),
    _product("square", 256, 256, 256, "float32"),
    *(_product(pass_, 64, 384, 1536, "float32") for pass_ in ("forward", "dgrad", "wgrad")),
    *(_product(pass_, 64, 384, 1530, "float32") | {"pitch": 1536} for pass_ in ("forward", "dgrad", "wgrad")),
    {"what": "launch", "how": "eager"},
]
GOALS = {
    "cpu": [_copy(256 << 20), *(_product("square", 2048, 2048, 2048, dtype) for dtype in ("float32", "bfloat16"))],
    "cuda": [
        _copy(2 << 30),
        *(_product("square", 8192, 8192, 8192, dtype) for dtype in ("bfloat16", "float16")),
        *_products((16384,), (768, 1024), ("bfloat16",)),
        *_vocabularies(9830, "bfloat16"),  # 15 % of 65536
        *_products((65536,), (768, 1024), ("bfloat16",)),
        {"what": "launch", "how": "eager"},
        {"what": "launch", "how": "graph"},
    ],
}
CASES = {
    "cpu": [
        *GOALS["cpu"],
        *_products((2048,), (384, 768), ("float32", "bfloat16")),
        {"what": "launch", "how": "eager"},
    ],
    "cuda": [
        *GOALS["cuda"],
        *(_copy(1 << n) for n in (24, 27)),
        _product("square", 8192, 8192, 8192, "float32"),
        *_products((16384, 65536), (768, 1024), ("float16",)),
    ],
}


def test_roof(case: dict[str, Any], bench: Bench) -> None:
    ready, work = make(case, bench.device)
    bench.steps("roof", case, {"PyTorch": lambda: ready}, work)


def make(case: dict[str, Any], device: str) -> tuple[Ready, Work]:
    return {"copy": _ready_copy, "product": _ready_product, "launch": _ready_launch}[case["what"]](case, device)


def _ready_copy(case: dict[str, Any], device: str) -> tuple[Ready, Work]:
    source = torch.randn(case["bytes"] // 4, device=device)
    target = torch.empty_like(source)
    return Ready([lambda: target.copy_(source)]), Work(bytes=2 * source.nbytes)


def _ready_product(case: dict[str, Any], device: str) -> tuple[Ready, Work]:
    """x weight^T; or dy weight, the gradient of x; or dy^T x, the gradient of the weight."""
    M, K, N, dtype = case["tokens"], case["in"], case["out"], getattr(torch, case["dtype"])
    pitch = case.get("pitch", N)
    x, weight, dy = (torch.randn(shape, device=device).to(dtype) for shape in ((M, K), (N, K), (M, pitch)))
    dy = dy[:, :N]
    step = {
        "forward": (lambda: x @ weight.T) if pitch == N else lambda: torch.mm(x, weight.T, out=dy),
        "square": lambda: x @ weight.T,
        "dgrad": lambda: dy @ weight,
        "wgrad": lambda: dy.T @ x,
    }[case["pass"]]
    products = ((case["pass"], M, K, N),) if pitch == N else ()  # a ceiling is that of whole matrices
    return Ready([step], graph=True), Work(flops=2 * M * N * K, products=products)


def _ready_launch(case: dict[str, Any], device: str) -> tuple[Ready, Work]:
    """An operator on one element; on a GPU many, one after the other."""
    one = torch.ones((), device=device)
    return Ready([one.neg_] * LAUNCHES, graph=case["how"] == "graph"), Work()
