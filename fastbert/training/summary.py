"""What a run says of itself at its start."""

from collections.abc import Sequence
from typing import Any

import torch

from fastbert.data.pretraining import Phase, Sampling
from fastbert.data.store import Store
from fastbert.machine import where
from fastbert.terminal import counted
from fastbert.training.recipe import Recipe

WORDS = {"mlm+nsp": "masked LM", "mlm": "masked LM", "left-to-right": "next word"}


def summary(
    recipe: Recipe, store: Store, model: Any, held_out: str, device: torch.device, world_size: int
) -> list[tuple[str, str]]:
    """What there is to do, and with what: names and values, in words."""
    config, sampling, phases = model.config, recipe.sampling, recipe.phase_steps()
    objective = WORDS[sampling.objective] + (" and next sentence" if sampling.objective == "mlm+nsp" else "")
    if sampling.objective != "left-to-right":
        objective += f", {100 * sampling.mask_rate:.3g}% of the tokens masked, by {sampling.masking}"
    tokens = sum(phase.steps * tokens_a_step(sampling, phase.max_length) for phase in phases)
    warmup = f"{recipe.learning_rate:g}, falling linearly to 0"
    if recipe.warmup:
        warmup = f"{recipe.learning_rate:g} after a warm-up of {counted(recipe.warmup, 'step')}, falling linearly to 0"
    return [
        (
            "model",
            f"{recipe.init_from or recipe.config}: {model.num_parameters():,} parameters,"
            f" {counted(config.num_hidden_layers, 'layer')} of {config.hidden_size:,},"
            f" vocabulary of {config.vocab_size:,}",
        ),
        ("objective", objective),
        ("corpus", f"{store.path}: {counted(store.documents, 'document')}, {counted(store.tokens, 'token')}"),
        ("held out", held_out),
        ("steps", f"{recipe.steps:,} of {_batch(sampling)}; {_phases(phases)}"),
        ("tokens", f"at most {tokens:,}, {tokens / store.tokens:,.3g} times the corpus"),
        ("learning rate", warmup),
        ("device", f"{devices(device, world_size, 'FSDP' if recipe.fsdp else 'DDP')}; {recipe.dtype}"),
    ]


def devices(device: torch.device, world_size: int, together: str = "DDP") -> str:
    """Where a run is. Args: together: how several processes share the work."""
    return (f"{world_size:,} processes, {together}; " if world_size > 1 else "") + where(device)


def tokens_a_step(sampling: Sampling, max_length: int) -> int:
    """At most."""
    if sampling.batch_tokens is not None:
        return sampling.batch_tokens
    assert sampling.batch_size is not None
    return sampling.batch_size * max_length


def tokens_of_steps(phases: Sequence[Phase], step: int) -> float:
    """What the steps up to one cost, where a step costs about as its max_length goes."""
    cost = 0.0
    for phase in phases:
        steps = min(step, phase.steps)
        cost += steps * phase.max_length
        step -= steps
    return cost


def _batch(sampling: Sampling) -> str:
    if sampling.batch_tokens is not None:
        return f"at most {counted(sampling.batch_tokens, 'token')}"
    assert sampling.batch_size is not None
    return counted(sampling.batch_size, "sequence")


def _phases(phases: Sequence[Phase]) -> str:
    there = [phase for phase in phases if phase.steps]  # a run of few steps may have none of the last
    return ", then ".join(
        f"{counted(phase.steps, 'step') if len(there) > 1 else 'all'} of up to {counted(phase.max_length, 'token')}"
        for phase in there
    )


def aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines)
