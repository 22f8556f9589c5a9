"""fastbert info: the machine, as far as it matters here, and what runs each operator on it."""

import contextlib
import importlib.util
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert import machine
from fastbert.terminal import counted

_VARIABLES = re.compile("(FASTBERT|TRITON|TORCH|PYTORCH|OMP|MKL|KMP|CUDA|CUBLAS|NVIDIA_TF32|HF|TRANSFORMERS)_")
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|KEY")
_DRIVER = Path("/sys/module/nvidia/version")
_SECONDS = 1.0  # that adding up a cache's files may take
_WITHOUT_EXTENSION = (
    "not built: `fastbert pretrain`, fastbert.data.masking and int8 do not work; on a CPU inference runs layer by"
    " layer, dropout and packing by lengths in Python, slower"
)


def info(as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False) -> None:
    """Versions, the machine, settings in force, and what runs each operator."""
    known = _info()
    if as_json:
        typer.echo(json.dumps(known, indent=2))
        return
    console = Console()
    about = Table.grid(padding=(0, 2))
    about.add_column(no_wrap=True)
    about.add_column(overflow="fold")
    for name, value in _rows(known):
        about.add_row(name, Text(value))
    console.print(about)
    table = Table("operator", "on a GPU", "on a CPU", box=box.SIMPLE_HEAD)
    for name, sides in known["operators"].items():
        table.add_row(name, *(str(sides[side]).removesuffix(" (the reference)") for side in ("cuda", "cpu")))
    console.print(table)


def _info() -> dict[str, Any]:
    """What `--json` prints: sizes in bytes, None for what is not known."""
    import torch

    import fastbert.functional
    from fastbert import _library

    packages = ("torch", "triton", "transformers")
    sides = {side: _library.backends(side) for side in ("cuda", "cpu")}
    return {
        "versions": {"fastbert": fastbert.__version__, "python": platform.python_version()}
        | {package: _version(package) for package in packages},
        "platform": platform.platform(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "cpu": _cpu(),
        "extension": importlib.util.find_spec("fastbert._C") is not None,
        "environment": _environment(),
        "caches": {name: _cache(folder) for name, folder in _caches().items()},
        "operators": {
            name: {side: backends.get(name) for side, backends in sides.items()} for name in sorted(sides["cpu"])
        },
    }


def _rows(known: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, version or "not installed") for name, version in known["versions"].items()]
    rows.append(("platform", known["platform"]))
    for gpu in known["gpus"]:
        major, minor = gpu["capability"]
        rows.append(("GPU", f"{gpu['name']}, compute capability {major}.{minor}, {_gib(gpu['memory_bytes'])}"))
        rows.append(("", gpu["why_not"] or f"fast there: {', '.join(gpu['fast_dtypes'])}"))
    if not known["gpus"]:
        rows.append(("GPU", "none: everything runs on the CPU"))
    elif known["versions"]["triton"] is None:
        rows.append(("", "without Triton, plain PyTorch runs on the GPU"))
    cuda = f"{known['cuda']}, as PyTorch was built" if known["cuda"] else "none: this PyTorch was built for CPUs"
    rows.append(("CUDA", cuda + (f"; driver {known['driver']}" if known["driver"] else "")))
    cpu = known["cpu"]
    threads = f"PyTorch runs {counted(cpu['threads'], 'thread')}"
    rows.append(("CPU", f"{cpu['name']}, {counted(cpu['cores'], 'core')}; {threads}"))
    fast = ", ".join(cpu["fast_dtypes"])
    if cpu["instructions"] is not None:
        fast += f" (by {', '.join(cpu['instructions'])})" if cpu["instructions"] else ""
        slow = [dtype for dtype in ("bf16", "fp16") if dtype not in cpu["fast_dtypes"]]
        fast += f"; slow: {', '.join(slow)}" if slow else ""
    rows.append(("", f"fast there: {fast}"))
    rows.append(("", f"inference with all layers in one call: {', '.join(cpu['all_layers_in_one_call']) or 'no'}"))
    if cpu["memory_bytes"]:
        rows.append(("memory", _gib(cpu["memory_bytes"])))
    rows.append(("C++ extension", "built" if known["extension"] else _WITHOUT_EXTENSION))
    for name, cache in known["caches"].items():
        size = "large" if cache["bytes"] is None else _gib(cache["bytes"]) if cache["exists"] else "not there yet"
        rows.append((f"{name} cache", f"{cache['path']}, {size}"))
    variables = [f"{name}={value}" for name, value in known["environment"].items()] or ["nothing that matters here"]
    return [*rows, ("environment", variables[0]), *(("", variable) for variable in variables[1:])]


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from fastbert.kernels import _launch

    properties = torch.cuda.get_device_properties(index)
    capability = properties.major, properties.minor
    return {
        "name": properties.name,
        "capability": capability,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        # On tensor cores.
        "fast_dtypes": ["fp16"] * (capability >= (7, 0)) + ["bf16", "tf32"] * (capability >= (8, 0)),
        "why_not": _launch.why_not(torch.device("cuda", index)),
    }


def _driver() -> str | None:
    """NVIDIA's kernel module."""
    return _DRIVER.read_text().strip() if _DRIVER.is_file() else None


def _cpu() -> dict[str, Any]:
    import torch

    from fastbert.prepared import PRECISIONS, why_no_precision

    has: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.11 may lack it
    bf16 = [name for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16") if has.get(name)]
    fp16 = [name for name in ("amx_fp16", "avx512_fp16", "fp16_arith") if has.get(name)]
    return {
        "name": has.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": machine.cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory(),
        "fast_dtypes": ["fp32", *["bf16"] * bool(bf16), *["fp16"] * bool(fp16)],
        "all_layers_in_one_call": [precision for precision in PRECISIONS if why_no_precision(precision) is None],
        "instructions": bf16 + fp16 if has else None,
    }


def _memory() -> int | None:
    """The machine's, or what a container's processes may have of it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in map(Path, ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text().strip()).isdigit():
            limits.append(int(limit))
    return min(limits)


def _environment() -> dict[str, str]:
    """The variables that change what happens here; of what is secret, only that it is set."""
    chosen = sorted(name for name in os.environ if _VARIABLES.match(name))
    return {name: "(set)" if _SECRET.search(name) else os.environ[name] for name in chosen}


def _caches() -> dict[str, Path]:
    from huggingface_hub import constants

    caches = {"Hugging Face hub": Path(constants.HF_HUB_CACHE)}
    if importlib.util.find_spec("triton") is not None:
        from triton import knobs

        caches["Triton"] = Path(knobs.cache.dir)
    return caches


def _cache(folder: Path) -> dict[str, Any]:
    """Its size is None where adding it up takes longer than a moment."""
    return {"path": str(folder), "exists": folder.is_dir(), "bytes": _size(folder)}


def _size(folder: Path) -> int | None:
    begin, size = time.perf_counter(), 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                size += os.lstat(os.path.join(parent, name)).st_size
        if time.perf_counter() - begin > _SECONDS:
            return None
    return size


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
