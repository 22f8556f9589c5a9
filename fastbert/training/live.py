"""A run's figures while it trains: lines in a file; on a terminal a bar and a table, updated in place."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastbert.training.logs import are_figures, is_evaluation

_REFRESHED = 4  # a second
_NO_FIGURES = ("loss", "time", "epoch", "step")
_STEP = (
    ("learning_rate", "learning rate {:.2e}"),
    ("grad_norm", "gradient norm {:.2f}"),
    ("left_out", "{} steps left out"),
)
_PACE = (
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("mfu", "{:.1%} of the peak FLOP/s"),
    ("data_wait", "{:.1%} of the time waiting for batches"),
    ("peak_memory_gib", "{:.2f} GiB at most"),
)


@dataclass(frozen=True)
class Figures:
    """Which figures of a run are shown, and how.

    Attributes:
        columns: of the table: key, heading, form.
        words: of a line: key, form.
        best: the key that evaluations are compared by; None for none.
        rises: whether more of it is better.  form: of it.
        more: whether figures of evaluations that are in neither come behind these.
    """

    columns: Sequence[tuple[str, str, str]]
    words: Sequence[tuple[str, str]]
    best: str | None
    rises: bool = False
    form: str = "{:.4f}"
    more: bool = False

    def is_better(self, value: float, than: float) -> bool:
        return value > than if self.rises else value < than


def of_pretraining(words: str) -> Figures:
    """Args: words: what the predicted words are: masked LM, or next word."""
    return Figures(
        columns=(
            ("mlm_loss", words, "{:.4f}"),
            ("mlm_accuracy", "accuracy", "{:.1%}"),
            ("perplexity", "perplexity", "{:,.1f}"),
            ("nsp_loss", "next sentence", "{:.4f}"),
            ("nsp_accuracy", "accuracy", "{:.1%}"),
        ),
        words=(
            ("loss", "loss {:.4f} nats"),
            ("mlm_loss", f"{words.replace(' ', '-')} loss {{:.4f}} nats"),
            ("mlm_accuracy", "accuracy {:.1%}"),
            ("perplexity", "perplexity {:,.1f}"),
            ("nsp_loss", "next-sentence loss {:.4f} nats"),
            ("nsp_accuracy", "accuracy {:.1%}"),
        ),
        best="mlm_loss",
    )


def of_finetuning(main: str, more: Iterable[str] = ()) -> Figures:
    """Args: main: what models are chosen by.  more: other figures of the dev data."""
    names = list(dict.fromkeys([main, *more]))
    return Figures(
        columns=(("loss", "loss", "{:.4f}"), *((name, name.replace("_", " "), "{:.4f}") for name in names)),
        words=(("loss", "loss {:.4f}"), *((name, f"{name.replace('_', ' ')} {{:.4f}}") for name in names)),
        best=main,
        rises=True,
        more=True,
    )


class Terminal(TrainerCallback):
    """On stderr, of the first process.

    Args:
        cost: of the run's steps up to one, in any unit: what is left is guessed from it.
        steps: of the run.
        best: step and value of the best evaluation so far.
    """

    def __init__(
        self,
        figures: Figures,
        steps: int,
        cost: Callable[[int], float] = float,
        best: tuple[int, float] | None = None,
    ) -> None:
        self._figures, self._steps, self._cost = figures, steps, cost
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._speaks = False
        self._step = 0
        self._begun: tuple[float, float] | None = None  # when, and what was done before
        self._rows: dict[str, tuple[int, dict[str, Any]] | None] = {"training": None, "held out": None}
        self._best = best

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._speaks = bool(state.is_world_process_zero)
        self._step = state.global_step
        if self._speaks and self._console.is_terminal and self._step < self._steps:
            self._live = Live(
                console=self._console, get_renderable=self._shown, refresh_per_second=_REFRESHED, transient=False
            )
            self._live.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._step = state.global_step
        if self._begun is None:  # the first step also compiles and allocates
            self._begun = time.perf_counter(), self._cost(self._step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self._speaks or not are_figures(logs):
            return
        step, held_out, key = state.global_step, is_evaluation(logs), self._figures.best
        figures = {key.removeprefix("eval_"): value for key, value in logs.items() if value is not None}
        if held_out and self._figures.more:
            assert key is not None
            self._figures = of_finetuning(key, [name for name in figures if name not in _NO_FIGURES])
        best = held_out and step > 0 and key is not None and self._is_best(figures[key])
        if best:
            self._best = step, figures[str(key)]
        self._rows["held out" if held_out else "training"] = step, figures
        if self._live is not None:
            self._live.refresh()
        else:
            said = self._said(self._figures.words, figures)
            said += ["the best so far"] if best else []
            said += [] if held_out else [*self._said(_STEP, figures), *self._said(_PACE, figures), *self._left()]
            self._console.print(
                f"step {step:,}: {'held out: ' if held_out else ''}{', '.join(said)}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        """Of a run that stops, too: what is said of it then has a line of its own."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _is_best(self, value: float) -> bool:
        return self._best is None or self._figures.is_better(value, self._best[1])

    def _said(self, forms: Sequence[tuple[str, str]], figures: dict[str, Any]) -> list[str]:
        return [form.format(figures[key]) for key, form in forms if key in figures]

    def _left(self) -> list[str]:
        """The time, once the speed is known."""
        if self._begun is None:
            return []
        start, before = self._begun
        done, left = self._cost(self._step) - before, self._cost(self._steps) - self._cost(self._step)
        if done == 0 or left == 0:
            return []
        return [f"{timedelta(seconds=round((time.perf_counter() - start) * left / done))} left"]

    def _shown(self) -> Group:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        places = len(f"{self._steps:,}")
        percent = f"{self._step / self._steps:4.0%}"
        bar.add_row(
            f"step {self._step:>{places},} of {self._steps:,}",
            ProgressBar(total=self._steps, completed=self._step),
            "  ".join([percent, *self._left()]),
        )
        rows = {name: row for name, row in self._rows.items() if row is not None}
        if not rows:
            return Group(bar)
        known = {key for _, figures in rows.values() for key in figures}
        columns = [column for column in self._figures.columns if column[0] in known]
        table = Table.grid(padding=(0, 2))
        for i in range(len(columns) + 2):
            table.add_column(justify="left" if i == 0 else "right", no_wrap=True)
        table.add_row("", "step", *(name for _, name, _ in columns), style="dim")
        for name, (step, figures) in rows.items():
            cells = (form.format(figures[key]) if key in figures else "" for key, _, form in columns)
            table.add_row(name, f"{step:,}", *cells)
        _, trained = rows.get("training", (0, {}))
        lines = [", ".join(self._said(forms, trained)) for forms in (_STEP, _PACE)]
        if self._best is not None:
            lines.append(f"best held out: step {self._best[0]:,}, {self._figures.form.format(self._best[1])}")
        return Group(bar, table, *(Text(line) for line in lines if line))
