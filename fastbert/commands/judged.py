"""What the commands share that write what a model's head makes of each row."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbert.commands.options import BatchTokensOption, DeviceOption, Precision, PrecisionOption, torch_device
from fastbert.commands.streamed import (
    ForceOption,
    FormatOption,
    IdKeyOption,
    ResumeOption,
    StreamedRun,
    WindowOption,
)

if TYPE_CHECKING:
    from fastbert.inference.heads import HeadEngine
    from fastbert.inference.inputs import Row, Texts

JsonLinesOption = Annotated[Path, typer.Option("--output", "-o", help="The .jsonl file, an object for each row.")]
PairsArgument = Annotated[
    Path,
    typer.Argument(metavar="[PAIRS]", help="A .jsonl, .csv, .tsv or .parquet; also .gz, .zst, .xz, .bz2; - for stdin."),
]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Options that all of them have."""

    id_key: IdKeyOption = None
    format: FormatOption = None
    batch_tokens: BatchTokensOption = None
    max_length: Annotated[int | None, typer.Option(help="Tokens of an input.", show_default="what the model takes")] = (
        None
    )
    dtype: PrecisionOption = Precision.fp32
    device: DeviceOption = None
    window: WindowOption = 4096
    resume: ResumeOption = False
    force: ForceOption = False

    def run(
        self,
        engine: "str | type[HeadEngine]",
        model: str,
        path: Path,
        keys: Mapping[str, str],
        output: Path,
        record: Callable[[Any], Mapping[str, Any]],
        *,
        suffixes: Sequence[str] = (".jsonl",),
        column: str = "",
        texts: "Texts | None" = None,
        **options: Any,
    ) -> None:
        """Run a file through an engine into another one.

        Args:
            engine: its class, or its name in fastbert.
            keys: columns with the texts, by the options that name them.
            record: what a row of .jsonl has for a result, besides the id.
            suffixes, column: of `formats.format_of`.
            texts: of `Rows`.
            options: of the engine.

        Raises:
            InputError: see `StreamedRun`, `Rows` and the engine.
        """
        import fastbert
        from fastbert.inference.formats import format_of
        from fastbert.inference.inputs import Rows

        def whole(row: "Row", result: Any) -> dict[str, Any]:
            return {"id": row.id, **record(result)}

        form = format_of(output, suffixes, record=whole, column=column)
        rows = Rows(path, keys, self.id_key, self.format, texts)
        run = StreamedRun(rows, output, form, resume=self.resume, force=self.force, window=self.window)
        if run.finished:
            return
        kind = getattr(fastbert, engine) if isinstance(engine, str) else engine
        made = kind.from_pretrained(
            model,
            dtype=self.dtype.value,
            device=torch_device(self.device),
            batch_tokens=self.batch_tokens,
            max_length=self.max_length,
            **options,
        )
        run(made, model, {}, "running")


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of `Shared` behind its own, which it gets as its argument `shared`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "shared"]
    shared = list(inspect.signature(Shared).parameters.values())

    @functools.wraps(command)
    def wrapped(**given: Any) -> None:
        command(**{p.name: given[p.name] for p in own}, shared=Shared(**{p.name: given[p.name] for p in shared}))

    wrapped.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *shared)}
    return wrapped
