"""Which rows meet in a step: a pure function of the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metier.core.rng import derive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from metier.recipe import TrainSection


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        number: From 1.
        epoch: Passes over the examples once it is taken, as a fraction.
        rows: Indices into the examples.
    """

    number: int
    epoch: float
    rows: tuple[int, ...]


def steps(count: int, section: TrainSection, *, first: int = 1, last: int) -> Iterator[Step]:
    """The steps from `first` to `last`; every epoch sees each example once, in an order of its own.

    Args:
        count: How many examples there are.
        section: Batch size and seed.
        first: Number of the first step, more than 1 on resuming.
        last: Number of the last step.
    """
    per_epoch, batch_size = section.steps_per_epoch(count), section.batch_size
    order_epoch, order = -1, np.empty(0, dtype=np.int64)
    for number in range(first, last + 1):
        epoch, place = divmod(number - 1, per_epoch)
        if epoch != order_epoch:
            order_epoch, order = (
                epoch,
                np.random.default_rng(derive(section.seed, "order", epoch)).permutation(count),
            )
        chosen = order[place * batch_size : (place + 1) * batch_size].tolist()
        yield Step(number, number / per_epoch, tuple(chosen))
