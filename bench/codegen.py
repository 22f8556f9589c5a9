"""What every kernel compiles to, at every configuration that a launcher or `make tune` can choose. Needs no GPU.

What a launch compiles to is kept in .out/codegen under a hash of all that goes in, so that what did not change costs
nothing. The page says in one digest what it was made of, and a test compares.

    python -m bench.codegen                                    everything, into bench/results/codegen.md
    python -m bench.codegen --chip sm_90 --operator attention --dtype bf16 [--kernel fwd] [--sass]
"""

import argparse
import itertools
import multiprocessing
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rich.console import Console
from rich.progress import track

from bench import sass
from bench.launch_cases import all_cases
from bench.launches import CHIPS, DTYPES, REGISTERS, TENSOR_MEMORY, Launch, launches
from bench.machine_code import MachineCode, digest, machine_code
from bench.sass import TENSOR, total

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "bench/results/codegen.md"
SPILLS = r"LDL|STL"
FMA = r"F(FMA|MUL|ADD)2?"
WAIT = "WARPGROUP.DEPBAR"
PRODUCTS = rf"{TENSOR}|IG?MMA"  # those of int8 too


class Report(NamedTuple):
    """One launch, what it compiles to, and what is wrong with that.

    Attributes:
        programs: that a multiprocessor holds at once.
        elements: of a step's tile, for each thread.
    """

    launch: Launch
    code: MachineCode
    programs: int
    elements: float
    faults: tuple[str, ...]


def report(launch: Launch) -> Report:
    code, limits, num_warps = machine_code(launch), CHIPS[launch.chip], launch.options["num_warps"]
    programs = _programs(launch.chip, num_warps, code)
    faults = []
    in_loop = total(code.loop, SPILLS) > 0  # a register or two that waits outside of it costs nothing
    if (in_loop or code.spilled > 8) and not _may_spill(launch):
        faults.append(f"spills {code.spilled} bytes, {total(code.kernel, SPILLS)} instructions")
    if code.shared > limits.shared:
        faults.append(f"needs {code.shared} bytes of shared memory of {limits.shared}")
    if programs == 0:
        faults.append("does not fit a multiprocessor")
    if code.scalar_products or (code.half_products and not total(code.kernel, TENSOR)):
        faults.append("a product of 16-bit operands without tensor cores")
    waits, products = (
        sum(n for it, n in code.kernel.items() if it.startswith(name)) for name in (WAIT, ("HGMMA", "IGMMA"))
    )
    if waits >= 0.7 * products > 0:
        faults.append(f"{waits} waits for {products} tensor-core instructions")
    if launch.signature.get("weight_ptr") == "*i8" and not total(code.kernel, PRODUCTS):
        faults.append("a product of int8 without tensor cores")
    faults += [it for it in code.warnings if "Potential Performance Loss" in it]  # C7519, a fence more, costs nothing
    return Report(launch, code, programs, _tile(launch.named) / (32 * num_warps), tuple(faults))


def _may_spill(launch: Launch) -> bool:
    """What no BERT has: heads wider than 128, in IEEE float32 than 64; LayerNorm's backward beyond 4096 features."""
    wide_head = launch.named.get("HEAD_DIM", 0) > (64 if launch.dtype == "fp32" else 128)
    return wide_head or (launch.named.get("N", 0) > 4096 and "_bwd_" in launch.kernel)


def _tile(constants: dict[str, Any]) -> int:
    """Elements of the tile that a step works on."""
    if "COLS0" in constants:  # rows of features
        return constants["ROWS"] * (constants["COLS0"] + constants["COLS1"])
    return constants.get("BLOCK_M", 1) * constants["BLOCK_N"]


def _programs(chip: str, num_warps: int, code: MachineCode) -> int:
    """How many programs a multiprocessor holds at once. A warp gets registers by 256, out of one of four files."""
    limits = CHIPS[chip]
    of_a_warp = -(-code.registers * 32 // 256) * 256
    warps = min(limits.warps, 4 * (REGISTERS // 4 // of_a_warp))
    reserved = 1024  # bytes of shared memory that the driver takes for each program
    programs = min(limits.programs, warps // num_warps, (limits.shared + reserved) // (code.shared + reserved))
    return min(programs, TENSOR_MEMORY // code.tensor_memory) if code.tensor_memory else programs


COLUMNS = (
    "kernel", "dtype", "configuration", "regs", "spill", "shared", "warps", "products", "loads", "async", "stores",
    "LDS", "STS", "BAR", "SHFL", "loop", "MUFU", "FMA", "IMAD", "logic", "all",
)  # fmt: skip


def row(it: Report) -> tuple[str, ...]:
    """Cells of the table, in the order of COLUMNS."""

    def count(pattern: str) -> str:
        return str(total(it.code.kernel, pattern) or "")

    def per_element(n: int) -> str:
        return f"{n / it.elements:.1f}"

    moves = sum(n for opcode, n in it.code.loop.items() if opcode.startswith("IMAD.MOV"))
    products = sorted({name for opcode in it.code.kernel if re.fullmatch(PRODUCTS, name := opcode.partition(".")[0])})
    return (
        it.launch.kernel.removeprefix(f"_{it.launch.operator}_").removesuffix("_kernel"),
        it.launch.dtype,
        it.launch.configuration(),
        str(it.code.registers),
        str(it.code.spilled or ""),
        f"{it.code.shared / 1024:.1f}",
        str(it.programs * it.launch.options["num_warps"]),
        " ".join(f"{total(it.code.loop, name)}/{count(name)} {name}" for name in products),
        _widths(it.code.kernel, "LDG"),
        _widths(it.code.kernel, "LDGSTS") + (f" {count('UTMALDG')} TMA" if count("UTMALDG") else ""),
        _widths(it.code.kernel, "STG") + (f" {count('UTMASTG')} TMA" if count("UTMASTG") else ""),
        count("LDS|LDSM"),
        count("STS|STSM"),
        count("BAR"),
        count("SHFL"),
        f"{sum(it.code.loop.values())}" if it.code.looping else f"({sum(it.code.loop.values())})",
        per_element(total(it.code.loop, "MUFU")),
        per_element(total(it.code.loop, FMA)),
        per_element(total(it.code.loop, "IMAD") - moves),
        per_element(total(it.code.loop, "LOP3|SHF|PRMT")),
        per_element(sum(it.code.loop.values())),
    )


def _widths(counts: Mapping[str, int], kind: str) -> str:
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
        f" for sm_100 {nvidia.ptxas_blackwell.version}. {len(reports)} launches, {len(failing)} at fault."
        f" Made of: {digest([it.launch for it in reports])}.",
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


def reports(found: list[Launch]) -> list[Report]:
    """In as many processes as there are processors."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        return list(track(pool.map(report, found, chunksize=4), "compiling", len(found), console=Console(stderr=True)))


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
            print(
                f"// {launch.chip} {launch.kernel} {launch.dtype} {launch.configuration()}", sass.text(launch.compile())
            )
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
