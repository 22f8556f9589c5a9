"""`fastbert pretrain` as a process that kills itself in a step, once: python -m tests.pretraining_process STEP ...

Started again it goes on.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from fastbert import cli


def shard_on_a_cpu() -> None:
    """accelerate takes FSDP to be for GPUs only. PyTorch's works on a CPU as well."""
    from accelerate.state import AcceleratorState, DistributedType

    stock = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.__dict__["fsdp_plugin"] = fsdp_plugin
        if self.__dict__.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def kill_at(step: int, run: Path) -> None:
    from fastbert.training.pretraining_trainer import PretrainingTrainer

    stock = PretrainingTrainer.compute_loss
    rank = int(os.environ.get("RANK", 0))
    marker = run.with_name(f"{run.name}.killed")

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and rank == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(self, *args, **kwargs)

    PretrainingTrainer.compute_loss = patched  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at(int(sys.argv.pop(1)), Path(sys.argv[sys.argv.index("--output") + 1]))
    cli.main()
