"""Machine code as ptxas wrote it: its instructions, counted; its hot loop; registers and spills."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import triton

TENSOR = r"HGMMA|HMMA|UTC\w*MMA"


class Instruction(NamedTuple):
    conditional: bool
    opcode: str
    target: Any  # where it may jump: the index of an instruction


def _dump(compiled: Any, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def text(compiled: Any) -> str:
    return _dump(compiled, triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow")


def resources(compiled: Any) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: Triton's kernels have nothing there but spills."""
    usage = dict(
        re.findall(r"(REG|STACK|LOCAL):(\d+)", _dump(compiled, triton.knobs.nvidia.cuobjdump.path, "-res-usage"))
    )
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def instructions(disassembled: str) -> list[Instruction]:
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    line = r"^(\.L\w+):|^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?\s*([A-Z][\w.]*)\s*(.*?)\s*;"
    for label, predicate, opcode, operands in re.findall(line, disassembled, re.MULTILINE):
        if label:
            labels[label] = len(found)
            continue
        jump = re.search(r"`\((\.L\w+)\)$", operands) if opcode.startswith(("BRA", "CALL", "JMP")) else None
        conditional = bool(predicate) or (jump is not None and (jump.start() > 0 or opcode.startswith("CALL")))
        found.append(Instruction(conditional, opcode, jump[1] if jump else None))
    return [it._replace(target=labels[it.target]) if it.target in labels else it for it in found]


def count(code: list[Instruction]) -> Counter[str]:
    return Counter(instruction.opcode for instruction in code if instruction.opcode != "NOP")


def total(counts: Mapping[str, int], pattern: str) -> int:
    """Instructions of some kinds. sm_100 has some that do two floats at once: FFMA2."""
    matching = {opcode: n for opcode, n in counts.items() if re.fullmatch(pattern, opcode.partition(".")[0])}
    return sum(n * (2 if opcode.partition(".")[0].endswith("2") else 1) for opcode, n in matching.items())


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """The innermost loop with the most products; without products, the largest innermost one. May be none."""
    loops = _loops(code)
    if total(count(code), TENSOR):
        loops = [loop for loop in loops if total(count([code[i] for i in loop]), TENSOR)]
    else:
        loops = [loop for loop in loops if len(loop) > 12]  # not those that wait for a barrier
    inner = [loop for loop in loops if not any(other < loop for other in loops)]
    inner.sort(key=lambda loop: (total(count([code[i] for i in loop]), TENSOR), len(loop)))
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
