"""What a pretraining step costs and how well it predicts."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 1024  # labelled tokens of a batch whose prediction is looked at

# Dense bf16 TFLOP/s of NVIDIA's data sheets, by what the device's name holds.
PEAK_TFLOPS = (
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A30", 165.0),
)


def training_flops(config: Any, lengths: Tensor, labels: int) -> int:
    """Floating-point operations of a step's forward and backward, two for each multiply-add.

    Three times the forward: the layers' products for every token, attention's for every pair of tokens in a sequence,
    the masked-LM head for labelled tokens only, the pooler for sequences. Nothing that is computed twice counts twice.

    Args:
        lengths: (B,) tokens of each sequence.
        labels: how many tokens have one.
    """
    h, inner = config.hidden_size, config.intermediate_size
    tokens, squares = int(lengths.sum()), int((lengths.long() ** 2).sum())
    layer = 2 * tokens * (4 * h * h + 2 * h * inner) + 4 * squares * h
    heads = 2 * labels * (h * h + h * config.vocab_size) + 2 * len(lengths) * h * h
    return int(3 * (config.num_hidden_layers * layer + heads))


def peak_flops(device: torch.device) -> float | None:
    """Of a GPU in bf16, a second, from its data sheet; None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS if part in name), None)


def peak_memory(device: torch.device) -> float | None:
    """The most memory that was in use so far, in GiB: of the GPU, or of this process; None on Windows' CPUs."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Accuracy:
    """How many of the labelled tokens a masked-LM head predicts, counted where the head runs anyway.

    Only while `armed`, and of at most 1024 tokens of a batch: their logits are computed once more for it.
    """

    def __init__(self, head: nn.Module) -> None:
        self.armed = False
        self._counts: list[Tensor] = []
        self._hook = head.register_forward_hook(self._count, with_kwargs=True)

    def take(self) -> Tensor | None:
        """(2,) predicted, looked at, since it was last asked; None if nothing was. No synchronisation."""
        counts, self._counts = self._counts, []
        return torch.stack(counts).sum(0) if counts else None

    @torch.no_grad()
    def _count(self, head: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        labels = kwargs.get("labels")
        if not self.armed or labels is None:
            return
        rows, labels = args[0].detach()[:_ROWS], labels[:_ROWS]
        predicted = head.decoder(head.transform(rows)).argmax(-1)
        self._counts.append(torch.stack([(predicted == labels).sum(), (labels != -100).sum()]).double())
