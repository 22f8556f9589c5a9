"""fastbert info | report | embed | fill-mask | verify | warm-up | prepare | pretrain | plot | demo.

A user's mistake ends with one line on stderr and exit status 1, a wrong option with status 2. torch and transformers
are imported inside the commands.
"""

import contextlib
import enum
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastbert.commands.demo import demo
from fastbert.commands.options import DeviceOption, Dtype, DtypeOption, Model, torch_device, torch_dtype
from fastbert.commands.plot import plot
from fastbert.commands.prepare import prepare
from fastbert.commands.pretrain import pretrain
from fastbert.commands.texts import read_texts
from fastbert.commands.warm_up import warm_up
from fastbert.errors import CommonError, InputError
from fastbert.terminal import note, progress

if TYPE_CHECKING:
    import torch

    from fastbert.inference import Tokens
    from fastbert.verify import Verification

app = typer.Typer(
    help="BERT encoders on one packed path, drop-in for transformers' models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_VERIFY_TEXTS = 16
_MANY_UNKNOWN = 0.25


class Pool(str, enum.Enum):
    mean = "mean"
    cls = "cls"


def main() -> None:
    """The command line. Exits with 1 for what the user can mend; anything else keeps its traceback."""
    try:
        app()
    except Exception as error:
        message = _mistake(error)
        if message is None:
            raise
        if not isinstance(error, CommonError) or os.environ.get("RANK", "0") == "0":
            note(message)
        sys.exit(1)


@app.command()
def info() -> None:
    """Versions, the GPU, and what runs each operator."""
    import torch

    import fastbert.functional
    from fastbert import _library

    console = Console()
    about = Table.grid(padding=(0, 2))
    about.add_row("fastbert", fastbert.__version__)
    for package in ("torch", "triton", "transformers"):
        about.add_row(package, _version(package))
    about.add_row("python", platform.python_version())
    about.add_row("GPU", _gpu() or "none")
    about.add_row(
        "C++ extension", "built" if importlib.util.find_spec("fastbert._C") else "not built: a Python fallback runs"
    )
    console.print(about, highlight=False)
    table = Table("operator", "on a GPU", "on a CPU", box=box.SIMPLE_HEAD)
    cpu, cuda = _library.backends("cpu"), _library.backends("cuda")
    for name in sorted(cpu.keys() | cuda.keys()):
        table.add_row(name, *(side.get(name, "none").removesuffix(" (the reference)") for side in (cuda, cpu)))
    console.print(table)
    if not torch.cuda.is_available():
        console.print("There is no GPU here, so everything runs on the CPU.")
    elif not _library.HAS_TRITON:
        console.print("Without Triton, plain PyTorch runs on the GPU.")


@app.command()
def embed(
    model: Model,
    texts: Annotated[Path, typer.Argument(metavar="[TEXTS]", help="A text a line, also .gz; - for stdin.")] = Path("-"),
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The .npy file, float32 (texts, hidden size).")],
    pool: Annotated[Pool, typer.Option(help="The mean of a text's tokens, or its first one.")] = Pool.mean,
    normalize: Annotated[bool, typer.Option(help="Scale each vector to length 1.")] = False,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch; there is no padding.")] = 16384,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a text is cut to. [default: what the model takes]")
    ] = None,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
) -> None:
    """Vectors of texts, a row for each line, empty lines too."""
    from fastbert.inference import Embedder

    with _written_at_once(output) as save:
        lines = read_texts(texts)
        embedder = Embedder.from_pretrained(
            model,
            dtype=torch_dtype(dtype),
            device=torch_device(device),
            pool=pool.value,
            normalize=normalize,
            batch_tokens=batch_tokens,
            max_length=max_length,
        )
        start = time.perf_counter()
        with progress("reading", len(lines), "texts") as advance:
            tokens = embedder.tokenize(lines, advance)
        _warn_of_tokenizer(tokens, model)
        with progress("embedding", len(lines), "texts") as advance:
            vectors = embedder.encode(tokens, advance)
        seconds = time.perf_counter() - start
        save(vectors)
    cut = int((tokens.lengths == embedder.max_length).sum())
    note(
        f"{len(lines):,} texts, {int(tokens.lengths.sum()):,} tokens"
        + (f" ({cut:,} texts at the limit of {embedder.max_length} tokens)" if cut else "")
        + f" in {seconds:.1f} s, {len(lines) / seconds:,.0f} texts/s: {output} {vectors.shape}"
    )


@app.command("fill-mask")
def fill_mask_command(
    model: Model,
    text: Annotated[str, typer.Argument(help="With one [MASK] or several.")],
    *,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to show for each mask.")] = 5,
    dtype: DtypeOption = Dtype.fp32,
    device: DeviceOption = None,
) -> None:
    """The likeliest tokens for each [MASK] in a text."""
    from transformers import AutoModelForMaskedLM

    from fastbert.inference import Embedder, fill_mask, load_model, load_tokenizer
    from fastbert.patching import patch

    loaded = load_model(AutoModelForMaskedLM, model, may_miss=())
    tokenizer = load_tokenizer(model)
    loaded = patch(loaded.to(torch_device(device), torch_dtype(dtype)))  # type: ignore[arg-type]
    filled = fill_mask(loaded, tokenizer, text, top_k)
    _warn_of_tokenizer(Embedder(loaded, tokenizer).tokenize([text]), model)
    console = Console()
    for place, fillings in enumerate(filled, 1):
        table = Table("token", "probability", "text", box=box.SIMPLE_HEAD)
        table.columns[1].justify = "right"
        if len(filled) > 1:
            table.title = f"mask {place} of {len(filled)}"
        for filling in fillings:
            table.add_row(Text(filling.token), f"{filling.probability:.4f}", Text(filling.text))
        console.print(table)


@app.command("report")
def report_command(model: Model, *, dtype: DtypeOption = Dtype.fp32, device: DeviceOption = None) -> None:
    """What is fused in this checkpoint's model, what is not, and which way each of its matrix products takes."""
    from fastbert import patch, report
    from fastbert.verify import load_architecture

    loaded: torch.nn.Module = patch(load_architecture(model))
    typer.echo(report(loaded.to(torch_device(device), torch_dtype(dtype))))


@app.command("verify")
def verify_command(
    model: Model,
    *,
    text: Annotated[Path | None, typer.Option(help="Texts, one a line. [default: random ids]")] = None,
    dtype: DtypeOption = Dtype.fp32,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="For fastbert against transformers, absolute. [default: see below]")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """This checkpoint on fastbert against transformers, and both against transformers in float64.

    All hidden states, outputs and gradients, under seven kinds of attention mask. fp32 must be within 1e-5 of
    transformers or as close to float64 as transformers is; bf16 and fp16 at most twice as far from float64 as
    transformers is, and one rounding. Exit status 1 where that does not hold.
    """
    from fastbert.inference import load_tokenizer, max_tokens
    from fastbert.verify import MASKS, load_architecture, verify

    lines = None if text is None else read_texts(text)
    target = torch_device(device)
    loaded = load_architecture(model)
    sequences, material = None, "random ids"
    if lines is not None:
        tokenizer = load_tokenizer(model)
        limit = max_tokens(loaded)
        sequences = tokenizer(lines[:_VERIFY_TEXTS], truncation=True, max_length=limit)["input_ids"]
        material = f"the first {len(sequences)} of {len(lines)} texts" if len(lines) > _VERIFY_TEXTS else str(text)
    with progress("verifying", len(MASKS), "masks") as advance:
        found = verify(
            loaded, sequences, dtype=torch_dtype(dtype), device=target, tolerance=tolerance, progress=advance
        )
    _print_verification(found, model, material, dtype.value, tolerance)
    if not found.ok:
        raise typer.Exit(1)


app.command("warm-up")(warm_up)
app.command()(prepare)
app.command()(pretrain)
app.command()(plot)
app.command()(demo)


def _print_verification(found: "Verification", name: str, material: str, dtype: str, tolerance: float | None) -> None:
    console = Console()
    console.print(Text(f"{found.model} from {name}", style="bold"), soft_wrap=True)
    console.print(Text(f"{_where(found.device)}, {dtype}, {material}"), soft_wrap=True)
    table = Table(
        "output",
        "fastbert\n-transf.",
        "fastbert\n-float64",
        "transf.\n-float64",
        "1 - cos",
        "worst mask",
        "ok",
        padding=(0, 0),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in table.columns[1:5]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for row in found.worst():
        table.add_row(
            row.output,
            *(f"{number:.1e}" for number in (row.difference, row.fast_error, row.stock_error, 1 - row.cosine)),
            row.mask,
            Text("yes", style="green") if row.ok else Text("NO", style="bold red"),
        )
    console.print(table, highlight=False)
    cases = Table("mask", "batch", "tokens", "calls", "padding", box=box.SIMPLE_HEAD, pad_edge=False)
    for case in found.cases:
        padding = "none" if case.tokens == case.shape[0] * case.shape[1] else "zeros"
        if case.fallbacks:
            padding = "transformers'"
        cases.add_row(
            case.mask,
            f"{case.shape[0]} x {case.shape[1]}",
            f"{case.tokens:,}",
            ", ".join(f"{n} fell back: {why}" for why, n in case.fallbacks.items()) or "packed",
            padding if case.clean else Text("NOT ZERO OR NOT FINITE", style="bold red"),
        )
    console.print(cases, highlight=False)
    if tolerance is not None:
        rule = f"ok: fastbert within {tolerance:g} of transformers."
    elif dtype == "fp32":
        rule = (
            "ok: fastbert within 1e-5 of transformers; or, where transformers' own float32 is not that exact, at most"
            " twice as far from float64 as transformers, and one rounding."
        )
    else:
        rule = "ok: fastbert at most twice as far from float64 as transformers, and one rounding."
    console.print(
        "Outputs: largest difference of an element, on valid tokens. Gradients: of a random projection of all outputs,"
        " ||difference|| / ||gradient|| of each parameter, the worst of the layer; where the gradient is mathematically"
        " zero (keys' biases), relative to the largest one. " + rule,
        style="dim",
        highlight=False,
    )
    failed = [row for row in found.rows if not row.ok]
    unclean = [case.mask for case in found.cases if not case.clean]
    if found.ok:
        console.print(Text(f"verified: {len(found.rows):,} comparisons", style="green"))
        return
    if unclean:
        console.print(Text(f"FAILED: outputs are not finite, or padding is not zero: {', '.join(unclean)}", "bold red"))
    if failed:
        worst = max(failed, key=lambda row: row.used)
        where = f"{worst.output}, {worst.mask}" + (f", {worst.parameter}" if worst.parameter else "")
        console.print(Text(f"FAILED: {len(failed):,} of {len(found.rows):,} comparisons, worst {where}", "bold red"))


def _mistake(error: Exception) -> str | None:
    """One line about what the user can mend, or None for a fault of ours."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    torch = sys.modules.get("torch")
    if isinstance(error, InputError):
        return str(error)
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "the GPU has not enough memory: try fewer --batch-tokens, --dtype bf16 or --device cpu"
    return None


def _warn_of_tokenizer(tokens: "Tokens", model: str) -> None:
    if tokens.unknown > _MANY_UNKNOWN * len(tokens.ids):
        note(f"warning: {tokens.unknown:,} of {len(tokens.ids):,} tokens are unknown to the tokenizer of {model}")
    vocabulary = Path(model) / "vocab.txt"
    settings = ("tokenizer.json", "tokenizer_config.json")
    if vocabulary.is_file() and not any((Path(model) / name).is_file() for name in settings):
        words = vocabulary.read_text(encoding="utf-8").splitlines()
        if any(word != word.lower() and not word.startswith("[") for word in words):
            note(f"warning: {vocabulary} has capitals, but no tokenizer_config.json: transformers lower-cases the text")


def _version(package: str) -> str:
    if package == "triton" and not importlib.util.find_spec(package):
        return "not installed"
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu(device: "torch.device | str | None" = None) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _where(device: "torch.device | str") -> str:
    import torch

    device = torch.device(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return _gpu(device) or str(device)


@contextlib.contextmanager
def _written_at_once(path: Path) -> Iterator[Callable[[object], None]]:
    """A function that saves an array; the file appears at the end, whole, or not at all."""
    import numpy as np

    if path.exists() and not path.is_file():
        raise InputError(f"cannot write {path}: it is no regular file")
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    file: IO[bytes]
    try:
        file = temporary.open("wb")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error

    def save(array: object) -> None:
        try:
            np.save(file, np.asarray(array))
            file.close()
            os.replace(temporary, target)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error

    try:
        yield save
    finally:
        file.close()
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
