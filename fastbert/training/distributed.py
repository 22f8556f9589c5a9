"""Several processes under torchrun: joining, what one does for all, sharding by layer."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous

from fastbert.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


def join(on_cpu: bool) -> None:
    """Join torchrun's process group, if there is one.

    Workers that torchrun has started again get the store of the ones before them, and where they look faster than the
    others write, the addresses of processes that are gone. So each start has its own keys.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    # PyTorch 2.13's, of an option that means the same in all versions.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    store, rank, world_size = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "gloo" if on_cpu else "nccl"
    dist.init_process_group(backend, store=PrefixStore(f"start-{start}", store), rank=rank, world_size=world_size)


@contextlib.contextmanager
def rank_zero_first(world_size: int, rank: int) -> Iterator[None]:
    """What process 0 does is done when the others go on; what it cannot do, none of them can."""
    failure: InputError | None = None
    try:
        yield
    except InputError as error:
        failure = error
    if world_size > 1:
        failed: list[Any] = [None if failure is None else str(failure)]
        dist.broadcast_object_list(failed, src=0)
        if rank > 0 and failed[0] is not None:
            failure = InputError(failed[0])
    if failure is not None:
        raise failure


@contextlib.contextmanager
def by_layer() -> Iterator[None]:
    """While a model is prepared, a group of parameters is a layer, and the root's all the others.

    accelerate (1.15) makes a group of the word embeddings and the decoder, too. That parts the decoder's bias from the
    one of the head that it is tied with, and gathers the weights only around those modules' own forward, while BERT's
    head and embeddings read them in their parents'.
    """
    import accelerate.accelerator

    with mock.patch.object(accelerate.accelerator, "fsdp2_prepare_model", _shard):
        yield


def _shard(accelerator: "Accelerator", model: nn.Module) -> nn.Module:
    if isinstance(model, FSDPModule):
        return model
    plugin = accelerator.state.fsdp_plugin
    mesh = getattr(accelerator, "torch_device_mesh", None)
    options = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "mesh": None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)],
    }
    for module in list(model.modules()):
        if type(module).__name__ == "BertLayer":
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, **options)
    return model
