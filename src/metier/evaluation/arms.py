"""Several ways to tune beside each other: what was measured row by row, made into figures over rows and seeds."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, assert_never

import numpy as np

from metier.core.comparison import Pair
from metier.core.rng import derive
from metier.evaluation import suite, two_way
from metier.evaluation.statistics import RESAMPLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from metier.core.evidence import Estimate
    from metier.evaluation.measured import Rows

    Array = NDArray[np.float64]

SMALLEST_OF_INTEREST = 0.01
"""A point of a share or of a score that more is better of, and a hundredth of a loss, an error or another ratio:
differences below count as none unless the user says otherwise. Judgement."""


def usual_delta(rows: Rows, value: float, delta: float = SMALLEST_OF_INTEREST) -> float:
    """Differences of a measure below this count as none: a part of the figure for losses and errors.

    Args:
        rows: The measure.
        value: Its figure for the untuned model, or for the first arm where that has none.
        delta: What the user says of it.
    """
    absolute = rows.unit == "share" or (rows.unit == "score" and rows.higher_is_better)
    return delta if absolute else delta * abs(value)


def over_seeds(name: str, cells: Sequence[Rows], confidence: float, clusters: Sequence[str] | None = None) -> Estimate:
    """One arm's measure over rows and seeds.

    Args:
        name: Key of the measure.
        cells: Its rows, for each seed; one seed alone has the interval that a single run has.
        confidence: Coverage of the interval.
        clusters: Which rows were drawn together, by id; None where each stands for itself.
    """
    rows = len(cells[0].values)
    if len(cells) == 1 and clusters is None:
        return suite.estimate(name, cells[0], confidence)
    if _count(rows, clusters) < 2:
        value = suite.estimate(name, cells[0], confidence).value
        return two_way.none(value, rows)
    share = cells[0].kind == "share"
    found = _spread(name, cells, None, clusters, ends=(0.0, 1.0) if share else None)
    return two_way.estimate(found, rows, confidence, bounds=(0.0, 1.0) if share else None)


def pair(
    name: str,
    left: tuple[str, Sequence[Rows]],
    right: tuple[str, Sequence[Rows]],
    *,
    primary: bool,
    delta: float,
    confidence: float,
    clusters: Sequence[str] | None = None,
) -> Pair | None:
    """Two arms beside each other on one measure, looked at alone: `adjusted` is told all pairs when they are made.

    None where fewer than two clusters of rows leave nothing to say.

    Args:
        name: Key of the measure.
        left: Name of the arm that is subtracted and its rows for each seed; the untuned model, which has no seeds, has
            one, and stands beside every seed of the right arm.
        right: The arm it is subtracted from; the same rows, and the same seeds in the same order.
        primary: Whether the measure was declared before the experiment.
        delta: Differences below this count as none.
        confidence: Coverage of the interval.
        clusters: Which rows were drawn together, by id; None where each stands for itself.

    Raises:
        ValueError: If rows or seeds do not pair.
    """
    cells = right[1]
    before = list(left[1]) * len(cells) if len(left[1]) == 1 else list(left[1])
    rows = _paired_rows(before, cells)
    if _count(rows, clusters) < 2:
        return None
    found = _spread(name, cells, before, clusters, ends=(-1.0, 1.0) if cells[0].kind == "share" else None)
    made = two_way.difference(found, rows, confidence)
    return Pair(
        left=left[0],
        right=right[0],
        measure=name,
        title=cells[0].title,
        unit=cells[0].unit,
        higher_is_better=cells[0].higher_is_better,
        primary=primary,
        difference=made,
        delta=delta,
        verdict=two_way.verdict(made, delta, confidence, higher_is_better=cells[0].higher_is_better),
        rows_needed=two_way.rows_needed(found, rows, delta, confidence),
        seeds_needed=two_way.seeds_needed(found, delta, confidence),
    )


def adjusted(pairs: Sequence[Pair], confidence: float) -> tuple[Pair, ...]:
    """All pairs together: Holm's adjustment over the secondary measures of each two arms, and the verdicts that follow.

    What is settled then needs no more rows or seeds; what only the adjustment left open still says how many.
    """
    together: dict[tuple[str, str], list[int]] = defaultdict(list)
    for place, found in enumerate(pairs):
        if not found.primary:
            together[found.left, found.right].append(place)
    made = [_judged(found, found.difference.p, confidence) for found in pairs]
    for places in together.values():
        stepped = two_way.holm([pairs[place].difference.p for place in places])
        for place, p in zip(places, stepped, strict=True):
            made[place] = _judged(pairs[place], p, confidence)
    return tuple(made)


def _judged(pair: Pair, p: float, confidence: float) -> Pair:
    """The pair with its adjusted p value and the verdict by it."""
    found = pair.difference.model_copy(update={"p_adjusted": p})
    said = two_way.verdict(found, pair.delta, confidence, higher_is_better=pair.higher_is_better)
    needed = {} if said == "inconclusive" else {"rows_needed": None, "seeds_needed": None}
    return pair.model_copy(update={"difference": found, "verdict": said, **needed})


def _spread(
    name: str,
    cells: Sequence[Rows],
    before: Sequence[Rows] | None,
    clusters: Sequence[str] | None,
    *,
    ends: tuple[float, float] | None,
) -> two_way.Spread:
    """The figure of the cells, or their difference from `before`, and the parts of its chance."""
    ids_N = np.arange(len(cells[0].values)) if clusters is None else two_way.numbered(clusters)
    kind = cells[0].kind
    match kind:
        case "whole" | "median":
            return _drawn(name, cells, before, ids_N)
        case "ratio" | "perplexity" | "share" | "mean" | "distance":
            table_SN = _table(cells) if before is None else _table(cells) - _table(before)
        case _:
            assert_never(kind)
    table_SC = table_SN if clusters is None else two_way.by_cluster(table_SN, ids_N)
    found = two_way.spread(table_SC)
    if ends is None:
        return found
    wider = two_way.spread(two_way.with_one_each(table_SC, *ends))
    return two_way.Spread(found.value, wider.of_rows, wider.of_seeds, wider.of_rest, found.clusters, found.seeds)


def _table(cells: Sequence[Rows]) -> Array:
    values_SN, weights_SN = np.stack([c.values for c in cells]), np.stack([c.weights for c in cells])
    if cells[0].kind in {"ratio", "perplexity"}:
        return two_way.ratio_table(values_SN, weights_SN, exponential=cells[0].kind == "perplexity")
    return values_SN


def _drawn(name: str, cells: Sequence[Rows], before: Sequence[Rows] | None, ids_N: NDArray[np.int64]) -> two_way.Spread:
    """By a bootstrap over clusters, the same draws for every seed and both arms."""

    def figures(chosen: NDArray[np.int64]) -> Array:
        found = np.array([suite.figure(name, rows, chosen) for rows in cells])
        return found if before is None else found - np.array([suite.figure(name, rows, chosen) for rows in before])

    members = np.split(np.argsort(ids_N, kind="stable"), np.cumsum(np.bincount(ids_N))[:-1])
    generator = np.random.default_rng(derive(0, "bootstrap", len(ids_N)))
    drawn = [
        figures(np.concatenate([members[i] for i in generator.integers(0, len(members), len(members))]))
        for _ in range(RESAMPLES)
    ]
    return two_way.spread_of_draws(figures(np.arange(len(ids_N))), np.array(drawn), len(members))


def _paired_rows(before: Sequence[Rows], cells: Sequence[Rows]) -> int:
    if len(before) != len(cells):
        raise ValueError(f"{len(before)} seeds beside {len(cells)}")
    sizes = {len(rows.values) for rows in (*before, *cells)}
    if len(sizes) != 1:
        raise ValueError(f"the rows differ in number: {sorted(sizes)}")
    return sizes.pop()


def _count(rows: int, clusters: Sequence[str] | None) -> int:
    if clusters is None:
        return rows
    if len(clusters) != rows:
        raise ValueError(f"{len(clusters)} ids of clusters for {rows} rows")
    return len(set(clusters))
