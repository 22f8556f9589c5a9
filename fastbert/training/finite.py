"""Steps whose loss or gradient is not finite: found where they are computed, and left out, without waiting for them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastbert.errors import CommonError
from fastbert.training import checkpoints

BEGIN = "--init-from"


class FiniteSteps:
    """Looks at every step before its update, on the device.

    A step that is not finite changes neither weights nor the optimiser's state, whichever it is: PyTorch's fused
    optimisers take a flag on the device for that, the one that gradient scaling uses. Somebody has to look at
    `first` when the device is waited for anyway.

    Attributes:
        first: (3,) float64, the first such step, counted from 1, its loss and its gradient's norm; zeros without one.
    """

    def __init__(self, device: torch.device) -> None:
        self.first = torch.zeros(3, dtype=torch.float64, device=device)

    def look(self, step: int, loss: Tensor, norm: Tensor, optimizer: Any) -> Tensor:
        """() bool: whether this step is left out. All processes must give the same loss and norm."""
        found = torch.stack([loss, norm.to(loss.dtype)])
        bad = ~found.isfinite().all()
        record = torch.cat([found.new_full((1,), step), found])
        self.first = torch.where(bad & (self.first[0] == 0), record, self.first)
        getattr(optimizer, "optimizer", optimizer).found_inf = bad.float()  # accelerate wraps it
        return bad

    def error(self, run: Path, begin: str = BEGIN) -> CommonError:
        """What to say of the first such step. Args: begin: the option that names a checkpoint to begin with."""
        step, loss, norm = self.first.tolist()
        return CommonError(
            f"step {step:,.0f} is not finite: its loss is {loss:.4g}, its gradient's norm {norm:.4g}. {_kept(run)}:"
            f" the same command with --non-finite-loss continue leaves such steps out; or {_anew(run, begin)}"
        )


def check_weights(model: nn.Module, step: int, run: Path, world_size: int, begin: str = BEGIN) -> None:
    """Raises: CommonError in all processes, if a weight of one is not finite."""
    with torch.no_grad():
        parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
        bad = torch.stack([~p.isfinite().all() for p in parts]).any().float()
        if world_size > 1:
            dist.all_reduce(bad)
    if bad.item():
        raise CommonError(f"the weights after step {step:,} are not finite. {_kept(run)}: {_anew(run, begin)}")


def _kept(run: Path) -> str:
    last = checkpoints.last_checkpoint(run)
    return "Nothing was saved before" if last is None else f"{last} was saved before, and nothing after"


def _anew(run: Path, begin: str) -> str:
    last = checkpoints.last_checkpoint(run)
    other = "" if last is None else f", with {begin} {last}"
    return f"begin another run{other} and a lower --learning-rate"
