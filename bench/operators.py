"""What the benches of single operators share: a step of forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor


def forward_backward(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Tensor]:
    """A step that computes function(*leaves) and all gradients; what must agree is the first leaf's."""
    gradient: list[Tensor] = []

    def step() -> Tensor:
        own = [leaf.detach().requires_grad_() for leaf in leaves]
        y = function(*own)
        if not gradient:
            generator = torch.Generator(y.device).manual_seed(1)
            gradient.append(torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype))
        return torch.autograd.grad(y, own, gradient[0])[0]

    return step
