"""What commands share that run a file of texts through an engine into a file of results."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastbert.commands.interrupted import saying_what_is_kept
from fastbert.commands.texts import say_who_is_waited_for, warn_of_rows, warn_of_tokenizer
from fastbert.errors import InputError
from fastbert.terminal import bar, counted, note

if TYPE_CHECKING:
    from fastbert.inference.formats import Format
    from fastbert.inference.inputs import Rows

ForceOption = Annotated[bool, typer.Option("--force", help="Take the place of an output that is there.")]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Of stdin, or a file whose name does not say it: txt, jsonl, csv or tsv.")
]
IdKeyOption = Annotated[
    str | None, typer.Option("--id-key", help="The column with the ids.", show_default="the number of the row, from 0")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a run that did not end.")]
TextKeyOption = Annotated[str, typer.Option("--text-key", help="The column with the texts.")]
TextsArgument = Annotated[
    Path,
    typer.Argument(
        metavar="[TEXTS]",
        help="A text a line (.txt), or .jsonl, .csv, .tsv, .parquet; also .gz, .zst, .xz, .bz2; - for stdin.",
    ),
]
WindowOption = Annotated[
    int, typer.Option("--window", min=1, help="Texts read at once: as many as a killed run loses at most.")
]


class StreamedRun:
    """From a file into a file, with bounded memory. Made first, so that what cannot be is refused before any work.

    Args:
        rows: what is read.
        output: the file.
        format: what is written there.

    Raises:
        InputError: if the output is there, or cannot be written.
    """

    def __init__(self, rows: "Rows", output: Path, format: "Format", *, resume: bool, force: bool, window: int) -> None:
        from fastbert.inference.outputs import Output

        if resume and force:
            raise InputError("--resume goes on with what is there, --force begins anew: give one of them")
        self._rows, self._window = rows, window
        self._output = Output(output, format, resume=resume, force=force)

    @property
    def finished(self) -> bool:
        """Whether a run with --resume has nothing to do, which is said."""
        if self._output.finished:
            note(f"{self._output.path} is there, whole: nothing to resume (--force makes it anew)")
        return self._output.finished

    def __call__(self, engine: Any, model: str, options: Mapping[str, Any], what: str = "embedding") -> None:
        """Run it, and say on a line what was done.

        Args:
            engine: see `Stream`.
            model: its name, in messages.
            options: what the results depend on besides the weights, by the names that the user knows.
            what: is being done, for the progress bar.

        Raises:
            InputError: if an output cannot be written, or an input not read; what was done stays.
        """
        from fastbert.inference.outputs import Refused

        with self._output as output, saying_what_is_kept(lambda: output.kept):
            try:
                self._run(engine, model, options, what)
            except Refused:
                raise
            except InputError as error:
                raise InputError(f"{error}{output.kept}") from error

    def _run(self, engine: Any, model: str, options: Mapping[str, Any], what: str) -> None:
        from fastbert.inference.outputs import job_of
        from fastbert.inference.stream import Stream

        rows, output = self._rows, self._output
        output.begin(job_of(engine, window=self._window, **rows.columns, **options))
        say_who_is_waited_for(rows)
        before, start = output.rows, time.perf_counter()
        with progress_of(what, rows, before) as progress:
            stream = Stream(
                engine, rows, lambda row: row.item, window=self._window, skip=output.skip, progress=progress
            )
            for window in stream:
                tokens = window.tokens
                output.add(window, tokens=len(tokens.ids), unknown=tokens.unknown, cut=tokens.cut, empty=window.empty)
            shape = output.finish()
        seconds = time.perf_counter() - start
        warn_of_rows(rows)
        warn_of_tokenizer(output.total("unknown"), output.total("tokens"), model)
        cut, empty = output.total("cut"), output.total("empty")
        asides = [
            *([f"{cut:,} cut at {engine.max_length:,} tokens"] if cut else []),
            *([f"{empty:,} empty"] if empty else []),
            *([f"{before:,} from before"] if before else []),
        ]
        done = output.total("tokens") - sum(window["tokens"] for window in output.windows[: output.before])
        note(
            f"{counted(output.rows, rows.noun)}, {counted(output.total('tokens'), 'token')}"
            f"{' (' + ', '.join(asides) + ')' if asides else ''}{', the others' if before else ''}"
            f" in {seconds:.1f} s, {done / seconds:,.0f} tokens/s"
            f" (waited {stream.waited:.1f} s for texts): {output.path} {shape}"
        )


@contextlib.contextmanager
def progress_of(what: str, rows: "Rows", before: int = 0) -> Iterator[Callable[[int, int], None]]:
    """For a `Stream`. How many rows there will be is guessed from the bytes of those that have been read."""
    from rich.progress import TaskProgressColumn

    start = time.perf_counter()
    with bar(what, rows.size, *([] if rows.size is None else [TaskProgressColumn()])) as update:

        def progress(done: int, tokens: int) -> None:
            seconds = max(time.perf_counter() - start, 1e-9)
            rates = f"{done / seconds:,.0f} {rows.noun}s/s, {tokens / seconds:,.0f} tokens/s"
            update(rows.read * (before + done) / max(rows.number, 1), f"{counted(before + done, rows.noun)}, {rates}")

        yield progress
