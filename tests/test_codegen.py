"""What the launchers' configurations compile to: `make codegen` looks at all of them, this at what it found."""

import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from bench import codegen
from bench.launch_cases import all_cases, attention
from bench.launches import OPTIONS, Multiprocessor
from bench.machine_code import MachineCode, machine_code, warnings_of
from fastbert.kernels import _attention_tiles, _launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

MODULES = [
    importlib.import_module(f"fastbert.kernels.{path.stem}")
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
]


@pytest.fixture(scope="module")
def everything() -> list[codegen.Launch]:
    """All that `make codegen` compiles, not compiled."""
    cases = all_cases()
    return [launch for chip in codegen.CHIPS for launch in codegen.launches(chip, cases)]


def test_every_kernel_is_looked_at(everything: list[codegen.Launch]) -> None:
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {launch.kernel for launch in everything}


def _blocks(value: Any) -> Iterator[_launch.Blocks]:
    if isinstance(value, _launch.Blocks):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _blocks(item)


def test_every_tile_of_the_launchers_tables_is_looked_at(everything: list[codegen.Launch]) -> None:
    tiles = {tile for module in MODULES for value in vars(module).values() for tile in _blocks(value)}
    seen = {
        _launch.Blocks(
            launch.named.get("BLOCK_M", 0),
            launch.named.get("BLOCK_N", 0),
            *(launch.options[name] for name in OPTIONS.values()),
        )
        for launch in everything
    }
    assert tiles <= seen


@pytest.fixture(scope="module")
def page() -> str:
    text = codegen.OUTPUT.read_text()
    if f"triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}," not in text:
        pytest.skip("bench/results/codegen.md was made with another Triton")
    return text


def test_the_page_is_of_these_kernels_and_finds_no_fault(everything: list[codegen.Launch], page: str) -> None:
    assert f"{len(everything)} launches, 0 at fault. Made of: {codegen.digest(everything)}." in page, (
        "run `make codegen`"
    )


def test_the_page_shows_what_is_compiled(everything: list[codegen.Launch], page: str) -> None:
    """A row of each kernel that has tensor-core products on Hopper, and one of the others."""
    kernels = {launch.kernel: launch for launch in everything if launch.chip == "sm_90" and launch.dtype == "bf16"}
    chosen = [
        it for name, it in kernels.items() if "attention" in name or "product" in name or "layer_norm_fwd" in name
    ]
    assert len(chosen) >= 6
    for report in map(codegen.report, chosen):
        assert not report.faults
        assert "| " + " | ".join(codegen.row(report)) + " |" in page.splitlines()


def test_on_hopper_products_go_through_tma_and_warp_group_instructions(everything: list[codegen.Launch]) -> None:
    code = machine_code(next(it for it in everything if it.chip == "sm_90" and it.kernel == "_product_tma_kernel"))
    opcodes = {opcode.partition(".")[0] for opcode in code.kernel}
    assert {"UTMALDG", "UTMASTG", "HGMMA"} <= opcodes
    assert not opcodes & {"LDGSTS", "HMMA", "LDL", "STL"}


def test_what_did_not_change_is_not_compiled_again(
    everything: list[codegen.Launch], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.machine_code.KEPT", tmp_path)
    launch = next(it for it in everything if it.kernel == "_rescale_kernel")
    first = machine_code(launch)
    monkeypatch.setattr(codegen.Launch, "compile", lambda launch: pytest.fail("compiled again"))
    assert machine_code(launch) == first
    changed = launch._replace(options=launch.options | {"num_warps": 8})
    with pytest.raises(pytest.fail.Exception):
        machine_code(changed)


LOG = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma"
    " instructions defining accumulator registers of a wgmma between start and end of the pipeline stage\n"
    "ptxas info    : Used 228 registers, used 1 barriers\n"
)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ({"kernel": {"HGMMA.64x64x16": 24, "WARPGROUP.DEPBAR.LE": 24}}, "24 waits for 24 tensor-core instructions"),
        ({"kernel": {"HGMMA.64x64x16": 24, "WARPGROUP.DEPBAR.LE": 4}}, None),
        ({"warnings": warnings_of(LOG)}, "(C7515) Potential Performance Loss"),
        ({"spilled": 8, "kernel": {"STL": 2}, "loop": {"STL": 1}}, "spills 8 bytes, 2 instructions"),
        ({"spilled": 8, "kernel": {"STL": 2}}, None),
        ({"spilled": 16, "kernel": {"STL": 4}}, "spills 16 bytes, 4 instructions"),
        ({"shared": 232449}, "needs 232449 bytes of shared memory of 232448"),
        ({"half_products": 1}, "a product of 16-bit operands without tensor cores"),
    ],
)
def test_faults_by_their_numbers(
    code: dict[str, Any], fault: str | None, everything: list[codegen.Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = MachineCode(32, 0, 0, 0, {"FADD": 1}, {"FADD": 1}, True, 0, 0, ())
    monkeypatch.setattr(codegen, "machine_code", lambda launch: dataclasses.replace(fine, **code))
    launch = next(it for it in everything if it.chip == "sm_90" and it.kernel == "_attention_fwd_kernel")
    faults = codegen.report(launch).faults
    assert [it for it in faults if it.startswith(fault)] if fault else not faults


@pytest.mark.parametrize(
    ("chip", "head_dim", "tile", "fault"),
    [
        ("sm_80", 64, _launch.Blocks(128, 64, 4, 2, maxnreg=64), "spills"),
        ("sm_86", 128, _launch.Blocks(64, 64, 8, 4), "bytes of shared memory of 101376"),
        ("sm_75", 64, _launch.Blocks(64, 64, 8, 1), "without tensor cores"),  # whose tensor cores know no bfloat16
    ],
)
def test_faults_are_seen(
    monkeypatch: pytest.MonkeyPatch, chip: str, head_dim: int, tile: _launch.Blocks, fault: str
) -> None:
    turing = Multiprocessor(_launch.Chip((7, 5), 40), 65536, 32, 16)
    monkeypatch.setitem(codegen.CHIPS, "sm_75", turing)
    monkeypatch.setattr(_attention_tiles, "blocks", lambda *_: tile)
    case = attention("bf16", head_dim, [512] * 3, 0.0)
    report = codegen.report(codegen.launches(chip, [case])[0])
    assert any(fault in text for text in report.faults), report.faults
