"""Whether a guard against forgetting moves the front: what is kept with it and without it where both gain the same.

A guard that keeps more and gains less has shown nothing: less of the unguarded update does that as well. So both are
dialled, along the strengths that were tried, to the same gain.

Shapes: S seeds.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from metier.evaluation import two_way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.core.comparison import Difference, Verdict
    from metier.core.evidence import Strength

    Path = Sequence[Strength]


def kept_at(path: Path, gain: float) -> float:
    """The most that is kept where at least so much is gained, on straight lines between the strengths that were tried.

    Args:
        path: Strengths of one training; the base, which gains nothing and keeps all, belongs to every path that does
            not have a start of its own.
        gain: What is to be gained; above the largest of the path, that one is taken.
    """
    points = [(one.gain, one.kept) for one in sorted(path, key=lambda one: one.share)]
    if all(one.share for one in path):
        points = [(0.0, 1.0), *points]
    gain = min(gain, max(gained for gained, _ in points))
    found = [kept for gained, kept in points if gained >= gain]
    for (gain_0, kept_0), (gain_1, kept_1) in pairwise(points):
        if min(gain_0, gain_1) < gain < max(gain_0, gain_1):
            found.append(kept_0 + (kept_1 - kept_0) * (gain - gain_0) / (gain_1 - gain_0))
    return max(found)


def at_matched_gain(guarded: Path, plain: Path) -> tuple[float, float]:
    """What is kept with the guard and without it, each at the smaller of what both can gain at most."""
    gain = min(max(0.0, *(one.gain for one in path)) for path in (guarded, plain))
    return kept_at(guarded, gain), kept_at(plain, gain)


def front_moved(
    guarded: Sequence[Path], plain: Sequence[Path], *, rows: int, delta: float, confidence: float
) -> tuple[float, float, Difference, Verdict]:
    """What is kept with the guard and without it at matched gain, mean over seeds, the difference, and its verdict.

    Paired by seed: the texts by which it is told are the same for both, and the interval holds the chance of seeds.

    Args:
        guarded: A path for each seed; two at least.
        plain: The same seeds in the same order, without the guard.
        rows: Validation rows on which gain was measured.
        delta: Differences below this count as none.
        confidence: Coverage of the interval.
    """
    kept_S2 = np.array([at_matched_gain(one, two) for one, two in zip(guarded, plain, strict=True)])
    # Seeds are all that varies: they stand where rows stand in a table of one seed.
    spread = two_way.spread((kept_S2[:, 0] - kept_S2[:, 1])[None])
    made = two_way.difference(spread, rows, confidence).model_copy(update={"clusters": rows, "seeds": len(kept_S2)})
    said = two_way.verdict(made, delta, confidence, higher_is_better=True)
    with_it, without = kept_S2.mean(axis=0).tolist()
    # Shares differ by one at most, whatever two seeds leave possible.
    ends = {name: min(1.0, max(-1.0, getattr(made, name))) for name in ("low", "high", "narrow_low", "narrow_high")}
    return with_it, without, made.model_copy(update=ends), said
