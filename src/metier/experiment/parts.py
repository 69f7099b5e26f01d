"""Parts of the training rows for the data curve: smaller ones lie in larger ones, classes keep their shares."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import TYPE_CHECKING

from metier.core.rng import derive
from metier.data.records import Labelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.run.job import Job


def part(job: Job, share: float) -> Job:
    """The job on a share of its training examples."""
    order = nested(_labels(job), job.recipe.data.seed)
    return job.part(order[: max(1, round(share * len(order)))])


def nested(labels: Sequence[str], seed: int) -> list[int]:
    """All places in an order of which every beginning has each label in its share, as nearly as whole rows allow."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    chance = random.Random(derive(seed, "parts"))  # noqa: S311 - a draw, no secret
    keyed = []
    for label in sorted(places):
        mine = places[label]
        chance.shuffle(mine)
        # One of each label first, so that none is ever missing; the others evenly spaced over the whole.
        keyed += [(rank / len(mine), label, place) for rank, place in enumerate(mine)]
    return [place for _, _, place in sorted(keyed)]


def _labels(job: Job) -> list[str]:
    """The class of every example, where one row is one example; else none."""
    rows = job.splits.train
    if not job.labels or len(rows) != len(job.train):
        return [""] * len(job.train)
    return [row.label if isinstance(row, Labelled) else "" for row in rows]
