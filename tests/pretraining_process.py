"""`fastbert pretrain` as a process that may kill itself: python -m tests.pretraining_process WHEN OPTIONS...

WHEN: "never"; "step:N", before the N-th step's backward; "save:N", while checkpoint N is written; each of these only
if checkpoint N is not there, so that a restarted process goes on. With "fsdp:" before it, accelerate shards on a CPU.
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


def kill_at(kind: str, step: int, run: Path) -> None:
    from fastbert.training.trainer import PretrainingTrainer

    name = {"step": "compute_loss", "save": "_save_rng_state"}[kind]
    stock = getattr(PretrainingTrainer, name)
    rank = int(os.environ.get("RANK", 0))
    marker = run.with_name(f"{run.name}.killed")

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and rank == 0 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(self, *args, **kwargs)

    setattr(PretrainingTrainer, name, patched)


if __name__ == "__main__":
    torch.set_num_threads(1)
    when = sys.argv.pop(1)
    if when.startswith("fsdp:"):
        shard_on_a_cpu()
        when = when.removeprefix("fsdp:")
    if when != "never":
        kind, _, number = when.partition(":")
        kill_at(kind, int(number), Path(sys.argv[sys.argv.index("--output") + 1]))
    cli.main()
