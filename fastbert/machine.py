"""The machine that this runs on: its cores, and a device in words. torch is imported where it is needed."""

import os
from typing import TYPE_CHECKING

from fastbert.terminal import counted

if TYPE_CHECKING:
    import torch


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def where(device: "torch.device | str") -> str:
    """A device in words: a GPU by name, or the CPU and how many threads PyTorch has there."""
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
