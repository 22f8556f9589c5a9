"""The ceilings once more, between the other benches and behind the last: the best that was measured counts.

A ceiling that was measured while the machine did something else, too, is too low, and all that is quoted against it
looks too good. On a GPU, where time is short and clocks are known, it is the copies and the large square products.
"""

import sys
from collections.abc import Callable

from bench import bench_roof, clock
from bench.record import Recorder, Row, Timing

EVERY = {"cpu": 300.0, "cuda": 60.0}  # seconds
BEHIND = 0.25  # of these: behind the last bench unless they were measured more lately
SECONDS = 0.1  # for each


class Ceilings:
    """Measures a run's ceilings again when it is time to.

    Args:
        now: a clock for when it is time.  timer: the clock of the benches.
        only_last: not in between, but behind the last bench whenever that is.
    """

    def __init__(
        self,
        recorder: Recorder,
        *,
        device: str,
        budget: clock.Budget,
        now: Callable[[], float],
        timer: Callable[[], float],
        only_last: bool = False,
    ) -> None:
        self._recorder, self._device, self._budget, self._now, self._timer = recorder, device, budget, now, timer
        self._between, self._behind = EVERY[device], BEHIND * EVERY[device]
        if only_last:
            self._between, self._behind = float("inf"), 0.0
        self._last = now()

    def again(self, *, last: bool) -> None:
        """After a test. What goes wrong is said, and costs no figure."""
        if self._now() - self._last < (self._behind if last else self._between) or self._budget.left() <= 0:
            return
        try:
            for row in self._recorder.run.find("roof"):
                if row.timings and self._cheap(row):
                    self._best(row)
        except Exception as error:
            print(f"ceilings were not measured again: {error}", file=sys.stderr)
        self._last = self._now()

    def _cheap(self, row: Row) -> bool:
        if row.case["what"] == "launch":
            return False
        return self._device == "cpu" or row.case.get("pass", "square") == "square"

    def _best(self, row: Row) -> None:
        ((name, before),) = row.timings.items()
        (step, *_), *_ = bench_roof.make(row.case, self._device)[0]
        if self._device == "cuda":
            timing = Timing.of(clock.CudaClock().times(step, SECONDS), "events", before.peak_bytes)
        else:
            timing = clock.cpu_timings({name: step}, self._timer, SECONDS)[0][name]
        if timing.median < before.median:
            row.timings[name] = timing
            self._recorder.add(row)
