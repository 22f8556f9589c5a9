"""What `make tune` asks: which tiles, rows and programs the kernels should take, the most important question first.

A question is about one answer that a launcher looks up; candidates are tried in its place. `bench/answers.py` asks.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.record import Work
from bench.shapes import VOCABULARY, tokens_of
from fastbert import functional, reference
from fastbert.kernels import _attention_tiles, _launch, _product, attention, embedding, ffn, layer_norm, linear_int8
from fastbert.kernels._launch import Blocks
from fastbert.kernels._product import Product, Tiles, size_class

TOKENS = 65536

# Tiles by what drives the tensor cores, by pass and the largest head_dim, the likeliest winner first; `bench.codegen`
# finds no fault with any. With 128 x 128, or 4 warps, a thread spends fewer instructions on a score; 64 x 64, or 128
# registers, leave room for more programs beside one another.
_TILES = {
    "wgmma": {
        ("fwd", 64): "128x128 w8 s2, 128x64 w4 s2, 64x64 w4 s3, 128x128 w8 s3, 64x128 w4 s2, 128x64 w8 s3 r128,"
        " 128x64 w8 s2 r128, 64x64 w4 s3 r128, 256x64 w8 s3",
        ("dq", 64): "128x128 w8 s1, 128x64 w8 s2, 64x64 w4 s2, 128x128 w8 s2, 64x128 w4 s2, 128x64 w8 s2 r128",
        ("dkdv", 64): "64x128 w8 s2, 64x64 w4 s2, 32x128 w8 s2, 64x128 w8 s3, 64x128 w8 s1",
        ("one_block", 64): "64x64 w4 s1, 128x128 w8 s1",  # 64: what is longer takes two passes
        ("fwd", 128): "128x128 w8 s1, 128x128 w8 s2, 64x64 w4 s2, 128x64 w8 s3",
        ("dq", 128): "128x64 w8 s1, 128x64 w8 s2, 64x64 w4 s1",
        ("dkdv", 128): "32x128 w8 s2, 32x128 w8 s1",
    },
    "tcgen05": {
        ("fwd", 64): "128x128 w8 s2, 128x64 w8 s3, 128x64 w4 s2",
        ("dq", 64): "128x64 w8 s1, 128x128 w8 s1, 64x64 w4 s2",
        ("dkdv", 64): "64x64 w4 s2, 128x64 w8 s2, 64x128 w8 s1",
        ("fwd", 128): "128x64 w8 s3",
        ("dq", 128): "128x64 w8 s1",
        ("dkdv", 128): "32x128 w8 s2, 64x64 w8 s1",
    },
    "mma": {
        ("fwd", 64): "128x64 w4 s2, 64x64 w4 s2, 128x32 w4 s3, 64x32 w4 s3",
        ("dq", 64): "64x32 w4 s3, 64x64 w4 s1, 128x32 w8 s2",
        ("dkdv", 64): "64x32 w4 s1",
        ("fwd", 128): "128x32 w8 s2",
    },
}


def attention_tiles(chip: _launch.Chip, pass_: str, head_dim: int) -> list[Blocks]:
    """What is tried on a chip, beside what it takes now."""
    names = _TILES[chip.tensor_cores].get((pass_, head_dim), "")
    return [Blocks(*map(int, re.findall(r"\d+", name))) for name in names.split(",") if name]


TILED = sorted({asked for tiles in _TILES.values() for asked in tiles})
# By what is looked up and features: rows of a program, or programs on a multiprocessor; and warps of a program
_PAIRS: dict[tuple[str, int], tuple[tuple[int, int], ...]] = {
    ("rows_and_warps", 768): ((1, 1), (4, 1), (4, 2), (2, 2), (8, 4)),
    ("rows_and_warps", 1024): ((1, 1), (4, 2), (4, 1), (2, 2), (4, 4), (8, 4)),
    ("programs_and_warps", 768): ((6, 2), (4, 2), (4, 4)),
    ("programs_and_warps", 1024): ((6, 2), (8, 1), (5, 4), (4, 8)),
    ("_programs_and_warps", 768): ((6, 2), (8, 1), (5, 4)),
    ("_programs_and_warps", 1024): ((4, 4), (4, 8)),
}
PAIRED = [
    (module, attribute, N)
    for attribute, N in _PAIRS
    for module in (layer_norm, embedding)
    if hasattr(module, attribute) and (module is layer_norm or attribute != "programs_and_warps")
]
CHUNKS = 64, 16, 128
_FORMS = ("none", True), ("none", False)  # GELU and whether its input is kept: training, inference
_PLAIN_PRODUCTS = (1024, 3072), (768, 2304), (4096, 1024), (3072, 768), (1024, 1024), (768, 768)  # K and N
_INT8_PRODUCTS = (768, 2304), (768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024)
# Tiles of products, likewise: through TMA, and with pointers
_PRODUCT_TILES: dict[str, tuple[Tiles, ...]] = {
    "TMA": (
        Tiles(128, 128, 64, 4, 3, programs=2, PARTS=2),
        Tiles(128, 256, 64, 8, 4, PARTS=2),
        Tiles(128, 256, 64, 8, 3, PARTS=2),
        Tiles(128, 256, 64, 8, 4, PARTS=2, GROUP_M=16),
        Tiles(128, 128, 64, 8, 3, programs=2, PARTS=2),
        Tiles(256, 128, 64, 8, 3, PARTS=2),
        Tiles(128, 64, 64, 4, 4, programs=2),
    ),
    "pointers": (
        Tiles(128, 128, 64, 8, 3),
        Tiles(128, 128, 32, 8, 4),
        Tiles(128, 64, 32, 4, 4),
    ),
}


_INT8_TILES: dict[str, tuple[Tiles, ...]] = {
    "wgmma": (Tiles(128, 256, 128, 8, 3), Tiles(128, 128, 128, 4, 3), Tiles(128, 128, 64, 4, 4)),
    "tcgen05": (Tiles(128, 128, 64, 4, 3), Tiles(64, 128, 128, 4, 3)),
    "mma": (Tiles(128, 128, 64, 4, 3), Tiles(64, 128, 128, 4, 3), Tiles(128, 64, 64, 4, 4)),
}


def int8_tiles(chip: _launch.Chip) -> tuple[Tiles, ...]:
    """What is tried on a chip for a product of int8, what it takes now first."""
    return tuple(dict.fromkeys([linear_int8.default_tiles(chip), *_INT8_TILES[chip.tensor_cores]]))


def product_tiles(chip: _launch.Chip) -> tuple[Tiles, ...]:
    """What is tried on a chip."""
    return _PRODUCT_TILES["pointers" if chip.tensor_cores == "mma" else "TMA"]


class Candidate(NamedTuple):
    """What stands in the place of the launcher's answer while it is tried, and the line that makes it the answer."""

    replacement: Any
    line: str


class Ready(NamedTuple):
    """What is timed, and what it has to return."""

    step: Callable[[], tuple[Tensor, ...]]
    expected: Sequence[Tensor]


@dataclass(frozen=True)
class Question:
    """
    Attributes:
        module, attribute: what a launcher looks up.
        place: where a candidate's line belongs.
        candidates: by name, the current one first.
        ready: makes the tensors.
    """

    case: dict[str, Any]
    module: ModuleType
    attribute: str
    place: str
    candidates: dict[str, Candidate]
    ready: Callable[[], Ready]
    work: Work

    @property
    def current(self) -> str:
        return next(iter(self.candidates))


def questions(device: str, smallest: bool) -> list[Question]:
    """The most important first; on a CPU with a few tokens each.

    Args:
        device: "cuda", "cpu", or "meta": as on a GPU, on tensors that have no memory.
        smallest: with a few tokens on a GPU, too; only one question of a kind, with dropout where there is one, and one
            candidate beside the current one.
    """
    small = smallest or device == "cpu"
    attend, norm = partial(_attention, device, small), partial(_layer_norm, device, small)
    product, both = partial(_product_question, device, small), (0.0, 0.1)
    int8 = partial(_int8_question, device, small)
    asked = [
        *(attend("fwd", "512", p) for p in both),
        *(attend("one_block", "128", p) for p in both),
        *(attend(pass_, "512", p) for p in both for pass_ in ("dq", "dkdv")),
        *(attend("fwd", "128", p) for p in both),
        *(product(M, N, 4 * N, form, keep) for M in (65536, 16384) for N in (768, 1024) for form, keep in _FORMS),
        *(norm(pass_, N, 0.1) for pass_ in ("forward", "backward") for N in (768, 1024)),
        *(_embedding(device, small, what, N) for N in (768, 1024) for what in ("forward", "programs", "chunk")),
        *(attend(pass_, "wikipedia", 0.1) for pass_ in ("fwd", "dq", "dkdv")),
        *(attend(pass_, "512", 0.1, dtype="float16") for pass_ in ("fwd", "dq", "dkdv")),
        *(attend("fwd", "128", p, head_dim=32) for p in both),
        attend("one_block", "128", 0.1, head_dim=32),
        *(product(M, *shape, None, False) for M in (65536, 16384) for shape in _PLAIN_PRODUCTS),
        *(norm("forward", N, 0.0) for N in (768, 1024)),
        attend("fwd", "squad", 0.0),
        *(int8(M, *shape, None) for M in (65536, 16384) for shape in _INT8_PRODUCTS),
        *(attend(pass_, "512", 0.1, head_dim=128) for pass_ in ("fwd", "dq", "dkdv")),
    ]
    if not smallest:
        return asked
    kinds: dict[str, Question] = {}
    for it in sorted(asked, key=lambda it: it.case["dropout"] == 0):
        two = dict(list(it.candidates.items())[:2])
        kinds.setdefault(it.case["what"], dataclasses.replace(it, candidates=two))
    return list(kinds.values())


def _attention(
    device: str, small: bool, pass_: str, lengths: str, dropout_p: float, dtype: str = "bfloat16", head_dim: int = 64
) -> Question:
    long = 65 if device == "cpu" else 129  # for two passes
    seqlens = [24 if lengths == "128" else long, 3] if small else tokens_of(lengths, TOKENS)
    T, H, longest = sum(seqlens), 1 if small else 1024 // head_dim, max(seqlens)
    width, chip, answer = max(64, head_dim), _launch.chip(_device(device)), _attention_tiles.blocks

    def ready() -> Ready:
        qkv = _random(T, 3, H, head_dim, device=device, dtype=dtype)
        cu_seqlens = torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)
        forward = qkv, None, None, cu_seqlens, longest, head_dim**-0.5, False, dropout_p, *_seed(dropout_p, device)
        if pass_ == "fwd":
            return _ready(attention.attention_fwd, reference.attention, forward)
        o, lse = attention.attention_fwd(*forward)
        do = _random(T, H, head_dim, device=device, dtype=dtype)
        return _ready(attention.attention_bwd, reference.attention_backward, (do, *forward[:3], o, lse, *forward[3:]))

    def candidate(blocks: Blocks) -> Candidate:
        numbers = ", ".join(map(str, blocks[:4])) + ("" if blocks.maxnreg is None else f", maxnreg={blocks.maxnreg}")
        return Candidate(
            lambda of, *rest: blocks if of == pass_ else answer(of, *rest), f'"{pass_}": _launch.Blocks({numbers}),'
        )

    case = {"what": f"attention {pass_}", "lengths": lengths, "dropout": dropout_p, "dtype": dtype}
    current = answer(pass_, head_dim, getattr(torch, dtype), longest, chip)
    tiles = current, *(it for it in attention_tiles(chip, pass_, width) if small or longest >= it.M)
    # of a backward both passes are timed, so that neither wins at the other's expense
    tensors, products = (4, 2) if pass_ == "fwd" else (8, 5)
    return Question(
        case | {"head_dim": head_dim, "heads": H, "tokens": T},
        _attention_tiles,
        "blocks",
        f"kernels/_attention_tiles.py: tiles of sm_{chip.capability[0]}{chip.capability[1]}, {width}",
        {_name(blocks): candidate(blocks) for blocks in tiles},
        ready,
        Work(bytes=tensors * T * H * head_dim * 2, flops=2 * products * H * head_dim * sum(n * n for n in seqlens)),
    )


def _layer_norm(device: str, small: bool, pass_: str, hidden: int, dropout_p: float) -> Question:
    M, N = (3, hidden // 16) if small else (TOKENS, hidden)
    attribute = "rows_and_warps" if pass_ == "forward" else "programs_and_warps"

    def ready() -> Ready:
        x, residual = _random(2, M, N, device=device).unbind()
        x_bias, weight, bias = _random(3, N, device=device).unbind()
        dropout = dropout_p, *_seed(dropout_p, device)
        forward = x, x_bias, residual, weight, bias, 1e-12, *dropout
        if pass_ == "forward":
            return _ready(layer_norm.layer_norm_fwd, reference.layer_norm, forward)
        _, mean, rstd = layer_norm.layer_norm_fwd(*forward)
        backward = _random(M, N, device=device), x, x_bias, residual, weight, mean, rstd, *dropout
        return _ready(layer_norm.layer_norm_bwd, reference.layer_norm_backward, backward)

    tensors = 3 if pass_ == "forward" else 5 if dropout_p else 4
    return Question(
        {"what": f"layer_norm {pass_}", "hidden": N, "dropout": dropout_p, "dtype": "bfloat16", "tokens": M},
        layer_norm,
        attribute,
        f"kernels/_norm.py: {attribute}, for layer_norm, by features",
        _pairs(layer_norm, attribute, N, _PAIRS[attribute, hidden], device),
        ready,
        Work(bytes=tensors * M * N * 2),
    )


def _embedding(device: str, small: bool, what: str, hidden: int) -> Question:
    T, N, vocabulary = (3, hidden // 16, 9) if small else (TOKENS, hidden, VOCABULARY)
    attribute = {"forward": "rows_and_warps", "programs": "_programs_and_warps", "chunk": "CHUNK"}[what]

    def ready() -> Ready:
        words, places = torch.randint(0, vocabulary, (T,), device=device), torch.arange(T, device=device)
        ids = words, places % 512, places // 256 % 2, None
        tables = *(_random(rows, N, device=device) for rows in (vocabulary, 512, 2)), None
        weight, bias = _random(2, N, device=device).unbind()
        dropout = 0.1, *_seed(0.1, device)
        forward = *ids, *tables, weight, bias, 0, 1e-12, *dropout
        if what == "forward":
            return _ready(embedding.embedding_fwd, reference.embedding, forward)
        _, mean, rstd = embedding.embedding_fwd(*forward)
        backward = _random(T, N, device=device), *ids, *tables, weight, mean, rstd, 0, *dropout
        return _ready(embedding.embedding_bwd, reference.embedding_backward, backward)

    if what == "chunk":
        candidates = {f"{n} tokens": Candidate(n, f"CHUNK = {n}") for n in (embedding.CHUNK, *CHUNKS)}
    else:
        candidates = _pairs(embedding, attribute, N, _PAIRS[attribute, hidden], device)
    rows = 2 * T if what == "forward" else 2 * T + vocabulary
    return Question(
        {"what": f"embedding {what}", "hidden": N, "dropout": 0.1, "dtype": "bfloat16", "tokens": T},
        embedding,
        attribute,
        f"kernels/embedding.py: {attribute}" + ("" if what == "chunk" else ", for embedding, by features"),
        candidates,
        ready,
        Work(bytes=rows * N * 2),
    )


def _product_question(
    device: str, small: bool, tokens: int, inner: int, outer: int, activation: str | None, keep_pre: bool
) -> Question:
    """cuBLAS, with the GELU's kernel behind it, against the Triton product."""
    M, K, N = (3, inner // 16, outer // 16) if small else (tokens, inner, outer)
    chip = _launch.chip(_device(device))
    entry = Product(chip.capability, torch.bfloat16, activation, N, K, size_class(M))

    def ready() -> Ready:
        x, weight, bias = (_random(*shape, device=device) for shape in ((M, K), (N, K), (N,)))
        weight *= K**-0.5
        if activation is None:
            return _ready(lambda *given: (functional.linear(*given),), _plain_product, (x, weight, bias))
        return _ready(ffn.linear_gelu_fwd, reference.linear_gelu, (x, weight, bias, activation, keep_pre))

    def candidate(tiles: Tiles) -> Candidate:
        key = f"Product({chip.capability}, torch.bfloat16, {activation!r}, {N}, {K}, {entry.rows})"
        return Candidate({entry: tiles}, f"{key}: {tiles!r},")

    what = "linear" if activation is None else "linear_gelu, kept" if keep_pre else "linear_gelu"
    return Question(
        {"what": what, "tokens": M, "in": K, "out": N, "dtype": "bfloat16", "dropout": 0.0},
        _product,
        "TILES",
        "kernels/_product.py: TILES",
        {"cuBLAS": Candidate({}, ""), **{str(tiles): candidate(tiles) for tiles in product_tiles(chip)}},
        ready,
        Work(flops=2 * M * N * K, products=(("forward", M, K, N),)),
    )


def _int8_question(device: str, small: bool, tokens: int, inner: int, outer: int, gelu: str | None) -> Question:
    """The tiles of a product of int8."""
    M, K, N = (3, inner // 16, outer // 16) if small else (tokens, inner, outer)
    chip = _launch.chip(_device(device))
    entry = Product(chip.capability, torch.int8, gelu, N, K, size_class(M))

    def ready() -> Ready:
        x, weight = (functional.quantize_rows(_random(rows, K, device=device)) for rows in (M, N))
        arguments = *x, *weight, _random(N, device=device), gelu, torch.bfloat16
        return Ready(lambda: (linear_int8.linear_int8_fwd(*arguments),), (reference.linear_int8(*arguments),))

    def candidate(tiles: Tiles) -> Candidate:
        key = f"Product({chip.capability}, torch.int8, {gelu!r}, {N}, {K}, {entry.rows})"
        return Candidate({entry: tiles}, f"{key}: {tiles!r},")

    return Question(
        {"what": "linear_int8", "tokens": M, "in": K, "out": N, "gelu": gelu, "dtype": "bfloat16", "dropout": 0.0},
        _product,
        "TILES",
        "kernels/_product.py: TILES",
        {str(tiles): candidate(tiles) for tiles in int8_tiles(chip)},
        ready,
        Work(flops=2 * M * N * K),
    )


def _plain_product(*given: Tensor) -> tuple[Tensor, ...]:
    return (reference.linear(*given),)


def _pairs(
    module: ModuleType, attribute: str, N: int, others: Sequence[tuple[int, int]], device: str
) -> dict[str, Candidate]:
    """Rows and warps, or programs and warps; the programs by multiprocessor."""
    chip, answer = _launch.chip(_device(device)), getattr(module, attribute)
    by_rows = attribute == "rows_and_warps"

    def programs(M: int, _N: int, chip: _launch.Chip, *_: int, pair: tuple[int, int]) -> tuple[int, int]:
        return max(1, min(M, chip.processors * pair[0])), pair[1]

    def candidate(pair: tuple[int, int]) -> Candidate:
        return Candidate((lambda _N: pair) if by_rows else partial(programs, pair=pair), f"{N}: {pair},")

    if by_rows:
        current = answer(N)
    else:
        sums = (4,) if module is embedding else ()  # two of LayerNorm, two token types
        most, warps = answer(1 << 30, N, chip, *sums)
        current = most // chip.processors, warps
    if chip.capability >= (10, 0):  # where more spill, as in `_norm.programs_and_warps`
        features = {pair: N * (pair[0] if by_rows else 1) // (32 * pair[1]) for pair in others}
        others = [pair for pair in others if features[pair] < (128 if by_rows else 32) and pair[0] < 8]
    unit = "rows" if by_rows else "programs"
    return {f"{pair[0]} {unit} w{pair[1]}": candidate(pair) for pair in (current, *others)}


def pairs(module: ModuleType, attribute: str, N: int) -> list[Any]:
    """What is tried in the place of a module's answer for N features, on the chip that `_launch.chip` knows."""
    return [it.replacement for it in _pairs(module, attribute, N, _PAIRS[attribute, N], "cpu").values()]


def _name(blocks: Blocks) -> str:
    return "{}x{} w{} s{}".format(*blocks[:4]) + ("" if blocks.maxnreg is None else f" r{blocks.maxnreg}")


def _device(device: str) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def _random(*shape: int, device: str, dtype: str = "bfloat16") -> Tensor:
    return torch.randn(shape, device=device).to(getattr(torch, dtype))


def _seed(dropout_p: float, device: str) -> tuple[Tensor | None, int]:
    """Seed and stream."""
    return torch.tensor(5, device=device) if dropout_p else None, 3


def _ready(operator: Callable[..., Any], specification: Callable[..., Any], arguments: Sequence[Any]) -> Ready:
    wide = (it.float() if isinstance(it, Tensor) and it.is_floating_point() else it for it in arguments)
    return Ready(torch.no_grad()(partial(operator, *arguments)), specification(*wide))
