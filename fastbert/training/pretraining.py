"""Pretraining, start to end: a recipe, a token store, a run's folder."""

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoTokenizer, TrainingArguments

from fastbert.data.pretraining import PretrainingBatches
from fastbert.data.store import HELD_OUT, Store, read_json
from fastbert.errors import InputError, require
from fastbert.terminal import counted, note
from fastbert.training import checkpoints, distributed, files, live, logs, models, reporting, summary, trainer
from fastbert.training.evaluation import Evaluate, Evaluation, evaluated_length, has_held_out
from fastbert.training.files import MODEL as MODEL
from fastbert.training.kernels import CompiledAhead
from fastbert.training.pretraining_trainer import PretrainingTrainer
from fastbert.training.recipe import Recipe

_ALONE = "FSDP shards over several processes, which torchrun starts, with a GPU each"


def pretrain(
    recipe: Recipe, data: Path, output: Path, *, device: torch.device | None = None, notes: Sequence[str] = ()
) -> Path:
    """Train, from the last checkpoint in `output` if there is one, and write the model to `output/model`.

    Under torchrun, all processes call this.

    Args:
        device: None for a GPU if there is one.
        notes: what else to say in the summary at the start.

    Returns:
        The model's folder, for `from_pretrained` of transformers or fastbert.

    Raises:
        InputError: naming what cannot be: an option, the corpus, a checkpoint of another run, a missing package.
    """
    require("accelerate", "tensorboard", to="pretrain")
    recipe.check()
    reporters = reporting.callbacks(recipe.report_to)
    if device is not None and device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch sees no GPU here")
    transformers.utils.logging.disable_progress_bar()  # of every file it writes
    on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
    distributed.join(on_cpu)
    arguments = _arguments(recipe, output, on_cpu)
    rank, world_size = arguments.process_index, arguments.world_size
    store = Store.open(data, verify=rank == 0)
    model, new = models.to_pretrain(recipe, store)
    phases = recipe.phase_steps()
    for phase in phases:
        if phase.max_length > model.config.max_position_embeddings:
            raise InputError(
                f"a phase has sequences of {phase.max_length} tokens, but the model's max_position_embeddings is"
                f" {model.config.max_position_embeddings}"
            )
    batches = PretrainingBatches(
        store,
        recipe.sampling,
        phases,
        rank=rank,
        world_size=world_size,
        accumulation=recipe.accumulation,
        threads=recipe.threads,
    )
    evaluation, held_out = _evaluation(recipe, data, rank, world_size)
    with distributed.rank_zero_first(world_size, rank):
        if rank == 0:
            files.adopt(output, recipe.saved(store, model.config))
            checkpoints.remove_drafts(output)
    checkpoint = checkpoints.last_checkpoint(output)
    step = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
    if step == recipe.steps and (output / MODEL).is_dir():
        if rank == 0:
            note(
                f"already finished: {counted(step, 'step')}, {output / MODEL}; to train on after the end, begin another"
                f" run with --init-from {output / MODEL}"
            )
        return output / MODEL
    if rank == 0:
        logs.cut(output / logs.LOG, -1 if checkpoint is None else step)
        lines = summary.summary(recipe, store, model, held_out, arguments.device, world_size)
        if new:
            lines.append(("new", f"{' and '.join(new)}, of which {recipe.init_from} has none: random at first"))
        lines += [("chosen" if i == 0 else "", words) for i, words in enumerate(notes)]
        note(f"pretraining in {output}\n{summary.aligned(lines)}")
        if checkpoint is not None:
            note(f"resumed at step {step:,} of {recipe.steps:,}, of {checkpoint.name}")
    best = read_json(output / files.BEST / files.EVALUATION)
    terminal = live.Terminal(
        live.of_pretraining(summary.WORDS[recipe.sampling.objective]),
        recipe.steps,
        float if recipe.sampling.batch_tokens is not None else partial(summary.tokens_of_steps, phases),
        best=None if best is None else (best["step"], best["eval_mlm_loss"]),
    )
    pretrainer = PretrainingTrainer(
        model=model,
        args=arguments,
        # Of the store nobody knows what a model takes, and a tokenizer without a limit cuts no text.
        processing_class=AutoTokenizer.from_pretrained(
            store.path, model_max_length=model.config.max_position_embeddings
        ),
        callbacks=[
            CompiledAhead(max(phase.max_length for phase in phases), output / logs.LOG),
            terminal,
            logs.LogFile(output / logs.LOG),
            logs.TensorBoard(output / logs.TENSORBOARD),
            *([] if evaluation is None else [Evaluate(recipe.evaluated_every)]),
            *reporters,
        ],
        batches=batches,
        keep=recipe.keep,
        stop=recipe.non_finite_loss == "stop",
        evaluation=evaluation,
    )
    if recipe.fsdp and not pretrainer.is_fsdp_enabled:  # accelerate would say nothing, and train without
        raise InputError(_ALONE)
    torch.manual_seed((recipe.sampling.seed * 100_003 + rank) % 2**63)  # other dropout masks in every process
    if checkpoint is not None:
        pretrainer.load_data_state(checkpoint)
    with (
        contextlib.closing(terminal),
        trainer.without_words(),
        distributed.by_layer() if recipe.fsdp else contextlib.nullcontext(),
    ):
        pretrainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    pretrainer.save_final(output / MODEL)
    if rank == 0:
        note(f"{output / MODEL} is the model, for from_pretrained of transformers or fastbert")
    return output / MODEL


def _evaluation(recipe: Recipe, data: Path, rank: int, world_size: int) -> tuple[Evaluation | None, str]:
    """On the corpus' held-out part, and what to say of it."""
    if recipe.eval_every == 0:
        return None, "not looked at, --eval-every is 0"
    if not has_held_out(data):
        if recipe.eval_every is not None:
            raise InputError(f"{data} has no held-out part to evaluate on: fastbert prepare --held-out makes one")
        return None, "nothing, fastbert prepare --held-out would set some aside"
    store = Store.open(data / HELD_OUT, verify=rank == 0)
    length = evaluated_length([length for length, _ in recipe.phases])
    evaluation = Evaluation(store, recipe.sampling.objective, length, recipe.eval_sequences, rank, world_size)
    every = recipe.evaluated_every
    return evaluation, (
        f"{counted(store.documents, 'document')}, {counted(store.tokens, 'token')};"
        f" {counted(evaluation.sequences, 'sequence')} of up to {length} tokens, every"
        f" {'step' if every == 1 else counted(every, 'step')}"
    )


def _arguments(recipe: Recipe, output: Path, on_cpu: bool) -> TrainingArguments:
    options: dict[str, Any] = {}
    if recipe.fsdp and not torch.distributed.is_initialized():
        raise InputError(_ALONE)
    if recipe.fsdp:
        options["fsdp"] = True if Version(transformers.__version__) >= Version("5.20") else "full_shard auto_wrap"
        options["fsdp_config"] = {
            "fsdp_version": 2,
            "transformer_layer_cls_to_wrap": ["BertLayer"],
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_ram_efficient_loading": False,
        }
    if recipe.gradient_checkpointing:
        renamed = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
        name = "activation_checkpointing" if renamed else "gradient_checkpointing"
        options |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return trainer.arguments(
        output,
        on_cpu,
        max_steps=recipe.steps,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        warmup_steps=recipe.warmup,
        bf16=recipe.dtype == "bf16",
        save_steps=recipe.save_every,
        logging_steps=recipe.log_every,
        seed=recipe.sampling.seed % 2**32,
        **options,
    )
