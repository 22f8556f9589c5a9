"""Batches of a task's items: a recipe's number of them, packed, in an order that comes from the seed alone."""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from fastbert.errors import InputError
from fastbert.tasks.features import Batch, Features


class ShuffledBatches:
    """Iterate for this process's batches of all epochs, `accumulation` of them a step.

    Every epoch has all items, in an order of its own; its last step has those that are left. A step has the same items
    whatever the number of processes and accumulated batches that share it.

    Args:
        batch_size: items of a step.
        epochs: may end within one.

    Attributes:
        steps: of all epochs.  steps_an_epoch.

    Raises:
        InputError: if a step has fewer items than batches.
    """

    def __init__(
        self,
        features: Features,
        batch_size: int,
        epochs: float,
        seed: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ) -> None:
        self._parts = world_size * accumulation
        if batch_size < self._parts:
            raise InputError(
                f"a batch of {batch_size} cannot be divided by {world_size} processes x {accumulation} accumulated"
                " batches"
            )
        self.features, self.batch_size = features, batch_size
        self.steps_an_epoch = -(-len(features) // batch_size)
        self.steps = max(1, round(epochs * self.steps_an_epoch))
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._first = 0
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None  # of an epoch

    def state_dict(self, step: int) -> dict[str, int]:
        """Where a step begins; the order needs no more."""
        return {"step": step, "items": len(self.features)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on there.

        Raises:
            InputError: if it is of other data.
        """
        if set(state) != {"step", "items"} or state["items"] != len(self.features):
            raise InputError(f"this is no state of {len(self.features):,} items to train on: {dict(state)}")
        self._first = state["step"]

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._first, self.steps):
            items = self.items(step)
            for part, some in enumerate(np.array_split(items, self._parts)):
                if part % self._world_size == self._rank:
                    # All processes must call the model: one without an item has one that does not count.
                    batch = self.features.batch(some if len(some) else items[:1])
                    batch["weight"] = int(self.features.weights[some].sum())
                    yield batch

    def items(self, step: int) -> npt.NDArray[np.int64]:
        """Those of a step, over all processes."""
        epoch, step = divmod(step, self.steps_an_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self.features))
        order = self._order[1]
        return order[step * self.batch_size : (step + 1) * self.batch_size]
