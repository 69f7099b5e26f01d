"""How sure a figure is when both the rows and the seeds of training were drawn by chance.

A score is the sum of what the row brings, what the seed brings, and what is left. Rows are the same for every seed, so
a table of seeds and rows tells the three apart, as two-way analysis of variance does with one observation in each cell.
Averaging over seeds alone leaves the chance of seeds out, and finds differences that another seed would not show.

Shapes: S seeds, N rows, C clusters of rows that were drawn together, B draws of the bootstrap; "..." any more in front.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metier.core.comparison import Difference
from metier.core.evidence import Estimate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from metier.core.comparison import Verdict

    Array = NDArray[np.float64]

POWER = 0.8
"""How often a difference of the size that is looked for is to be found."""
MOST_ROWS = 10_000_000
"""More rows than that are no advice."""
MOST_SEEDS = 100
"""Nor are more seeds than that."""


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and rows, and the three parts of its chance.

    Attributes:
        value: The mean; shape (...).
        of_rows: Variance of the mean over clusters of the mean over seeds; shape (...).
        of_seeds: Variance of the mean over seeds of the mean over rows; 0 for one seed; shape (...).
        of_rest: Variance of the mean that is left once rows and seeds are taken out, which is contained in the other
            two; 0 for one seed; shape (...).
        clusters: C.
        seeds: S.
    """

    value: Array
    of_rows: Array
    of_seeds: Array
    of_rest: Array
    clusters: int
    seeds: int

    @property
    def variance(self) -> Array:
        """Variance of the mean: rows and seeds, and what both contain counted once.

        Source: Searle, Casella and McCulloch 1992, Variance Components, section 4.3 (two-way random model, one
        observation in a cell); a negative part of the seeds counts as none.
        """
        return self.of_rows + np.maximum(0.0, self.of_seeds - self.of_rest)

    @property
    def degrees_of_freedom(self) -> Array:
        """Of the t distribution that the mean over its standard error follows, about.

        Every mean square counts, the subtracted one as well; leaving that one out buys power with false wins, see
        docs/evidence/chance.md.
        Source: Satterthwaite 1946, Biometrics Bulletin 2:110.
        """
        rows = float(self.clusters - 1)
        if self.seeds == 1:
            return np.full_like(self.value, rows)
        seeds = float(self.seeds - 1)
        spread = self.of_rows**2 / rows + self.of_seeds**2 / seeds + self.of_rest**2 / (rows * seeds)
        found = np.divide(self.variance**2, spread, out=np.full_like(self.value, rows), where=spread > 0)
        return np.where(self.of_seeds > self.of_rest, found, rows)

    def at(self, clusters: int, seeds: int) -> Spread:
        """What to expect of an experiment of another size on the same kind of rows."""
        rest = self.of_rest * self.clusters * self.seeds / (clusters * seeds)
        rows = np.maximum(0.0, self.of_rows - self.of_rest) * self.clusters / clusters
        between = np.maximum(0.0, self.of_seeds - self.of_rest) * self.seeds / seeds
        return Spread(self.value, rows + rest, between + rest, rest, clusters, seeds)


def spread(table_SC: Array) -> Spread:
    """The mean of a table of seeds and clusters, shape (..., S, C), and the parts of its chance."""
    seeds, clusters = table_SC.shape[-2:]
    by_cluster_C, by_seed_S = table_SC.mean(axis=-2), table_SC.mean(axis=-1)
    value = by_seed_S.mean(axis=-1)
    of_rows = np.asarray(by_cluster_C.var(axis=-1, ddof=1) / clusters)
    if seeds == 1:
        return Spread(value, of_rows, np.zeros_like(of_rows), np.zeros_like(of_rows), clusters, 1)
    left_SC = table_SC - by_cluster_C[..., None, :] - by_seed_S[..., :, None] + value[..., None, None]
    rest = (left_SC**2).sum(axis=(-2, -1)) / ((seeds - 1) * (clusters - 1))
    of_seeds = np.asarray(by_seed_S.var(axis=-1, ddof=1) / seeds)
    return Spread(value, of_rows, of_seeds, rest / (clusters * seeds), clusters, seeds)


def spread_of_draws(figure_S: Array, drawn_BS: Array, clusters: int) -> Spread:
    """The same for a figure that is no mean of rows, such as macro-F1 or a median, from a bootstrap over clusters.

    The draws take the place of the analysis of variance on the side of the rows: their variance is that of the rows,
    and how differently the seeds move over the same draws is what is left. A jackknife would need fewer evaluations,
    but is wrong for a median; percentiles of the draws would leave nowhere to put the chance of seeds.
    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 6 and section 11.6.

    Args:
        figure_S: The figure of each seed on all rows.
        drawn_BS: The figure of each seed on rows drawn with replacement, every seed on the same ones.
        clusters: Clusters that were drawn from.
    """
    seeds = len(figure_S)
    mean_B = drawn_BS.mean(axis=1)
    of_rows = np.asarray(mean_B.var(ddof=1))
    value = np.asarray(figure_S.mean())
    if seeds == 1:
        return Spread(value, of_rows, np.zeros_like(of_rows), np.zeros_like(of_rows), clusters, 1)
    rest = np.asarray((drawn_BS - mean_B[:, None]).var(axis=0, ddof=1).sum() / ((seeds - 1) * seeds))
    return Spread(value, of_rows, np.asarray(figure_S.var(ddof=1) / seeds), rest, clusters, seeds)


def ratio_table(totals_SN: Array, weights_SN: Array, *, exponential: bool = False) -> Array:
    """A table whose mean over rows is sum of totals over sum of weights, such as nats per token; shape (S, N).

    Source: Cochran 1977, Sampling Techniques, section 6.4 (linearised ratio); exp of it by the delta method.
    """
    figure_S1 = totals_SN.sum(axis=1, keepdims=True) / weights_SN.sum(axis=1, keepdims=True)
    influence_SN = (totals_SN - figure_S1 * weights_SN) / weights_SN.mean(axis=1, keepdims=True)
    table_SN: Array = np.exp(figure_S1) * (1 + influence_SN) if exponential else figure_S1 + influence_SN
    return table_SN


def by_cluster(table_SN: Array, cluster_N: NDArray[np.int64]) -> Array:
    """A table of clusters with the same mean over rows, whatever the clusters' sizes; shape (S, C).

    Source: Cochran 1977, Sampling Techniques, section 9A.2 (a mean over clusters of unequal size is a ratio).
    """
    size_C = np.bincount(cluster_N).astype(np.float64)
    total_SC = np.stack([np.bincount(cluster_N, weights=row_N) for row_N in table_SN]).astype(np.float64)
    return ratio_table(total_SC, np.broadcast_to(size_C, total_SC.shape))


def numbered(clusters: Sequence[str]) -> NDArray[np.int64]:
    """Ids of clusters as numbers from 0, shape (N,)."""
    return np.unique(np.asarray(clusters), return_inverse=True)[1].astype(np.int64)


def with_one_each(table_SC: Array, low: float, high: float) -> Array:
    """The table with one cluster more at either end of what is possible, in every seed; shape (S, C + 2).

    Rows that never differed say little about the next one: without this, thirty rows on which two arms agree would
    show that they agree everywhere. The two are for the chance alone; the mean is taken without them.
    Source: Bonett and Price 2012, J. Educ. Behav. Stat. 37:479 (one more discordant pair of each kind); Agresti and
    Coull 1998, The American Statistician 52:119.
    """
    ends = np.broadcast_to(np.array([low, high]), (len(table_SC), 2))
    return np.concatenate([table_SC, ends], axis=1)


def difference(found: Spread, rows: int, confidence: float) -> Difference:
    """The difference whose parts are given, with its intervals and its p value.

    Two arms that never differ at all, to the last bit, have an interval of no width.

    Args:
        found: Of the paired differences.
        rows: N.
        confidence: Coverage of the wider interval; equivalence is judged by the narrower one, which leaves as much
            out on either side as the wider one on both together. Source: Schuirmann 1987, J. Pharmacokin. Biopharm.
            15:657 (two one-sided tests).
    """
    from scipy.stats import t

    value, error = float(found.value), float(np.sqrt(found.variance))
    degrees = float(found.degrees_of_freedom)
    wide = error * float(t.ppf(0.5 + confidence / 2, degrees))
    narrow = error * float(t.ppf(confidence, degrees))
    p = float(2 * t.sf(abs(value) / error, degrees)) if error > 0 else float(value == 0)
    return Difference(
        value=value,
        low=value - wide,
        high=value + wide,
        narrow_low=value - narrow,
        narrow_high=value + narrow,
        degrees_of_freedom=degrees,
        rows=rows,
        clusters=found.clusters,
        seeds=found.seeds,
        p=p,
        p_adjusted=p,
        smallest_seen=reach(found, confidence, sides=2),
    )


def estimate(found: Spread, rows: int, confidence: float, *, bounds: tuple[float, float] | None = None) -> Estimate:
    """One arm's figure over rows and seeds; `bounds` are what the figure cannot leave."""
    from scipy.stats import t

    half = float(np.sqrt(found.variance) * t.ppf(0.5 + confidence / 2, found.degrees_of_freedom))
    value = float(found.value)
    low, high = bounds or (-np.inf, np.inf)
    how = "two-way t" if found.seeds > 1 else "t"
    return Estimate(value=value, low=max(low, value - half), high=min(high, value + half), n=rows, interval=how)


def none(value: float, rows: int) -> Estimate:
    """A figure of which nothing says how it would move with other rows."""
    return Estimate(value=value, low=value, high=value, n=rows, interval="none: one group of rows")


def verdict(difference: Difference, delta: float, confidence: float, *, higher_is_better: bool) -> Verdict:
    """What the intervals say of the right arm.

    Differences below delta count as none, so that equivalence comes first: a tiny difference that many rows make
    certain is no win. A secondary measure is held to its p value after Holm.
    """
    if -delta < difference.narrow_low and difference.narrow_high < delta:
        return "equivalent"
    if difference.p_adjusted < 1 - confidence:
        return "better" if (difference.value > 0) == higher_is_better else "worse"
    return "inconclusive"


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted for looking at all of them, in their order. Source: Holm 1979, Scand. J. Statist. 6:65."""
    order = np.argsort(p_values, kind="stable")
    left = np.arange(len(order), 0, -1)
    stepped = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * left))
    adjusted = np.empty(len(order))
    adjusted[order] = stepped
    return tuple(float(p) for p in adjusted)


def reach(found: Spread, confidence: float, *, sides: int) -> float:
    """Smallest true difference that is found in four of five experiments like this one, on one side of 0 or on either.

    Source: Bloom 1995, Evaluation Review 19:547 (minimum detectable effect).
    """
    from scipy.stats import t

    degrees, error = float(found.degrees_of_freedom), float(np.sqrt(found.variance))
    return error * float(t.ppf(1 - (1 - confidence) / sides, degrees) + t.ppf(POWER, degrees))


def rows_needed(found: Spread, rows: int, delta: float, confidence: float) -> int | None:
    """Rows with which the pair would be settled at these seeds; None where rows alone do not do it.

    Settled means: were the true difference the one that was found, it, or its being below delta, would be shown in
    four of five experiments. A difference that was found by chance asks for fewer rows than the truth; it is advice,
    not a promise.
    """
    least = _smallest(lambda clusters: _settles(found.at(clusters, found.seeds), delta, confidence), 2, MOST_ROWS)
    return None if least is None else round(least * rows / found.clusters)


def seeds_needed(found: Spread, delta: float, confidence: float) -> int | None:
    """Seeds with which the pair would be settled on these rows; None where seeds alone do not do it.

    One seed says nothing of others, so that nothing is advised from it.
    """
    if found.seeds == 1:
        return None
    return _smallest(lambda seeds: _settles(found.at(found.clusters, seeds), delta, confidence), 2, MOST_SEEDS)


def _settles(found: Spread, delta: float, confidence: float) -> bool:
    size = abs(float(found.value))
    shown_as_none = size < delta and reach(found, confidence, sides=1) <= delta - size
    return shown_as_none or (size > 0 and reach(found, confidence, sides=2) <= size)


def _smallest(enough: Callable[[int], bool], least: int, most: int) -> int | None:
    """The smallest number that is enough, where every larger one is too."""
    high = least
    while not enough(high):
        if high >= most:
            return None
        least, high = high + 1, min(most, high * 2)
    while least < high:
        middle = (least + high) // 2
        if enough(middle):
            high = middle
        else:
            least = middle + 1
    return least
