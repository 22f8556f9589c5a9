"""python -m bench beside | compare | report | gpu | tune | gelu | serve"""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from fastbert.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Results = Annotated[Path, typer.Option(help="folder for what is written")]
Budget = Annotated[float, typer.Option(help="seconds in all")]
Device = Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal")]
Smallest = Annotated[bool, typer.Option("--smallest", help="only the smallest cases")]
Texts = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a text a line")]
HERE = "cuda" if torch.cuda.is_available() else "cpu"


@app.command()
def gpu(
    results: Results = Path(".out/gpu"), budget: Budget = 540, device: Device = HERE, smallest: Smallest = False
) -> None:
    """Tests, ceilings, kernels, models, the most important first."""
    from bench.gpu import main

    raise typer.Exit(main(device=device, results=results, budget=budget, smallest=smallest))


@app.command()
def tune(
    results: Results = Path(".out/tune"), budget: Budget = 540, device: Device = HERE, smallest: Smallest = False
) -> None:
    """Which tiles the kernels should take."""
    from bench.answers import main

    raise typer.Exit(main(device=device, results=results, budget=budget, smallest=smallest))


@app.command()
def report() -> None:
    """The README's tables, and pages and pictures of all runs in bench/results."""
    from bench.report import main

    raise typer.Exit(main())


@app.command()
def gelu() -> None:
    """Errors of the kernels' GELU against float64."""
    from bench.gelu import main

    main()


@app.command()
def serve(model: str, texts: Texts, dtype: str = "fp32", device: Device = HERE) -> None:
    """Throughput of `fastbert serve` under a load from another process, against one offline run."""
    from bench.serving import main

    main(model, texts, dtype=dtype, device=device)


@app.command()
def beside(
    task: str,
    data: str,
    model: str | None = None,
    dev: str | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    learning_rate: float = 1e-4,
    seed: int = 1,
    train_part: int | None = None,
    dev_part: int | None = None,
    dev_share: float = 0.1,
    features: str | None = None,
    what: Annotated[str, typer.Option(help="the data, in words")] = "",
    results: Annotated[Path, typer.Option(help="a .jsonl that gets a line")] = Path(".out/finetuning-runs.jsonl"),
) -> None:
    """A fine-tuning by fastbert and the same one by transformers' Trainer."""
    from bench.beside import main
    from fastbert.demo import find_model
    from fastbert.tasks import registry
    from fastbert.tasks.tagging.frozen import RECIPE as FROZEN
    from fastbert.tasks.task import Given
    from fastbert.training.tuning import Tuning

    given = Given(train=data, dev=dev)
    recipe = registry.make(task, given).recipe if features is None else FROZEN
    tuning = Tuning(
        str(model or find_model()),
        epochs=epochs or recipe.epochs,
        batch_size=batch_size or recipe.batch_size,
        learning_rates=(learning_rate,),
        seeds=(seed,),
        log_every=100,
    )
    results.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    main(task, given, tuning, results, (train_part, dev_part), dev_share, features, what, command)


@app.command()
def compare(before: Path, after: Path) -> None:
    """What moved beyond its spread from one run to another."""
    from bench.compare import main

    try:
        raise typer.Exit(main(before, after))
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        sys.exit(f"error: {error}")
