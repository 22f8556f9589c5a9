"""Calls of the launchers that between them take every configuration that a launcher, or `make tune`, can choose."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import tune
from bench.launches import DTYPES, Case
from fastbert import _library, functional  # noqa: F401  functional registers every operator
from fastbert.kernels import _attention_tiles, _launch, _product
from fastbert.kernels import embedding as embedding_module
from fastbert.kernels import layer_norm as layer_norm_module
from fastbert.kernels import linear_int8 as linear_int8_module


def attention(dtype: str, head_dim: int, seqlens: list[int], dropout_p: float, causal: bool = False) -> Case:
    T, H = sum(seqlens), 16 if head_dim in (16, 128, 256) else 12

    def launch() -> None:
        q, k, v = torch.empty(T, 3, H, head_dim, dtype=DTYPES[dtype]).unbind(1)
        cu_seqlens = torch.tensor([0, *seqlens]).cumsum(0).int()
        options = cu_seqlens, max(seqlens), head_dim**-0.5, causal, dropout_p, _seed(dropout_p), 3
        o, lse = _launcher("attention_fwd")(q, k, v, *options)
        _launcher("attention_bwd")(torch.empty_like(o), q, k, v, o, lse, *options)

    return Case("attention", dtype, launch, head_dim == 64 and seqlens[1:] in ([128] * 2, [512] * 2) and not causal)


def attention_cases() -> Iterator[Case]:
    """Lengths: one for each tile that shortens with the sequence, and 512. Dropout costs registers, so mostly with."""
    for dtype, head_dim, lengths in (
        ("bf16", 64, (16, 32, 64, 128, 512)),
        ("bf16", 128, (16, 32, 64, 512)),
        ("bf16", 256, (16, 32, 64, 512)),
        ("bf16", 16, (512,)),
        ("bf16", 26, (32, 512)),
        ("bf16", 32, (32, 512)),
        ("bf16", 80, (32, 512)),
        ("fp16", 64, (512,)),
        ("fp32", 64, (16, 32, 512)),
        ("fp32", 128, (16, 32, 512)),
        ("fp32", 256, (16, 32, 512)),
        ("tf32", 64, (128, 512)),
        ("tf32", 128, (512,)),
        ("tf32", 256, (512,)),
    ):
        yield from (attention(dtype, head_dim, [L] * 3, 0.1) for L in lengths)
    yield from (attention("bf16", head_dim, [512] * 3, 0.0) for head_dim in (64, 128, 256))
    yield from (attention(dtype, 64, [L] * 3, 0.0) for dtype, L in (("bf16", 128), ("fp32", 512)))
    yield from (attention("bf16", 64, [L] * 3, 0.1, causal=True) for L in (128, 512))
    yield from (attention("bf16", 64, [L, *[1] * 15], 0.1) for L in (128, 512))  # ragged


def layer_norm(
    dtype: str,
    N: int,
    dropout_p: float,
    residual: torch.dtype | None,
    weights: torch.dtype,
    usual: bool = False,
    subset: bool = False,
) -> Case:
    M = 4099

    def launch() -> None:
        x = torch.empty(M, N, dtype=DTYPES[dtype])
        h = None if residual is None else x.to(residual)
        weight, bias = torch.empty(2, N, dtype=weights)
        x_bias = None if residual is None else torch.empty(N, dtype=weights)
        dropout = dropout_p, _seed(dropout_p), 3, torch.arange(M) if subset else None
        y, mean, rstd = _launcher("layer_norm_fwd")(x, x_bias, h, weight, bias, 1e-12, *dropout)
        _launcher("layer_norm_bwd")(torch.empty_like(y), x, x_bias, h, weight, mean, rstd, *dropout)

    return Case("layer_norm", dtype, launch, usual)


def layer_norm_cases() -> Iterator[Case]:
    """After a layer's products: with bias and residual; in the last layer, of a subset of the rows. In a head: without.

    Under autocast weights are float32.
    """
    for dtype, sizes in (
        ("bf16", (128, 256, 312, 384, 512, 768, 1024, 1536, 2048, 2560, 4096, 8192)),
        ("fp32", (768, 1024, 8192)),
        ("fp16", (768,)),
    ):
        same = DTYPES[dtype]
        yield from (layer_norm(dtype, N, 0.1, same, same, usual=N == 768) for N in sizes)
    yield from (layer_norm(dtype, 768, 0.0, DTYPES[dtype], DTYPES[dtype]) for dtype in ("bf16", "fp32"))
    yield from (layer_norm("bf16", N, 0.1, torch.bfloat16, torch.bfloat16, subset=True) for N in (768, 1024))
    yield layer_norm("bf16", 768, 0.0, None, torch.bfloat16)
    yield from (layer_norm("bf16", 768, 0.1, residual, torch.float32) for residual in (torch.bfloat16, torch.float32))


def embedding(dtype: str, N: int, dropout_p: float, types: int = 2, task_types: bool = False) -> Case:
    T = 4099

    def launch() -> None:
        ids = torch.zeros(4, T, dtype=torch.int64).unbind()
        tables = tuple(torch.empty(rows, N, dtype=DTYPES[dtype]) for rows in (512, 512, types, 3))
        if not task_types:
            ids, tables = (*ids[:3], None), (*tables[:3], None)
        weight, bias = torch.empty(2, N, dtype=DTYPES[dtype])
        dropout = dropout_p, _seed(dropout_p), 3
        y, mean, rstd = _launcher("embedding_fwd")(*ids, *tables, weight, bias, 0, 1e-12, *dropout)
        _launcher("embedding_bwd")(torch.empty_like(y), *ids, *tables, weight, mean, rstd, 0, *dropout)

    return Case("embedding", dtype, launch, N == 768 and dropout_p > 0 and types == 2 and not task_types)


def embedding_cases() -> Iterator[Case]:
    for dtype, sizes in (
        ("bf16", (256, 312, 384, 768, 1024, 4096)),
        ("fp32", (768, 4096)),
        ("fp16", (768,)),
    ):
        yield from (embedding(dtype, N, 0.1) for N in sizes)
    yield embedding("bf16", 768, 0.0)
    yield from (embedding("bf16", 768, 0.1, types) for types in (1, 4, 16))
    yield embedding("bf16", 768, 0.1, task_types=True)


def gelu(dtype: str, approximate: str, N: int, keep_y: bool = True, usual: bool = False) -> Case:
    def launch() -> None:
        x, weight, bias = (torch.empty(*shape, dtype=DTYPES[dtype]) for shape in ((4099, 16), (N, 16), (N,)))
        pre = torch.empty(4099, N, dtype=DTYPES[dtype])
        _launcher("linear_gelu_fwd")(x, weight, bias, approximate, False)
        _launcher("gelu_bwd")(pre, pre, approximate, keep_y)

    return Case("ffn", dtype, launch, usual)


def gelu_cases() -> Iterator[Case]:
    for dtype, N in (("bf16", 3072), ("bf16", 4096), ("bf16", 1030), ("fp16", 3072), ("fp32", 3072)):
        yield from (gelu(dtype, form, N, usual=N == 3072 and form == "none") for form in ("none", "tanh"))
    yield gelu("bf16", "none", 3072, keep_y=False)


def cross_entropy(dtype: str, V: int, with_bias: bool = True, gradients: bool = True, usual: bool = False) -> Case:
    def launch() -> None:
        x, weight, bias = (torch.empty(*shape, dtype=DTYPES[dtype]) for shape in ((3, 16), (V, 16), (V,)))
        labels = torch.zeros(3, dtype=torch.int64)
        rest = labels, -100, gradients, gradients
        _, dx, *_ = _launcher("linear_cross_entropy_fwd")(x, weight, bias if with_bias else None, *rest)
        _launcher("rescale")(dx, torch.ones(()))

    return Case("cross_entropy", dtype, launch, usual)


def cross_entropy_cases() -> Iterator[Case]:
    for dtype, V in (("bf16", 30522), ("bf16", 30528), ("bf16", 591), ("fp16", 30522), ("fp32", 30522)):
        yield cross_entropy(dtype, V, usual=V == 30522)
    yield cross_entropy("bf16", 30522, with_bias=False)
    yield cross_entropy("bf16", 30522, gradients=False)


def product(dtype: str, activation: str | None, keep_pre: bool, aligned: bool = True, usual: bool = False) -> Case:
    """With all tiles that `make tune` tries, and those of a call of the kernel itself."""

    def launch() -> None:
        K = 768 if aligned else 769
        x, weight, bias = (torch.empty(*shape, dtype=DTYPES[dtype]) for shape in ((4099, K), (3072, K), (3072,)))
        chip = _launch.chip(x.device)
        tiles = tune.product_tiles(chip) if aligned and x.element_size() == 2 else []
        for it in dict.fromkeys([_product.default_tiles(x.dtype, chip), *tiles]):
            _product.launch(x, weight, bias, activation, keep_pre, it)

    return Case("linear", dtype, launch, usual)


def product_cases() -> Iterator[Case]:
    yield product("bf16", "none", keep_pre=True, usual=True)
    yield product("bf16", "none", keep_pre=False)
    yield product("bf16", "tanh", keep_pre=True)
    yield product("bf16", None, keep_pre=False, usual=True)
    yield product("bf16", "none", keep_pre=True, aligned=False)
    yield product("fp16", "none", keep_pre=True)
    yield from (product(dtype, "none", keep_pre=True) for dtype in ("fp32", "tf32"))


def linear_int8(dtype: str, gelu: str | None, K: int = 768, usual: bool = False) -> Case:
    """With all tiles that `make tune` tries, and those of a call where nothing was measured."""

    def launch() -> None:
        x, weight = (torch.empty(rows, K, dtype=torch.int8) for rows in (4099, 3072))
        scales, out = (torch.empty(rows) for rows in (4099, 3072)), DTYPES[dtype]
        x_scale, weight_scale = scales
        for tiles in tune.int8_tiles(_launch.chip(x.device)):
            with mock.patch.object(linear_int8_module, "default_tiles", lambda _chip, tiles=tiles: tiles):
                _launcher("linear_int8_fwd")(x, x_scale, weight, weight_scale, torch.empty(3072, dtype=out), gelu, out)

    return Case("linear_int8", dtype, launch, usual)


def quantize(dtype: str, N: int, usual: bool = False) -> Case:
    def launch() -> None:
        x, residual = torch.empty(2, 4099, N, dtype=DTYPES[dtype]).unbind()
        x_bias, weight, bias = torch.empty(3, N, dtype=DTYPES[dtype]).unbind()
        for gelu in (None, "none"):
            _launcher("quantize_rows_fwd")(x, gelu)
        _launcher("layer_norm_int8_fwd")(x, x_bias, residual, weight, bias, 1e-12)

    return Case("quantize", dtype, launch, usual)


def int8_cases() -> Iterator[Case]:
    yield linear_int8("bf16", None, usual=True)
    yield linear_int8("bf16", "none")
    yield linear_int8("bf16", None, K=770)
    yield from (quantize("bf16", N, usual=N == 768) for N in (384, 768, 1024, 3072, 4096))
    yield quantize("fp32", 768)


def tuned(case: Case, module: ModuleType, attribute: str, answers: Callable[[], list[Any]]) -> Case:
    """A case with each of some answers in the place of the launcher's own, as `make tune` tries them."""

    def launch() -> None:
        for answer in answers():
            with mock.patch.object(module, attribute, answer):
                case.launch()

    return case._replace(launch=launch, usual=False)


def _tiles_of(pass_: str, head_dim: int) -> list[Callable[..., _launch.Blocks]]:
    current = _attention_tiles.blocks

    def answer(tile: _launch.Blocks, of: str, *rest: Any) -> _launch.Blocks:
        return tile if of == pass_ else current(of, *rest)

    return [partial(answer, tile) for tile in tune.attention_tiles(_launch.chip(torch.device("cpu")), pass_, head_dim)]


def tuned_cases() -> Iterator[Case]:
    """What `make tune` tries beside what is chosen now; its products are among `product_cases`."""
    for (pass_, head_dim), dropout_p in itertools.product(tune.TILED, (0.0, 0.1)):
        longest = 64 if pass_ == "one_block" else 512
        case = attention("bf16", head_dim, [longest] * 3, dropout_p)
        yield tuned(case, _attention_tiles, "blocks", partial(_tiles_of, pass_, head_dim))
    for module, attribute, N in tune.PAIRED:
        same = torch.bfloat16
        case = layer_norm("bf16", N, 0.1, same, same) if module is layer_norm_module else embedding("bf16", N, 0.1)
        yield tuned(case, module, attribute, partial(tune.pairs, module, attribute, N))
    for chunk in tune.CHUNKS:
        yield tuned(embedding("bf16", 768, 0.1), embedding_module, "CHUNK", partial(list, (chunk,)))


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    attention_cases,
    layer_norm_cases,
    embedding_cases,
    gelu_cases,
    cross_entropy_cases,
    product_cases,
    tuned_cases,
    int8_cases,
)


def _launcher(name: str) -> Callable[..., Any]:
    return _library._SIDES[name]["cuda"]


def _seed(dropout_p: float) -> Tensor | None:
    return torch.tensor(5) if dropout_p > 0 else None


def all_cases(operator: str | None = None, dtype: str | None = None) -> list[Case]:
    cases = (case for some in CASES for case in some())
    return [case for case in cases if operator in (None, case.operator) and dtype in (None, case.dtype)]
