"""fastbert pretrain: BERT from a token store."""

import enum
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.commands.interrupted import saying_what_is_kept
from fastbert.commands.options import torch_device
from fastbert.errors import InputError, require, require_posix

_DEFAULTS = {
    "objective": "mlm+nsp",
    "phases": ((128, 0.9), (512, 0.1)),
    "steps": 1_000_000,
    "learning_rate": 1e-4,
}


class Objective(str, enum.Enum):
    mlm_nsp = "mlm+nsp"
    mlm = "mlm"
    left_to_right = "left-to-right"


class Masked(str, enum.Enum):
    token = "token"
    whole_word = "whole-word"
    span = "span"


class Precision(str, enum.Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class NonFinite(str, enum.Enum):
    stop = "stop"
    continue_ = "continue"


def pretrain(
    *,
    data: Annotated[Path, typer.Option(help="A token store, of `fastbert prepare`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder. A run in there goes on.")],
    config: Annotated[
        str | None,
        typer.Option(
            help="tiny, mini, small, medium, base, large, ..., a BertConfig's JSON file, or a folder.",
            show_default="base",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint to begin with, instead of random weights of --config. Other defaults hold then, which"
            " the summary at the start names."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimiser steps, of all phases.", show_default="1,000,000")
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(help="max_length:share of the steps, one after the other.", show_default="128:0.9,512:0.1"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a step, over all processes.")] = 256,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Instead: at most so many tokens in a step, packed full.")
    ] = None,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches of each process in a step.")] = 1,
    objective: Annotated[Objective | None, typer.Option(help="What is predicted.", show_default="mlm+nsp")] = None,
    masking: Annotated[Masked, typer.Option(help="What is masked together.")] = Masked.token,
    mask_rate: Annotated[float, typer.Option(help="Share of the tokens to predict, above 0.")] = 0.15,
    mask_rates: Annotated[
        str, typer.Option(help="Of these: replaced by [MASK], by a random token, kept.")
    ] = "0.8,0.1,0.1",
    max_predictions: Annotated[
        int | None, typer.Option(min=1, help="In a sequence at most.", show_default="any number")
    ] = None,
    static_masks: Annotated[
        int, typer.Option(min=0, help="Masks repeat after so many epochs; 0 for fresh ones always.")
    ] = 0,
    learning_rate: Annotated[
        float | None, typer.Option(help="At the end of the warm-up; falls linearly.", show_default="0.0001")
    ] = None,
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps.", show_default="10,000, or 1% of fewer steps")
    ] = None,
    weight_decay: Annotated[float, typer.Option(min=0, help="Not of LayerNorms and biases.")] = 0.01,
    clip: Annotated[float, typer.Option(min=0, help="The gradient's largest norm; 0 for any.")] = 1.0,
    dropout: Annotated[
        float | None, typer.Option(help="Of hidden states and attention.", show_default="the configuration's")
    ] = None,
    dtype: Annotated[
        Precision | None, typer.Option(help="What is computed in.", show_default="bf16 on a GPU, fp32 on a CPU")
    ] = None,
    residual_bf16: Annotated[
        bool, typer.Option("--residual-bf16", help="With bf16: hidden states between layers too.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Keep little for the backward, and compute it again.")
    ] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the model over processes, with FSDP2.")] = False,
    non_finite_loss: Annotated[
        NonFinite,
        typer.Option(help="Of a step whose loss or gradient is not finite: stop, or continue without that step."),
    ] = NonFinite.stop,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps.", show_default="5,000, or a fifth of fewer than 25,000")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Checkpoints.")] = 3,
    log_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 100,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Steps between evaluations on what `prepare --held-out` set aside; 0 for none.",
            show_default="as --save-every, and 20 times at least",
        ),
    ] = None,
    eval_sequences: Annotated[int, typer.Option(min=1, help="To evaluate on, at most.")] = 1024,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="wandb, mlflow, comet_ml, ...: an integration of transformers that gets the figures, too."),
    ] = None,
    threads: Annotated[int, typer.Option(min=0, help="Of the input pipeline; 0 for one a core.")] = 0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")] = None,
) -> None:
    """Pretrain BERT, with the paper's recipe where no option says otherwise.

    Goes on from the last checkpoint in --output. On several GPUs: torchrun --nproc-per-node 8 -m fastbert pretrain.
    """
    require_posix(to="pretrain")
    require("accelerate", "tensorboard", to="pretrain")  # at once: the imports below take seconds
    import torch

    from fastbert.data.pretraining import Sampling
    from fastbert.data.store import Store
    from fastbert.training.continued import choose
    from fastbert.training.pretraining import pretrain as train
    from fastbert.training.recipe import Recipe

    target = None if device is None else torch_device(device)
    if config is not None and init_from is not None:
        raise InputError("--init-from brings its own configuration: give it or --config, not both")
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    rates = numbers("--mask-rates", mask_rates)
    if len(rates) != 3 or min(rates) < 0 or not abs(sum(rates) - 1) <= 1e-6:
        raise InputError(f"--mask-rates must be three shares that add up to 1, but is {mask_rates}")
    sampling = Sampling(
        masking=masking.value,
        mask_rate=mask_rate,
        replace_by_mask=rates[0],
        replace_by_random=rates[1],
        max_predictions=max_predictions or 0,
        static_copies=static_masks,
        batch_size=batch_size if batch_tokens is None else None,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    options: dict[str, Any] = {
        "objective": None if objective is None else objective.value,
        "phases": None if phases is None else _phases(phases),
        "steps": steps,
        "learning_rate": learning_rate,
        "warmup": warmup,
    }
    notes: list[str] = []
    if init_from is None:
        options |= {name: value for name, value in _DEFAULTS.items() if options[name] is None}
        options["warmup"] = min(10_000, options["steps"] // 100) if warmup is None else warmup
    else:
        options, notes = choose(init_from, Store.open(data, verify=False), sampling, options)
    recipe = Recipe(
        config=None if init_from is not None else config or "base",
        init_from=init_from,
        steps=options["steps"],
        phases=options["phases"],
        sampling=replace(sampling, objective=options["objective"]),
        learning_rate=options["learning_rate"],
        warmup=options["warmup"],
        weight_decay=weight_decay,
        clip=clip,
        dropout=dropout,
        dtype=dtype.value if dtype is not None else "fp32" if on_cpu else "bf16",
        residual_dtype="bf16" if residual_bf16 else None,
        accumulation=accumulation,
        gradient_checkpointing=gradient_checkpointing,
        fsdp=fsdp,
        non_finite_loss=non_finite_loss.value,
        save_every=save_every or min(5_000, max(1, options["steps"] // 5)),
        keep=keep,
        log_every=log_every,
        threads=threads,
        eval_every=eval_every,
        eval_sequences=eval_sequences,
        report_to=tuple(report_to or ()),
    )
    with saying_what_is_kept(lambda: _kept(output)):
        train(recipe, data, output, device=target, notes=notes)


def _kept(output: Path) -> str:
    from fastbert.training.checkpoints import last_checkpoint

    last = last_checkpoint(output)
    if last is None:
        return " before the first checkpoint (--save-every): the same command begins anew"
    return f"; {last} is whole: the same command goes on from there"


def numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} must be numbers with commas between them, but is {text}") from error


def _phases(text: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [phase.split(":") for phase in text.split(",")]
        return tuple((int(length), float(share)) for length, share in pairs)
    except ValueError as error:
        raise InputError(f"--phases must be like 128:0.9,512:0.1, but is {text}") from error
