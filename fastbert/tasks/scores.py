"""How well a model does on a split: figures, what they are uncertain by, and every prediction."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.terminal import counted

RESAMPLES = 1000
_SHARE = 0.95


@dataclass(frozen=True, eq=False)
class Scores:
    """Of a model on some examples.

    Attributes:
        measure: the figures of some of the examples, (n,) int64 of their rows, repeated ones among them.
        count: of the examples.
        unit: what they are.
        per_class: for each class, or type, precision, recall, F1 and how many there are; empty where there are none.
        confusion: (C, C), what is true and what was predicted, by `classes`; None where there are none.
        predictions: for each example what the model says, as it is written to a file.
        loss: the mean over what has a label; None where it is not looked at.
        decided: what later predictions of the model go by: JSON, as a threshold that was tuned on these examples.
    """

    measure: Callable[[npt.NDArray[np.int64]], dict[str, float]]
    count: int
    unit: str = "example"
    per_class: Sequence[Mapping[str, Any]] = ()
    classes: Sequence[str] = ()
    confusion: npt.NDArray[np.int64] | None = None
    predictions: Sequence[Mapping[str, Any]] = ()
    loss: float | None = None
    decided: Mapping[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", self.measure(np.arange(self.count)))

    def intervals(self, resamples: int = RESAMPLES) -> dict[str, tuple[float, float]]:
        """Where each figure is with 95 % confidence: percentiles of it over examples drawn with replacement.

        The same each time. Source: Efron, 1979, https://doi.org/10.1214/aos/1176344552. What the training's randomness
        adds is not in it: other seeds tell that.
        """
        draw = np.random.default_rng(0)
        drawn = [self.measure(draw.integers(self.count, size=self.count)) for _ in range(resamples)]
        tails = [50 * (1 - _SHARE), 50 * (1 + _SHARE)]
        found = {}
        for name in self.metrics:
            values = [figures[name] for figures in drawn if np.isfinite(figures[name])]
            low, high = np.percentile(values, tails) if values else (np.nan, np.nan)
            found[name] = float(low), float(high)
        return found

    @property
    def of(self) -> str:
        """How many of what."""
        return counted(self.count, self.unit)
