"""What every kernel compiles to, at every configuration that the launchers choose, on every chip. Needs no GPU.

Nothing here repeats a launcher's configurations. The launchers themselves are called, on unfilled CPU tensors, with
another chip's numbers in place of this machine's; Triton's own launch code binds and specialises the arguments, and
what it then would compile is kept, compiled for that chip and taken apart.

    python -m bench.codegen                                    everything, into bench/results/codegen.md
    python -m bench.codegen --chip sm_90 --operator attention --dtype bf16 [--kernel fwd] [--sass]
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import tune
from fastbert import _library, functional  # noqa: F401  functional registers every operator
from fastbert.kernels import _launch, _product

OUTPUT = Path(__file__).parent / "results/codegen.md"


class Multiprocessor(NamedTuple):
    """What one of a chip's multiprocessors holds at once, beside its registers."""

    chip: _launch.Chip
    shared: int  # bytes that one program may use
    warps: int
    programs: int


CHIPS = {  # A100, RTX A6000, H100 and H200, B200
    "sm_80": Multiprocessor(_launch.Chip((8, 0), 108), 166912, 64, 32),
    "sm_86": Multiprocessor(_launch.Chip((8, 6), 84), 101376, 48, 16),
    "sm_90": Multiprocessor(_launch.Chip((9, 0), 132), 232448, 64, 32),
    "sm_100": Multiprocessor(_launch.Chip((10, 0), 148), 232448, 64, 32),
}
REGISTERS = 64 * 1024  # of a multiprocessor
TENSOR_MEMORY = 512  # columns, of a multiprocessor of sm_100
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}


class Case(NamedTuple):
    """A call of an operator's launchers, forward and backward. `usual`: a size that most models have."""

    operator: str
    dtype: str
    launch: Callable[[], None]
    usual: bool


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
        ("bf16", 80, (512,)),
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


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    attention_cases,
    layer_norm_cases,
    embedding_cases,
    gelu_cases,
    cross_entropy_cases,
    product_cases,
)


def _launcher(name: str) -> Callable[..., Any]:
    return _library._SIDES[name]["cuda"]


def _seed(dropout_p: float) -> Tensor | None:
    return torch.tensor(5) if dropout_p > 0 else None


OPTIONS = {"warps": "num_warps", "stages": "num_stages", "registers": "maxnreg"}


class Launch(NamedTuple):
    """What Triton would have compiled, in plain data that another process can compile."""

    operator: str
    module: str
    kernel: str
    dtype: str
    chip: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]  # constexprs, and arguments that are None or 1
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    named: dict[str, Any]  # the constants, by name

    def compile(self) -> Any:
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(kernel, self.signature, self.constants, self.attributes)
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.disable_line_info = True  # a third of the time
            return triton.compile(source, target=_target(self.chip), options=self.options)

    def configuration(self) -> str:
        """The constants that tell one launch from another, as short as they can be read."""
        shown = {
            name.removeprefix("BLOCK_"): value
            for name, value in self.named.items()
            if value not in (None, 0) and name != "PRECISION" and not name.startswith("stride_")
        }
        pointers = {name.removesuffix("_ptr"): type_[1:] for name, type_ in self.signature.items() if type_[0] == "*"}
        shown |= {name: type_ for name, type_ in pointers.items() if name in ("residual", "weight", "numbers")}
        shown |= {short: self.options[name] for short, name in OPTIONS.items() if self.options[name] is not None}
        return " ".join(name if value is True else f"{name}={value}" for name, value in shown.items())


def launches(chip: str, cases: Iterable[Case]) -> list[Launch]:
    """All different launches of these cases on a chip, without launching them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("interpreted kernels are not compiled: unset TRITON_INTERPRET")
    found: dict[tuple[str, str], Launch] = {}

    def keep(
        kernel: JITFunction[Any],
        key: Any,
        signature: Any,
        _device: Any,
        constants: Any,
        options: Any,
        attrs: Any,
        *_: Any,
    ) -> None:
        named = {kernel.params[path[0]].name: value for path, value in constants.items()}
        launch = Launch(
            case.operator, kernel.__module__, kernel.__name__, case.dtype, chip,
            signature, constants, attrs, dict(options.__dict__), named,
        )  # fmt: skip
        found.setdefault((kernel.__name__, str(key)), launch)

    def precision(_dtype: torch.dtype) -> str:
        return "tf32" if case.dtype == "tf32" else "ieee"

    device = SimpleNamespace(
        get_current_device=lambda: chip,
        get_current_stream=lambda _device: 0,
        get_current_target=lambda: _target(chip),
    )
    with (
        mock.patch.object(_launch, "chip", return_value=CHIPS[chip].chip),
        mock.patch.object(_launch, "precision", precision),
        mock.patch.object(driver, "_active", device),
        mock.patch.object(JITFunction, "_do_compile", keep),
    ):
        for case in cases:
            case.launch()
    return list(found.values())


def _target(chip: str) -> GPUTarget:
    major, minor = CHIPS[chip].chip.capability
    return GPUTarget("cuda", 10 * major + minor, 32)


class Instruction(NamedTuple):
    conditional: bool
    opcode: str
    target: Any  # where it may jump: the index of an instruction


class Report(NamedTuple):
    """What one launch compiles to. Counts are of instructions by opcode: of the kernel, and of its hot loop."""

    launch: Launch
    registers: int
    spilled: int  # bytes
    shared: int
    tensor_memory: int  # columns
    programs: int  # that a multiprocessor holds at once
    kernel: Counter[str]
    loop: Counter[str]
    looping: bool  # or else the hot loop is the whole kernel
    elements: float  # of a step's tile, for each thread
    faults: tuple[str, ...]


def report(launch: Launch) -> Report:
    compiled = launch.compile()
    code = _instructions(sass(compiled))
    registers, spilled = _resources(compiled)
    shared, tensor_memory = compiled.metadata.shared, compiled.metadata.tmem_size or 0
    kernel = _count(code)
    loop = _hot_loop(code)
    num_warps = launch.options["num_warps"]
    elements = _tile(launch.named) / (32 * num_warps)
    programs = _programs(launch.chip, num_warps, registers, shared, tensor_memory)
    faults = []
    if (spilled or _total(kernel, SPILLS)) and not _may_spill(launch):
        faults.append(f"spills {spilled} bytes, {_total(kernel, SPILLS)} instructions")
    if shared > CHIPS[launch.chip].shared:
        faults.append(f"needs {shared} bytes of shared memory of {CHIPS[launch.chip].shared}")
    if programs == 0:
        faults.append("does not fit a multiprocessor")
    if _scalar_products(compiled) or (_half_products(compiled) and not _total(kernel, TENSOR)):
        faults.append("a product of 16-bit operands without tensor cores")
    return Report(
        launch, registers, spilled, shared, tensor_memory, programs,
        kernel, _count(loop or code), bool(loop), elements, tuple(faults),
    )  # fmt: skip


def _may_spill(launch: Launch) -> bool:
    """What no BERT has: IEEE float32 heads wider than 64, and more than 4096 features in LayerNorm's backward."""
    wide_head = launch.dtype == "fp32" and launch.named.get("HEAD_DIM", 0) > 64
    return wide_head or (launch.named.get("N", 0) > 4096 and "_bwd_" in launch.kernel)


TENSOR = r"HGMMA|HMMA|UTC\w*MMA"
SPILLS = r"LDL|STL"
FMA = r"F(FMA|MUL|ADD)2?"


def _tile(constants: dict[str, Any]) -> int:
    """Elements of the tile that a step works on."""
    if "COLS0" in constants:  # rows of features
        return constants["ROWS"] * (constants["COLS0"] + constants["COLS1"])
    return constants.get("BLOCK_M", 1) * constants["BLOCK_N"]


def _half_products(compiled: Any) -> int:
    return len(re.findall(r"tt\.dot .*:.*tensor<[\dx]+x(?:bf16|f16).*\*", compiled.asm["ttir"]))


def _scalar_products(compiled: Any) -> int:
    """Products that were not given to tensor cores, beyond those in float32."""
    scalar = len(re.findall(r"tt\.dot .*-> tensor<[\dx]+xf32, #blocked", compiled.asm["ttgir"]))
    return scalar if len(re.findall(r"tt\.dot ", compiled.asm["ttir"])) == _half_products(compiled) else 0


def _dump(compiled: Any, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def sass(compiled: Any) -> str:
    return _dump(compiled, triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow")


def _resources(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: Triton's kernels have nothing there but spills."""
    usage = dict(
        re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(compiled, triton.knobs.nvidia.cuobjdump.path, "-res-usage"))
    )
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _programs(chip: str, num_warps: int, registers: int, shared: int, tensor_memory: int) -> int:
    """How many programs a multiprocessor holds at once. A warp gets registers by 256, out of one of four files."""
    limits = CHIPS[chip]
    of_a_warp = -(-registers * 32 // 256) * 256
    warps = min(limits.warps, 4 * (REGISTERS // 4 // of_a_warp))
    reserved = 1024  # bytes of shared memory that the driver takes for each program
    programs = min(limits.programs, warps // num_warps, (limits.shared + reserved) // (shared + reserved))
    return min(programs, TENSOR_MEMORY // tensor_memory) if tensor_memory else programs


def _instructions(text: str) -> list[Instruction]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    line = r"^(\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;"
    for label, predicate, opcode, operands in re.findall(line, text, re.MULTILINE):
        if label:
            labels[label] = len(found)
            continue
        jump = re.search(r"`\((\.L\w+)\)$", operands) if opcode.startswith(("BRA", "CALL", "JMP")) else None
        conditional = bool(predicate) or (jump is not None and (jump.start() > 0 or opcode.startswith("CALL")))
        found.append(Instruction(conditional, opcode, jump[1] if jump else None))
    return [it._replace(target=labels[it.target]) if it.target in labels else it for it in found]


def _count(code: list[Instruction]) -> Counter[str]:
    return Counter(instruction.opcode for instruction in code if instruction.opcode != "NOP")


def _total(counts: Counter[str], pattern: str) -> int:
    """Instructions of some kinds. sm_100 has some that do two floats at once: FFMA2."""
    matching = {opcode: n for opcode, n in counts.items() if re.fullmatch(pattern, opcode.partition(".")[0])}
    return sum(n * (2 if opcode.partition(".")[0].endswith("2") else 1) for opcode, n in matching.items())


def _hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most products; without products, the largest innermost one. May be none."""
    loops = _loops(code)
    if _total(_count(code), TENSOR):
        loops = [loop for loop in loops if _total(_count([code[i] for i in loop]), TENSOR)]
    else:
        loops = [loop for loop in loops if len(loop) > 12]  # not those that wait for a barrier
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    inner.sort(key=lambda loop: (_total(_count([code[i] for i in loop]), TENSOR), len(loop)))
    return [code[i] for i in sorted(inner[-1])] if inner else []


def _loops(code: list[Instruction]) -> list[set[int]]:
    """Natural loops, as the indices of their instructions.

    ptxas puts rarely taken blocks behind everything else, so that a jump back is not yet a loop: one is where a block
    jumps to a block that dominates it.
    """
    ends = [i + 1 for i, it in enumerate(code) if it.target is not None or it.opcode.startswith(("EXIT", "RET"))]
    starts = sorted({0, *(e for e in ends if e < len(code)), *(it.target for it in code if it.target is not None)})
    bounds = [*starts, len(code)]
    block = {start: b for b, start in enumerate(starts)}
    successors: list[set[int]] = []
    for end in bounds[1:]:
        last = code[end - 1]
        stops = not last.conditional and (last.target is not None or last.opcode.startswith(("EXIT", "RET")))
        following = set() if stops or end == len(code) else {block[end]}
        successors.append(following | ({block[last.target]} if last.target is not None else set()))
    predecessors = [{p for p, after in enumerate(successors) if b in after} for b in range(len(starts))]

    everything = (1 << len(starts)) - 1
    dominators = [1] + [everything] * (len(starts) - 1)  # bit sets
    changed = True
    while changed:
        changed = False
        for b in range(1, len(starts)):
            common = everything
            for p in predecessors[b]:
                common &= dominators[p]
            changed |= dominators[b] != common | 1 << b
            dominators[b] = common | 1 << b

    bodies: dict[int, set[int]] = {}
    for b, after in enumerate(successors):
        for header in after:
            if dominators[b] >> header & 1:
                body, waiting = bodies.setdefault(header, {header}), [b]
                while waiting:
                    member = waiting.pop()
                    if member not in body:
                        body.add(member)
                        waiting += predecessors[member]
    return [{i for b in body for i in range(bounds[b], bounds[b + 1])} for body in bodies.values()]


COLUMNS = (
    "kernel", "dtype", "configuration", "regs", "spill", "shared", "warps", "products", "loads", "async", "stores",
    "LDS", "STS", "BAR", "SHFL", "loop", "MUFU", "FMA", "IMAD", "logic", "all",
)  # fmt: skip


def row(it: Report) -> tuple[str, ...]:
    """Cells of the table, in the order of COLUMNS."""

    def count(pattern: str) -> str:
        return str(_total(it.kernel, pattern) or "")

    def per_element(n: int) -> str:
        return f"{n / it.elements:.1f}"

    moves = sum(n for opcode, n in it.loop.items() if opcode.startswith("IMAD.MOV"))
    products = sorted({name for opcode in it.kernel if re.fullmatch(TENSOR, name := opcode.partition(".")[0])})
    return (
        it.launch.kernel.removeprefix(f"_{it.launch.operator}_").removesuffix("_kernel"),
        it.launch.dtype,
        it.launch.configuration(),
        str(it.registers),
        str(it.spilled or ""),
        f"{it.shared / 1024:.1f}",
        str(it.programs * it.launch.options["num_warps"]),
        " ".join(f"{_total(it.loop, name)}/{count(name)} {name}" for name in products),
        _widths(it.kernel, "LDG"),
        _widths(it.kernel, "LDGSTS") + (f" {count('UTMALDG')} TMA" if count("UTMALDG") else ""),
        _widths(it.kernel, "STG") + (f" {count('UTMASTG')} TMA" if count("UTMASTG") else ""),
        count("LDS|LDSM"),
        count("STS|STSM"),
        count("BAR"),
        count("SHFL"),
        f"{it.loop.total()}" if it.looping else f"({it.loop.total()})",
        per_element(_total(it.loop, "MUFU")),
        per_element(_total(it.loop, FMA)),
        per_element(_total(it.loop, "IMAD") - moves),
        per_element(_total(it.loop, "LOP3|SHF|PRMT")),
        per_element(it.loop.total()),
    )


def _widths(counts: Counter[str], kind: str) -> str:
    """Instructions by the bytes that a thread moves with each, as in "8x16 1x4"."""
    widths = Counter[int]()
    for opcode, n in counts.items():
        name, *modifiers = opcode.split(".")
        if name == kind:
            bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
            widths[next((bits[m] for m in modifiers if m in bits), 32) // 8] += n
    return " ".join(f"{n}x{width}" for width, n in sorted(widths.items(), reverse=True))


LEGEND = """A thread's registers, and bytes that spill; KiB of shared memory; warps that a multiprocessor holds at once.
Tensor-core instructions, in the hot loop / in the kernel. Instructions that load, that load asynchronously into shared
memory, and that store, as count x bytes for each thread; those on shared memory, barriers, shuffles. Then the hot loop,
which is the innermost one with the most products (in brackets: no loop, the whole kernel): its instructions, and how
many of them a thread spends on one element of the tile M x N: MUFU, float (FFMA, FMUL, FADD), IMAD without moves, logic
(LOP3, SHF, PRMT), all."""


def markdown(reports: list[Report]) -> str:
    nvidia = triton.knobs.nvidia
    failing = [it for it in reports if it.faults]
    lines = [
        "# What the kernels compile to",
        "",
        f"Written by `make codegen`: triton {triton.__version__}, ptxas {nvidia.ptxas.version},"
        f" for sm_100 {nvidia.ptxas_blackwell.version}. {len(reports)} launches, {len(failing)} at fault.",
        "",
        LEGEND,
        "",
        *dict.fromkeys(f"- **{it.launch.chip} {' '.join(row(it)[:3])}**: {', '.join(it.faults)}" for it in failing),
    ]
    operators = list(dict.fromkeys(it.launch.operator for it in reports))
    for operator, chip in itertools.product(operators, CHIPS):
        group = [it for it in reports if (it.launch.operator, it.launch.chip) == (operator, chip)]
        if not group:
            continue
        limits = CHIPS[chip]
        title = f"## {operator}, {chip}: {limits.shared // 1024} KiB for a program, {limits.warps} warps"
        lines += ["", title, "", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        group.sort(key=lambda it: it.launch.kernel)
        lines += dict.fromkeys("| " + " | ".join(row(it)) + " |" for it in group)
    return "\n".join(lines) + "\n"


def reports(found: list[Launch], processes: int = 2) -> list[Report]:
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(report, found, chunksize=4))


def all_cases(operator: str | None = None, dtype: str | None = None) -> list[Case]:
    cases = (case for some in CASES for case in some())
    return [case for case in cases if operator in (None, case.operator) and dtype in (None, case.dtype)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=CHIPS)
    parser.add_argument("--operator")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--kernel", default="", help="part of its name")
    parser.add_argument("--sass", action="store_true", help="print machine code instead of the table")
    arguments = parser.parse_args()
    cases = all_cases(arguments.operator, arguments.dtype)
    chips = [arguments.chip] if arguments.chip else list(CHIPS)
    found = [it for chip in chips for it in launches(chip, cases) if arguments.kernel in it.kernel]
    if arguments.sass:
        for launch in found:
            print(f"// {launch.chip} {launch.kernel} {launch.dtype} {launch.configuration()}", sass(launch.compile()))
        return 0
    done = reports(found)
    table = markdown(done)
    if len(sys.argv) == 1:
        OUTPUT.write_text(table)
        print(f"{OUTPUT.relative_to(Path.cwd())}: {table.splitlines()[2]}")
    else:
        print(table)
    return int(any(it.faults for it in done))


if __name__ == "__main__":
    sys.exit(main())
