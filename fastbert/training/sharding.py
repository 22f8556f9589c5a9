"""FSDP2 by layer: how accelerate is to shard BERT."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import accelerate.accelerator
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


@contextlib.contextmanager
def by_layer() -> Iterator[None]:
    """While a model is prepared, a group of parameters is a layer, and the root's all the others.

    accelerate (1.15) makes a group of the word embeddings and the decoder, too. That parts the decoder's bias from the
    one of the head that it is tied with, and gathers the weights only around those modules' own forward, while BERT's
    head and embeddings read them in their parents'.
    """
    with mock.patch.object(accelerate.accelerator, "fsdp2_prepare_model", _shard):
        yield


def _shard(accelerator: Accelerator, model: nn.Module) -> nn.Module:
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
