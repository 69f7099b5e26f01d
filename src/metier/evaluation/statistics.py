"""Intervals for one figure, and for the paired change of a figure on the same rows.

Rows are the unit of chance: every interval says how the figure would move with other test rows of the same kind; for a
mean over targets, such as a correlation per protein, the targets are. It says nothing about other seeds of training.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from metier.core.evidence import Estimate
from metier.core.rng import derive

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

RESAMPLES = 1000


def share(hits: Array, confidence: float) -> Estimate:
    """A share of rows, each 0 or 1, with Wilson's interval. Source: Wilson 1927, JASA 22:209."""
    n = len(hits)
    low, high = _wilson(float(hits.sum()), n, confidence)
    return Estimate(value=float(hits.mean()), low=low, high=high, n=n, interval="wilson")


def mean(values: Array, confidence: float) -> Estimate:
    """A mean with Student's interval."""
    return _student(float(values.mean()), values - values.mean(), confidence)


def ratio(totals: Array, weights: Array, confidence: float, *, exponential: bool = False) -> Estimate:
    """Sum of totals over sum of weights, such as nats per token, rows being drawn, not tokens.

    Linearised ratio estimator; with `exponential`, the figure is exp of the ratio (perplexity) by the delta method.
    Source: Cochran 1977, Sampling Techniques, section 6.4.
    """
    figure, influence = _ratio_influence(totals, weights, exponential=exponential)
    return _student(figure, influence, confidence)


def share_change(before: Array, after: Array, confidence: float) -> Estimate:
    """Difference of two shares on the same rows: Newcombe's hybrid score interval with the pairing's correlation.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10.
    """
    n = len(before)
    both = float((before * after).sum())
    only_after, only_before = float(after.sum()) - both, float(before.sum()) - both
    neither = n - both - only_after - only_before
    p_after, p_before = float(after.mean()), float(before.mean())
    low_a, high_a = _wilson(float(after.sum()), n, confidence)
    low_b, high_b = _wilson(float(before.sum()), n, confidence)
    phi = _newcombe_phi(both, only_after, only_before, neither)
    below, above = p_after - low_a, high_a - p_after
    below_b, above_b = p_before - low_b, high_b - p_before
    change = p_after - p_before
    # The radicands are squares of lengths and only round below zero.
    low = change - math.sqrt(max(0.0, below**2 - 2 * phi * below * above_b + above_b**2))
    high = change + math.sqrt(max(0.0, above**2 - 2 * phi * above * below_b + below_b**2))
    return Estimate(value=change, low=low, high=high, n=n, interval="newcombe paired")


def mean_change(before: Array, after: Array, confidence: float) -> Estimate:
    """Mean of the differences on the same rows, with Student's interval."""
    return mean(after - before, confidence)


def ratio_change(
    before: tuple[Array, Array], after: tuple[Array, Array], confidence: float, *, exponential: bool = False
) -> Estimate:
    """Difference of two ratios on the same rows, each given as (totals, weights)."""
    figure_b, influence_b = _ratio_influence(*before, exponential=exponential)
    figure_a, influence_a = _ratio_influence(*after, exponential=exponential)
    return _student(figure_a - figure_b, influence_a - influence_b, confidence)


def bootstrap(figure: Callable[[NDArray[np.int64]], float], rows: int, confidence: float) -> Estimate:
    """Percentile bootstrap over rows of a figure that is no mean, such as macro-F1; `figure` takes row indices.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    generator = np.random.default_rng(derive(0, "bootstrap", rows))
    drawn = [figure(generator.integers(0, rows, rows)) for _ in range(RESAMPLES)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(
        value=float(figure(np.arange(rows))), low=float(low), high=float(high), n=rows, interval="bootstrap"
    )


def verdict(change: Estimate | None, *, higher_is_better: bool) -> str:
    """What the interval of the change says."""
    if change is None:
        return "not compared"
    if change.low > 0:
        return "better" if higher_is_better else "worse"
    if change.high < 0:
        return "worse" if higher_is_better else "better"
    return "no clear change"


def _wilson(hits: float, n: int, confidence: float) -> tuple[float, float]:
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _newcombe_phi(both: float, only_after: float, only_before: float, neither: float) -> float:
    margins = (both + only_after) * (only_before + neither) * (both + only_before) * (only_after + neither)
    if margins == 0:
        return 0.0
    n = both + only_after + only_before + neither
    cross = both * neither - only_after * only_before
    corrected = max(cross - n / 2, 0.0) if cross > 0 else cross
    return corrected / math.sqrt(margins)


def _ratio_influence(totals: Array, weights: Array, *, exponential: bool) -> tuple[float, Array]:
    figure = float(totals.sum() / weights.sum())
    influence = (totals - figure * weights) / weights.mean()
    if exponential:
        return math.exp(figure), math.exp(figure) * influence
    return figure, influence


def _student(figure: float, influence: Array, confidence: float) -> Estimate:
    from scipy.stats import t

    n = len(influence)
    if n < 2:
        return Estimate(value=figure, low=figure, high=figure, n=n, interval="none: one row")
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * float(influence.std(ddof=1)) / math.sqrt(n)
    return Estimate(value=figure, low=figure - half, high=figure + half, n=n, interval="t")
