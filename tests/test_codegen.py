"""What the launchers' configurations compile to: `make codegen` looks at all of them, this at the usual ones."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from bench import codegen
from fastbert.kernels import _launch, attention

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

MODULES = [
    importlib.import_module(f"fastbert.kernels.{path.stem}")
    for path in sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))
]


@pytest.fixture(scope="module")
def everything() -> list[codegen.Launch]:
    """All that `make codegen` compiles, not compiled."""
    cases = codegen.all_cases()
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
            *(launch.options[name] for name in codegen.OPTIONS.values()),
        )
        for launch in everything
    }
    assert tiles <= seen


@pytest.fixture(scope="module")
def reports() -> list[codegen.Report]:
    cases = [case for case in codegen.all_cases() if case.usual and case.dtype in ("bf16", "fp32")]
    return codegen.reports([launch for chip in ("sm_80", "sm_90") for launch in codegen.launches(chip, cases)])


def test_usual_launches_have_no_faults(reports: list[codegen.Report]) -> None:
    assert reports
    assert not {codegen.row(report)[:3]: report.faults for report in reports if report.faults}


def test_on_hopper_products_go_through_tma_and_warp_group_instructions(reports: list[codegen.Report]) -> None:
    products = [it for it in reports if it.launch.kernel == "_product_tma_kernel"]
    assert len(products) > 10
    for it in products:
        opcodes = {opcode.partition(".")[0] for opcode in it.kernel}
        assert {"UTMALDG", "UTMASTG", "HGMMA"} <= opcodes
        assert not opcodes & {"LDGSTS", "HMMA", "LDL", "STL"}
        assert it.programs >= it.launch.options["num_warps"] // 8


def test_the_table_shows_what_was_compiled(reports: list[codegen.Report]) -> None:
    table = codegen.markdown(reports)
    for report in reports:
        assert "| " + " | ".join(codegen.row(report)) + " |" in table.splitlines()


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
    turing = codegen.Multiprocessor(_launch.Chip((7, 5), 40), 65536, 32, 16)
    monkeypatch.setitem(codegen.CHIPS, "sm_75", turing)
    monkeypatch.setattr(attention, "_blocks", lambda *_: tile)
    case = codegen.attention("bf16", head_dim, [512] * 3, 0.0)
    report = codegen.report(codegen.launches(chip, [case])[0])
    assert any(fault in text for text in report.faults), report.faults
