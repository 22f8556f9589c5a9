"""fastbert finetune: a checkpoint for a task."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.commands.interrupted import saying_what_is_kept
from fastbert.commands.options import torch_device
from fastbert.commands.pretrain import NonFinite, numbers
from fastbert.commands.pretrain import Precision as TrainingPrecision
from fastbert.errors import require, require_posix


def finetune(
    task: Annotated[
        str,
        typer.Argument(
            help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli (GLUE); squad, squad2; swag, hellaswag, choice;"
            " ner, tag; or on files of your own: classify, multilabel, regress."
        ),
    ],
    *,
    model: Annotated[str, typer.Option(help="A checkpoint's directory, or a model on the Hugging Face hub.")],
    data: Annotated[
        str,
        typer.Option(
            help="What to train on: the task's folder (GLUE, CoNLL), a file (.csv, .tsv, .jsonl, .parquet, .json of"
            " SQuAD), or dataset:NAME."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The run's folder. A run in there goes on.")],
    dev: Annotated[
        str | None,
        typer.Option(help="What to judge on.", show_default="the folder's own, or a tenth of the training data"),
    ] = None,
    text: Annotated[str | None, typer.Option(help="The column with the texts.", show_default="text")] = None,
    pair: Annotated[str | None, typer.Option(help="The column with the second text of each row.")] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            help="The column with a list of choices, or the columns, with commas between (choice).",
            show_default="choices",
        ),
    ] = None,
    label: Annotated[str | None, typer.Option(help="The column with the labels.", show_default="label")] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="The classes in the model's order, with commas between.", show_default="those there are"),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Between several labels of a cell (multilabel).", show_default=",")
    ] = None,
    dev_share: Annotated[float, typer.Option(help="Of the data, set aside to judge on where there is no --dev.")] = 0.1,
    epochs: Annotated[float | None, typer.Option(help="Over the data.", show_default="the task's recipe")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples in a step, over all processes.", show_default="the task's recipe")
    ] = None,
    learning_rate: Annotated[
        str | None,
        typer.Option(
            help="At the end of the warm-up; several, as 5e-5,4e-5,3e-5,2e-5, are a training each.",
            show_default="the task's recipe",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="So many trainings of each learning rate.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first seed.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share of the steps.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(min=0, help="Not of LayerNorms and biases.")] = 0.01,
    clip: Annotated[float, typer.Option(min=0, help="The gradient's largest norm; 0 for any.")] = 1.0,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence.", show_default="the task's, or the model's")
    ] = None,
    doc_stride: Annotated[int, typer.Option(min=0, help="Tokens that windows of a long text have in common.")] = 128,
    dropout: Annotated[float | None, typer.Option(help="Everywhere.", show_default="the checkpoint's")] = None,
    dtype: Annotated[
        TrainingPrecision | None,
        typer.Option(help="What is computed in.", show_default="bf16 on a GPU, fp32 on a CPU"),
    ] = None,
    keep_head: Annotated[bool, typer.Option("--keep-head", help="Begin with the checkpoint's own head.")] = False,
    features: Annotated[
        str | None,
        typer.Option(
            help="Of ner and tag: train no weight of the checkpoint, but a BiLSTM over its hidden states: embeddings,"
            " second-to-last, last, weighted-sum, last-4-sum, last-4-concat."
        ),
    ] = None,
    features_memory: Annotated[float, typer.Option(min=0, help="GiB that hidden states may take.")] = 4.0,
    accumulation: Annotated[int, typer.Option(min=1, help="Batches of each process in a step.")] = 1,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations.", show_default="an epoch")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default="an epoch")
    ] = None,
    log_every: Annotated[int, typer.Option(min=1, help="Steps.")] = 10,
    non_finite_loss: Annotated[
        NonFinite,
        typer.Option(help="Of a step whose loss or gradient is not finite: stop, or continue without that step."),
    ] = NonFinite.stop,
    test: Annotated[
        bool, typer.Option("--test", help="Predict the task's test data too, as it is submitted to be judged.")
    ] = False,
    report_to: Annotated[
        list[str] | None,
        typer.Option(help="wandb, mlflow, comet_ml, ...: an integration of transformers that gets the figures, too."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")] = None,
) -> None:
    """Fine-tune a checkpoint for a task, with the paper's recipe where no option says otherwise.

    Goes on by itself with a run in --output. With several learning rates or seeds the model that is best on dev is
    kept. On several GPUs: torchrun --nproc-per-node 8 -m fastbert finetune.
    """
    require_posix(to="fine-tune")
    require("accelerate", "tensorboard", "sklearn", "scipy", "pyarrow", to="fine-tune")  # imports take seconds
    import torch

    from fastbert.tasks import registry
    from fastbert.tasks.tagging.frozen import RECIPE as FROZEN
    from fastbert.tasks.task import Given, columns_of
    from fastbert.training import reporting
    from fastbert.training.finetuning import Finetuning
    from fastbert.training.frozen import FrozenRun
    from fastbert.training.tuning import Tuning

    target = None if device is None else torch_device(device)
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    names = None if labels is None else tuple(name.strip() for name in labels.split(","))
    given = Given(
        train=data,
        dev=dev,
        text=text,
        pair=pair,
        choices=columns_of(choices),
        label=label,
        separator=separator,
        labels=names,
    )
    made = registry.make(task, given)
    recipe = made.recipe if features is None else FROZEN
    rates = [recipe.learning_rate] if learning_rate is None else numbers("--learning-rate", learning_rate)
    tuning = Tuning(
        model=model,
        epochs=recipe.epochs if epochs is None else epochs,
        batch_size=batch_size or recipe.batch_size,
        learning_rates=tuple(rates),
        seeds=tuple(range(seed, seed + seeds)),
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        max_length=max_length,
        doc_stride=doc_stride,
        dropout=dropout,
        dtype=dtype.value if dtype is not None else "fp32" if on_cpu else "bf16",
        keep_head=keep_head,
        accumulation=accumulation,
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        non_finite_loss=non_finite_loss.value,
    )
    options: dict[str, Any] = {
        "dev_share": dev_share,
        "device": target,
        "reporters": reporting.callbacks(report_to or ()),
    }
    with saying_what_is_kept(lambda: f"; what is whole in {output} stays, and the same command goes on"):
        if features is None:
            run = Finetuning(made, tuning, output, **options)
        else:
            run = FrozenRun(made, tuning, output, features, memory=features_memory, **options)
        run()
        if test:
            run.write_tests()
