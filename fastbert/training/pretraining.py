"""Pretraining, start to end: a recipe, a token store, a run's folder."""

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoTokenizer, TrainingArguments

import fastbert
from fastbert.data.pretraining import PretrainingBatches
from fastbert.data.store import Store, read_json, write_json
from fastbert.errors import InputError, require
from fastbert.training import checkpoints, distributed, logs
from fastbert.training.files import RUN
from fastbert.training.kernels import CompiledAhead
from fastbert.training.recipe import Recipe, check_config, differences, load_config
from fastbert.training.trainer import PretrainingTrainer

_ALONE = "FSDP shards over several processes, which torchrun starts, with a GPU each"
MODEL = "model"
_CLASSES = {
    "mlm+nsp": fastbert.BertForPreTraining,
    "mlm": fastbert.BertForMaskedLM,
    "left-to-right": fastbert.BertLMHeadModel,
}


def pretrain(recipe: Recipe, data: Path, output: Path, *, device: torch.device | None = None) -> Path:
    """Train, from the last checkpoint in `output` if there is one, and write the model to `output/model`.

    Under torchrun, all processes call this.

    Args:
        device: None for a GPU if there is one.

    Returns:
        The model's folder, for `from_pretrained` of transformers or fastbert.

    Raises:
        InputError: naming what cannot be: an option, the corpus, a checkpoint of another run, a missing package.
    """
    require("accelerate", "tensorboard", to="pretrain")
    recipe.check()
    transformers.utils.logging.disable_progress_bar()  # of every file it writes
    on_cpu = device.type == "cpu" if device is not None else not torch.cuda.is_available()
    distributed.join(on_cpu)
    arguments = _arguments(recipe, output, on_cpu)
    rank, world_size = arguments.process_index, arguments.world_size
    store = Store.open(data, verify=rank == 0)
    model = _model(recipe, store)
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
    with distributed.rank_zero_first(world_size, rank):
        if rank == 0:
            _adopt(output, recipe, store, model.config)
            checkpoints.remove_drafts(output)
    checkpoint = checkpoints.last_checkpoint(output)
    if rank == 0:
        logs.cut(output / logs.LOG, 0 if checkpoint is None else int(checkpoint.name.split("-")[1]))
    terminal = logs.Terminal()
    trainer = PretrainingTrainer(
        model=model,
        args=arguments,
        processing_class=AutoTokenizer.from_pretrained(store.path),
        callbacks=[
            CompiledAhead(max(phase.max_length for phase in phases), output / logs.LOG),
            terminal,
            logs.LogFile(output / logs.LOG),
            logs.TensorBoard(output / logs.TENSORBOARD),
        ],
        batches=batches,
        keep=recipe.keep,
        stop=recipe.non_finite_loss == "stop",
    )
    if recipe.fsdp and not trainer.is_fsdp_enabled:  # accelerate would say nothing, and train without
        raise InputError(_ALONE)
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    torch.manual_seed((recipe.sampling.seed * 100_003 + rank) % 2**63)  # other dropout masks in every process
    if checkpoint is not None:
        trainer.load_data_state(checkpoint)
    with contextlib.closing(terminal), distributed.by_layer() if recipe.fsdp else contextlib.nullcontext():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_final(output / MODEL)
    return output / MODEL


def _model(recipe: Recipe, store: Store) -> Any:
    """The same in every process: all of it comes from the seed."""
    if recipe.sampling.objective not in _CLASSES:
        raise InputError(f"the objective {recipe.sampling.objective} has no model")
    kind: Any = _CLASSES[recipe.sampling.objective]
    options = {"is_decoder": True, "use_cache": False} if recipe.sampling.objective == "left-to-right" else {}
    torch.manual_seed(recipe.sampling.seed)
    if recipe.init_from is not None:
        try:
            model = kind.from_pretrained(recipe.init_from, dtype=torch.float32, **options)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{recipe.init_from}: {str(error).strip().splitlines()[0]}") from error
        check_config(model.config, recipe.init_from, store)
        if broken := [name for name, p in model.named_parameters() if not p.isfinite().all()]:
            raise InputError(f"{recipe.init_from} has weights that are not finite: {broken[0]}")
    else:
        assert recipe.config is not None
        config = load_config(recipe.config, store)
        config.update(options)
        model = kind(config)
    if recipe.dropout is not None:
        model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = recipe.dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = recipe.dropout
    return fastbert.patch(model, residual_dtype=recipe.residual_dtype)


def _arguments(recipe: Recipe, output: Path, on_cpu: bool) -> TrainingArguments:
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is no folder")
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
        options["gradient_checkpointing"] = True
        options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if torch.distributed.is_initialized():
        options["ddp_backend"] = torch.distributed.get_backend()
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=recipe.steps,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        optim="adamw_torch_fused",
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        adam_epsilon=recipe.epsilon,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        bf16=recipe.dtype == "bf16",
        save_strategy="steps",
        save_steps=recipe.save_every,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,  # it waits for the GPU in every step
        ignore_data_skip=True,  # the batches know where they are
        average_tokens_across_devices=False,  # the trainer counts by itself
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants
        report_to="none",
        disable_tqdm=True,
        seed=recipe.sampling.seed % 2**32,
        use_cpu=on_cpu,
        **options,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # DataParallel would cut packed batches; torchrun is for several GPUs
    return arguments


def _adopt(output: Path, recipe: Recipe, store: Store, config: Any) -> None:
    """Begin a run's folder, or see that it is this run's."""
    output.mkdir(parents=True, exist_ok=True)
    now = recipe.saved(store, config)
    before = read_json(output / RUN)
    if before is None:
        if checkpoints.last_checkpoint(output) is not None:
            raise InputError(f"{output} has checkpoints, but no {RUN}: they are another program's")
    elif changed := differences(before.get("fixed", {}), now["fixed"]):
        raise InputError(
            f"{output} is another run: {'; '.join(changed[:3])}{' ...' if len(changed) > 3 else ''}."
            " Go on with its options, or choose another folder"
        )
    write_json(output / RUN, now)
