"""Which rows meet in a step, and how a step is cut to fit in memory. Pure functions of the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metier.core.rng import derive

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from metier.recipe import TrainSection

SMALLEST_CUT_TOKENS = 512
"""Below this a micro-batch is too small to keep the matrix units busy, so padding is the lesser evil. Measured on a
2-core CPU with SmolLM2-135M."""
MOST_PADDING = 0.15
"""Share of padding from which a new micro-batch is begun."""


@dataclass(frozen=True, slots=True)
class Step:
    """The rows of one optimizer step, as micro-batches of indices into the examples."""

    number: int
    epoch: float
    micro_batches: tuple[tuple[int, ...], ...]


def steps(sizes: Sequence[int], section: TrainSection, *, first: int = 1, last: int) -> Iterator[Step]:
    """The steps from `first` to `last`; every epoch sees each example once, in an order of its own.

    Args:
        sizes: Tokens of each example.
        section: Batch size, most tokens of a micro-batch (a longer example stands alone), and the seed.
        first: Number of the first step, more than 1 on resuming.
        last: Number of the last step.
    """
    per_epoch, batch_size = section.steps_per_epoch(len(sizes)), section.batch_size
    order_epoch, order = -1, np.empty(0, dtype=np.int64)
    for number in range(first, last + 1):
        epoch, place = divmod(number - 1, per_epoch)
        if epoch != order_epoch:
            order_epoch, order = (
                epoch,
                np.random.default_rng(derive(section.seed, "order", epoch)).permutation(len(sizes)),
            )
        chosen = order[place * batch_size : (place + 1) * batch_size].tolist()
        yield Step(number, number / per_epoch, cut(chosen, sizes, section.micro_batch_tokens))


def cut(chosen: Sequence[int], sizes: Sequence[int], most_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Group examples of like length, longest first, within `most_tokens` and with little padding.

    The gradient does not depend on the cut, so it is free to follow the lengths.
    """
    groups: list[tuple[int, ...]] = []
    group: list[int] = []
    used = 0
    for index in sorted(chosen, key=lambda i: (-sizes[i], i)):
        longest = sizes[group[0]] if group else sizes[index]
        full = (len(group) + 1) * longest > most_tokens
        padded = 1 - (used + sizes[index]) / ((len(group) + 1) * longest)
        if group and (full or (padded > MOST_PADDING and used >= SMALLEST_CUT_TOKENS)):
            groups.append(tuple(group))
            group, used = [], 0
        group.append(index)
        used += sizes[index]
    return (*groups, tuple(group)) if group else tuple(groups)
