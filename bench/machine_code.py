"""A launch's machine code in numbers, compiled once and kept under a hash of all that goes in."""

import ast
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.runtime.jit import JITCallable

from bench import sass
from bench.launches import Launch

KEPT = Path(__file__).parents[1] / ".out/codegen"


@dataclass(frozen=True)
class MachineCode:
    """What one launch compiles to, in plain numbers. Counts are of instructions by opcode.

    Attributes:
        registers: of a thread.  spilled, shared: bytes.  tensor_memory: columns.
        kernel, loop: counts of the kernel, and of its hot loop, which is the whole kernel where it has no loop.
        half_products: of 16-bit operands.  scalar_products: that no tensor core computes, though all operands are.
        warnings: of ptxas, that it holds the tensor cores back.
    """

    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    kernel: dict[str, int]
    loop: dict[str, int]
    looping: bool
    half_products: int
    scalar_products: int
    warnings: tuple[str, ...]


def machine_code(launch: Launch) -> MachineCode:
    """Compiled, or from what was compiled before."""
    path = KEPT / f"{key_of(launch)}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        content = json.loads(path.read_text())
        return MachineCode(**content | {"warnings": tuple(content["warnings"])})
    with (
        triton.knobs.compilation.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(io.StringIO()) as log,
    ):
        triton.knobs.compilation.always_compile = True  # what lies in Triton's cache has no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = launch.compile()
    code = sass.instructions(sass.text(compiled))
    loop = sass.hot_loop(code)
    registers, spilled = sass.resources(compiled)
    ttir, ttgir = compiled.asm["ttir"], compiled.asm["ttgir"]
    half = len(re.findall(r"tt\.dot .*:.*tensor<[\dx]+x(?:bf16|f16).*\*", ttir))
    scalar = len(re.findall(r"tt\.dot .*-> tensor<[\dx]+xf32, #blocked", ttgir))
    found = MachineCode(
        registers,
        spilled,
        compiled.metadata.shared,
        compiled.metadata.tmem_size or 0,
        dict(sass.count(code)),
        dict(sass.count(loop or code)),
        bool(loop),
        half,
        scalar if len(re.findall(r"tt\.dot ", ttir)) == half else 0,
        warnings_of(log.getvalue()),
    )
    KEPT.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(found)))
    os.replace(draft, path)
    return found


def warnings_of(log: str) -> tuple[str, ...]:
    """What ptxas says of tensor cores that it holds back."""
    return tuple(re.findall(r"\(C75\d\d\).*", log))


def key_of(launch: Launch) -> str:
    """A hash of all that decides what a launch compiles to; not of where in a file a kernel stands."""
    options = {name: value for name, value in launch.options.items() if name != "extern_libs"}  # paths
    asked = launch.chip, launch.signature, launch.constants, launch.attributes, options
    parts = _source_of(launch.module, launch.kernel), *asked, *_tools()
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _source_of(module: str, kernel: str) -> str:
    return _source(getattr(importlib.import_module(module), kernel), set())


def _source(function: JITCallable, seen: set[str]) -> str:
    """A device function with all that it calls, and the constants that it reads."""
    seen.add(function.__name__)
    text = function.src
    for name in sorted({node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)} - seen):
        value = function.fn.__globals__.get(name)
        if isinstance(value, JITCallable):
            text += _source(value, seen)
        elif isinstance(value, triton.language.constexpr):
            text += f"{name} = {value.value}\n"
    return text


@functools.cache
def _tools() -> tuple[str, ...]:
    """What compiles, and what takes apart."""
    nvidia = triton.knobs.nvidia
    own = (Path(path).read_text() for path in (__file__, sass.__file__))
    return triton.__version__, nvidia.ptxas.version, nvidia.ptxas_blackwell.version, *own


def digest(found: list[Launch]) -> str:
    """Of all that a page is made of."""
    return hashlib.sha256("".join(sorted(map(key_of, found))).encode()).hexdigest()[:16]
