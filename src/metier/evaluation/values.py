"""How well predicted numbers meet measured ones: by target, by row, and by group, each figure with its interval.

Shapes: B rows (cells), P targets (proteins), K what is kept of the two (P by target, B by row), N what is summed over.
NaN in the measured table says that a value was not measured; it is never scored, and a prediction is never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from metier.core import DataError, DivergedError
from metier.core.evidence import Breakdown, Estimate, Scatter
from metier.core.rng import derive
from metier.data.faults import listed
from metier.evaluation import statistics
from metier.evaluation.measured import Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]

LEAST_VALUES = 3
"""Two points always correlate perfectly, so a correlation needs three."""
LEAST_ROWS = 10
"""A group of fewer rows is named, but its figures would be chance."""
FLAT = 1e-9
"""A spread below this share of the largest value is rounding, and the values are constant."""
BLOCK = 1 << 22
"""Values worked on at once: 32 MiB in float64."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Metrics of each target or of each row; NaN where one is not defined, which the measured values alone decide.

    Attributes:
        n: Measured values; shape (K,).
        pearson: Pearson correlation, 0 for a constant prediction; shape (K,).
        ccc: Lin's concordance, 1 only where every value is met; shape (K,).
        rmse: Root mean squared error; shape (K,).
        mae: Mean absolute error; shape (K,).
        r2: Share of the variance explained, below 0 where the mean would have been better; shape (K,).
    """

    n: NDArray[np.int64]
    pearson: Array
    ccc: Array
    rmse: Array
    mae: Array
    r2: Array


def agreement(predicted_BP: Array, target_BP: Array, *, by: Literal["target", "row"] = "target") -> Agreement:
    """All metrics but Spearman's, by target or by row.

    Pearson and concordance share one convention: not defined where fewer than three values were measured or all are
    the same, and 0 where the prediction is constant.
    Source: Lin 1989, Biometrics 45:255 (concordance, with variances over n); scikit-learn, r2_score.
    """
    found = _blockwise(_metrics, predicted_BP, target_BP, by)
    return Agreement(found[0].astype(np.int64), *found[1:])


def spearman(predicted_BP: Array, target_BP: Array, *, by: Literal["target", "row"] = "target") -> Array:
    """Spearman's rank correlation, by target or by row; ties share their mean rank. Source: Spearman 1904."""
    return _blockwise(_rank_correlation, predicted_BP, target_BP, by)[0]


def mse(predicted_BP: Array, target_BP: Array) -> float:
    """Mean squared error over all measured values."""
    return float(np.nanmean((predicted_BP - target_BP) ** 2))


def cosine(predicted_BP: Array, target_BP: Array) -> float:
    """Cosine similarity of the two tables, each flattened to one vector.

    The published script of scTranslator prints this as "ccc". It is no concordance: it forgives a wrong scale, and
    predicting every target's mean scores high on it.
    """
    seen = ~np.isnan(target_BP)
    given, wanted = predicted_BP[seen].astype(np.float64), target_BP[seen].astype(np.float64)
    return float(_divided(given @ wanted, np.linalg.norm(given) * np.linalg.norm(wanted)))


def excluded(target_BP: Array, names: Sequence[str]) -> dict[str, str]:
    """Targets that no correlation is defined for, with the reason."""
    # What is defined depends on the measured values alone, so any prediction serves.
    found = agreement(np.zeros_like(target_BP), target_BP)
    reasons = np.select([found.n == 0, found.n < LEAST_VALUES], ["never measured", "fewer than 3 values"], "constant")
    return {names[int(i)]: str(reasons[i]) for i in np.flatnonzero(np.isnan(found.pearson))}


def notes(target_BP: Array, names: Sequence[str]) -> tuple[str, ...]:
    """What the reader is told about targets that the correlations leave out, one sentence for each reason."""
    found = excluded(target_BP, names)
    return tuple(
        f"left out of correlations, {reason}: {listed([name for name, why in found.items() if why == reason], 12)}"
        for reason in sorted(set(found.values()))
    )


def rows_of(
    predicted_BP: Array, target_BP: Array, names: Sequence[str], *, nouns: tuple[str, str] = ("target", "row")
) -> dict[str, Rows]:
    """The domain metrics of one state of a model, in the form that `suite.compare` pairs.

    Which targets and rows count is decided by the measured values alone, so that two states pair value by value; a
    state that predicts a constant gets a correlation of 0. A metric that nothing can be scored on is left out.

    Args:
        predicted_BP: Predictions.
        target_BP: Measured values, NaN where none.
        names: Names of the targets.
        nouns: What a target and a row are called in titles, such as ("protein", "cell").

    Raises:
        DivergedError: If a prediction is not a finite number.
        DataError: If a measured value is infinite.
    """
    _check(predicted_BP, target_BP, names)
    per, each = (f"per {noun}" for noun in nouns)
    by_target = agreement(predicted_BP, target_BP)
    by_row = agreement(predicted_BP, target_BP, by="row")
    similar_B, total_B = _blockwise(_row_totals, predicted_BP, target_BP, "row")
    found = {
        "pearson_target": _mean(f"Pearson {per}", by_target.pearson),
        "pearson_target_median": _median(f"Median Pearson {per}", by_target.pearson),
        "spearman_target": _mean(f"Spearman {per}", spearman(predicted_BP, target_BP)),
        "ccc_target": _mean(f"Concordance (CCC) {per}", by_target.ccc),
        "rmse_target": _mean(f"RMSE {per}", by_target.rmse, higher_is_better=False),
    }
    if len(names) >= LEAST_VALUES:
        found["pearson_row"] = _mean(f"Pearson {each}", by_row.pearson)
        found["spearman_row"] = _mean(f"Spearman {each}", spearman(predicted_BP, target_BP, by="row"))
        found["ccc_row"] = _mean(f"Concordance (CCC) {each}", by_row.ccc)
    found["rmse_row"] = _mean(f"RMSE {each}", by_row.rmse, higher_is_better=False)
    found["cosine"] = _mean(f"Cosine similarity {each}", similar_B)
    counted = by_row.n > 0
    weights = by_row.n[counted].astype(np.float64)
    found["mse"] = Rows("Mean squared error", "domain", "ratio", "score", False, total_B[counted], weights)  # noqa: FBT003
    return {name: rows for name, rows in found.items() if len(rows.values)}


def error_kept(before: float, after: float) -> float:
    """Share of what a network could do that is kept, by the mean squared error on rows that it was made for; at most 1.

    Exp of minus the rise of the loss, as for language models: errors that are normal and as wide as they are found to
    be take half the logarithm of their mean square in nats for each value.
    """
    return 1.0 if after <= before else math.sqrt(before / after)


def by_group(
    predicted_BP: Array,
    target_BP: Array,
    groups: Mapping[str, NDArray[Any]],
    names: Sequence[str],
    confidence: float,
    *,
    noun: str = "protein",
) -> tuple[Breakdown, ...]:
    """Each target over all rows, then each group of rows over its targets.

    A target's interval draws rows, a group's draws targets: the one says how sure the figure is for this target, the
    other how much the targets differ in this group.

    Args:
        predicted_BP: Predictions.
        target_BP: Measured values, NaN where none.
        groups: For each way to group, the label of every row.
        names: Names of the targets.
        confidence: Coverage of the intervals.
        noun: What a target is called.

    Raises:
        DivergedError: If a prediction is not a finite number.
        DataError: If a measured value is infinite.
    """
    _check(predicted_BP, target_BP, names)
    found = _by_target(predicted_BP, target_BP, names, confidence, noun)
    for by, given in groups.items():
        labels_B = np.asarray(given).astype(str)
        for key in np.unique(labels_B):
            chosen = labels_B == key
            found.append(_one_group(by, str(key), predicted_BP[chosen], target_BP[chosen], confidence))
    return tuple(found)


def scatter_sample(
    predicted_BP: Array, target_BP: Array, names: Sequence[str], most: int = 400, *, seed: int = 0
) -> tuple[Scatter, ...]:
    """Measured and predicted values of each target, at most `most` of each, in the order of the rows."""
    _check(predicted_BP, target_BP, names)
    made = []
    for i, name in enumerate(names):
        rows = np.flatnonzero(~np.isnan(target_BP[:, i]))
        # Each target has its own stream, so that a panel with one target more draws the others as before.
        generator = np.random.default_rng(derive(seed, "scatter", name))
        drawn = rows if len(rows) <= most else np.sort(generator.choice(rows, most, replace=False))
        points = ([float(f"{v:.5g}") for v in table[drawn, i]] for table in (target_BP, predicted_BP))
        measured, predicted = (tuple(values) for values in points)
        made.append(Scatter(key=name, n=len(rows), measured=measured, predicted=predicted))
    return tuple(made)


def _mean(title: str, values_K: Array, *, higher_is_better: bool = True) -> Rows:
    defined = values_K[~np.isnan(values_K)]
    return Rows(title, "domain", "mean", "score", higher_is_better, defined, np.ones(len(defined)))


def _median(title: str, values_K: Array) -> Rows:
    return replace(_mean(title, values_K), kind="median")


def _by_target(
    predicted_BP: Array, target_BP: Array, names: Sequence[str], confidence: float, noun: str
) -> list[Breakdown]:
    found = agreement(predicted_BP, target_BP)
    errors = _blockwise(_standard_errors, predicted_BP, target_BP, "target")
    reasons = excluded(target_BP, names)
    made = []
    for i, name in enumerate(names):
        n = int(found.n[i])
        made.append(
            Breakdown(
                by=noun,
                key=name,
                n=n,
                pearson=_bounded(found.pearson[i], errors[0][i], n, confidence),
                ccc=_bounded(found.ccc[i], errors[1][i], n, confidence),
                rmse=_root(found.rmse[i], errors[2][i], n, confidence),
                note=reasons.get(name, ""),
            )
        )
    return made


def _one_group(by: str, key: str, predicted_BP: Array, target_BP: Array, confidence: float) -> Breakdown:
    n = len(target_BP)
    if n < LEAST_ROWS:
        note = f"fewer than {LEAST_ROWS} rows"
        return Breakdown(by=by, key=key, n=n, pearson=None, ccc=None, rmse=None, note=note)
    found = agreement(predicted_BP, target_BP)
    kept = ((values[~np.isnan(values)]) for values in (found.pearson, found.ccc, found.rmse))
    pearson, ccc, rmse = (statistics.mean(values, confidence) if len(values) else None for values in kept)
    note = "" if pearson else "no target varies here"
    return Breakdown(by=by, key=key, n=n, pearson=pearson, ccc=ccc, rmse=rmse, note=note)


def _bounded(figure: float, error: float, n: int, confidence: float) -> Estimate | None:
    """A correlation's interval, made on Fisher's scale so that it stays within -1 and 1.

    Simulated coverage of a nominal 95 % for normal values: 0.89 at 10 rows, 0.93 at 20, 0.94 at 50; less where values
    are strongly skewed, as with Fisher's own interval.
    """
    if np.isnan(figure):
        return None
    value = float(figure)
    if np.isnan(error):
        return Estimate(value=value, low=value, high=value, n=n, interval="none: constant prediction")
    if 1 - abs(value) < FLAT:
        return Estimate(value=value, low=value, high=value, n=n, interval="none: no error at all")
    middle, half = np.arctanh(value), _quantile(n, confidence) * error / (1 - value**2)
    low, high = np.tanh(middle - half), np.tanh(middle + half)
    return Estimate(value=value, low=float(low), high=float(high), n=n, interval="delta, on Fisher's z")


def _root(figure: float, error: float, n: int, confidence: float) -> Estimate | None:
    """The root of a mean square's interval; `error` is the mean square's standard error."""
    if np.isnan(figure):
        return None
    value = float(figure)
    if np.isnan(error):
        return Estimate(value=value, low=value, high=value, n=n, interval="none: one row")
    half = _quantile(n, confidence) * error
    low, high = np.sqrt(max(0.0, value**2 - half)), np.sqrt(value**2 + half)
    return Estimate(value=value, low=float(low), high=float(high), n=n, interval="t of the mean square")


def _quantile(n: int, confidence: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + confidence / 2, n - 1))


def _check(predicted_BP: Array, target_BP: Array, names: Sequence[str]) -> None:
    if predicted_BP.shape != target_BP.shape or predicted_BP.shape[1:] != (len(names),):
        raise ValueError(f"{predicted_BP.shape} predicted, {target_BP.shape} measured, {len(names)} names")
    wrong = ~np.isfinite(predicted_BP).all(axis=0)
    if wrong.any():
        raise DivergedError(
            f"{int(wrong.sum())} of {len(names)} targets have predictions that are not finite numbers",
            where=names[int(wrong.argmax())],
            hint="tune again with a lower learning rate",
        )
    endless = np.isinf(target_BP).any(axis=0)
    if endless.any():
        raise DataError(
            "a measured value is infinite",
            where=names[int(endless.argmax())],
            hint="use NaN for a value that was not measured",
        )


# --- what is worked out for a block of targets, or of rows, at once ---


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over the measured values of a block.

    Attributes:
        n: How many, as a float; shape (K,).
        seen: Which; shape (K, N).
        given: Predictions less their mean, 0 where not measured; shape (K, N).
        wanted: The same of the measured values; shape (K, N).
        shift: Mean prediction less mean measured value; shape (K,).
        var_given: Variance over n, 0 where it is only rounding; shape (K,).
        var_wanted: The same of the measured values; shape (K,).
        cov: Covariance over n; shape (K,).
        defined: Whether a correlation is; shape (K,).
    """

    n: Array
    seen: Flags
    given: Array
    wanted: Array
    shift: Array
    var_given: Array
    var_wanted: Array
    cov: Array
    defined: Flags


def _moments(predicted_KN: Array, target_KN: Array) -> _Moments:
    seen = ~np.isnan(target_KN)
    n = seen.sum(axis=1).astype(np.float64)
    given, mean_given, var_given = _centred(predicted_KN, seen, n)
    wanted, mean_wanted, var_wanted = _centred(target_KN, seen, n)
    cov = np.where((var_given > 0) & (var_wanted > 0), _divided((given * wanted).sum(axis=1), n), 0.0)
    defined = (n >= LEAST_VALUES) & (var_wanted > 0)
    return _Moments(n, seen, given, wanted, mean_given - mean_wanted, var_given, var_wanted, cov, defined)


def _centred(values_KN: Array, seen: Flags, n_K: Array) -> tuple[Array, Array, Array]:
    """Values less their mean, the mean, and the variance; only what was measured counts."""
    kept = np.where(seen, values_KN, 0.0)
    mean = _divided(kept.sum(axis=1), n_K)
    centred = np.where(seen, kept - mean[:, None], 0.0)
    variance = _divided((centred**2).sum(axis=1), n_K)
    scale = np.abs(kept).max(axis=1, initial=0.0)
    return centred, mean, np.where(np.sqrt(variance) > FLAT * scale, variance, 0.0)


def _metrics(predicted_KN: Array, target_KN: Array) -> tuple[Array, ...]:
    m = _moments(predicted_KN, target_KN)
    difference = np.where(m.seen, predicted_KN - np.where(m.seen, target_KN, 0.0), 0.0)
    squared, absolute = (difference**2).sum(axis=1), np.abs(difference).sum(axis=1)
    some = m.n > 0
    return (
        m.n,
        _where(m.defined, _pearson(m)),
        _where(m.defined, _divided(2 * m.cov, m.var_given + m.var_wanted + m.shift**2)),
        _where(some, np.sqrt(_divided(squared, m.n))),
        _where(some, _divided(absolute, m.n)),
        _where(m.defined, 1 - _divided(squared, m.n * m.var_wanted)),
    )


def _pearson(m: _Moments) -> Array:
    return np.clip(_divided(m.cov, np.sqrt(m.var_given) * np.sqrt(m.var_wanted)), -1.0, 1.0)


def _standard_errors(predicted_KN: Array, target_KN: Array) -> tuple[Array, ...]:
    """Standard errors of Pearson, concordance and the mean square, from each value's influence; nothing need be normal.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 21 (nonparametric delta method).
    """
    m = _moments(predicted_KN, target_KN)
    r, spread = _pearson(m), np.sqrt(m.var_given) * np.sqrt(m.var_wanted)
    both = m.given * m.wanted
    squares = _divided(m.given**2, m.var_given[:, None]) + _divided(m.wanted**2, m.var_wanted[:, None])
    of_pearson = _divided(both, spread[:, None]) - r[:, None] / 2 * squares
    below = m.var_given + m.var_wanted + m.shift**2
    concordance = _divided(2 * m.cov, below)[:, None]
    error = m.given - m.wanted + m.shift[:, None]
    # The part below the bar is the mean squared error plus twice the covariance, and so is its influence.
    of_below = error**2 + 2 * both - below[:, None]
    of_concordance = _divided(2 * (both - m.cov[:, None]) - concordance * of_below, below[:, None])
    of_square = error**2 - (below - 2 * m.cov)[:, None]
    varies = m.defined & (m.var_given > 0)
    pearson, ccc, square = (_error_of_mean(part, m) for part in (of_pearson, of_concordance, of_square))
    return _where(varies, pearson), _where(varies, ccc), _where(m.n > 1, square)


def _error_of_mean(influence_KN: Array, m: _Moments) -> Array:
    kept = np.where(m.seen, influence_KN, 0.0)
    return np.sqrt(_divided((kept**2).sum(axis=1), m.n * (m.n - 1)))


def _rank_correlation(predicted_KN: Array, target_KN: Array) -> tuple[Array, ...]:
    seen = ~np.isnan(target_KN)
    m = _moments(target_KN, target_KN)
    # What is constant up to rounding must not be ranked by its rounding.
    flat = _moments(predicted_KN, target_KN).var_given == 0
    given = _ranks(np.where(flat[:, None], 0.0, np.where(seen, predicted_KN, np.nan)))
    found = _pearson(_moments(given, np.where(seen, _ranks(target_KN), np.nan)))
    return (_where(m.defined, found),)


def _ranks(values_KN: Array) -> Array:
    """Ranks from 1 within each line, ties sharing their mean rank; NaN sorts behind all numbers."""
    order = np.argsort(values_KN, axis=1, kind="stable")
    ordered = np.take_along_axis(values_KN, order, axis=1)
    at = np.broadcast_to(np.arange(values_KN.shape[1]), ordered.shape)
    edge = np.ones((len(ordered), 1), dtype=bool)
    steps = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(np.hstack([edge, steps]), at, 0), axis=1)
    ends = np.where(np.hstack([steps, edge]), at, values_KN.shape[1])
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(values_KN.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=1)
    return ranks


def _row_totals(predicted_KN: Array, target_KN: Array) -> tuple[Array, ...]:
    """Cosine similarity, NaN where the measured values are all 0, and total squared error."""
    seen = ~np.isnan(target_KN)
    given, wanted = np.where(seen, predicted_KN, 0.0), np.where(seen, target_KN, 0.0)
    length = np.linalg.norm(wanted, axis=1)
    similar = _divided((given * wanted).sum(axis=1), np.linalg.norm(given, axis=1) * length)
    return _where(length > 0, similar), ((given - wanted) ** 2).sum(axis=1)


def _blockwise(
    function: Callable[[Array, Array], tuple[Array, ...]],
    predicted_BP: Array,
    target_BP: Array,
    by: Literal["target", "row"],
) -> tuple[Array, ...]:
    """Apply `function` to blocks that fit in memory, whatever is kept coming first."""
    given, wanted = (predicted_BP.T, target_BP.T) if by == "target" else (predicted_BP, target_BP)
    step = max(1, BLOCK // max(1, given.shape[1]))
    # An empty table is one empty block, so that the figures have their shape.
    starts = range(0, max(1, len(given)), step)
    parts = [
        function(*(np.ascontiguousarray(table[i : i + step], dtype=np.float64) for table in (given, wanted)))
        for i in starts
    ]
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _where(condition: Flags, values_K: Array) -> Array:
    return np.where(condition, values_K, np.nan)


def _divided(above: Any, below: Any) -> Array:
    """A quotient that is 0 where nothing stands below."""
    return np.asarray(above / np.where(below > 0, below, np.inf))
