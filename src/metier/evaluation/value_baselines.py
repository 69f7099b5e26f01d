"""Cheap alternatives to tuning a model of numbers, on the same test rows: what it must beat to be worth its cost.

Nothing here sees a test row's measured values: every setting is chosen by cross-validation within the training rows.

Shapes: N training rows, M test rows, F features (genes), P targets (proteins), K principal directions, G settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metier.core.evidence import Baseline, Figure
from metier.core.rng import derive

Array = NDArray[np.float64]

MOST_ROWS = 5000
"""Training rows for directions, cross-validation and kernels, whose cost grows faster than the rows."""
MOST_KERNEL_ROWS = 2000
"""Training rows while a kernel's settings are chosen, for each of the settings solves its own system."""
MOST_EXACT = 4_000_000
"""Entries of a feature table that is decomposed whole; of a larger one only the strongest directions are kept."""
MOST_DIRECTIONS = 300
"""Directions kept of a larger table; on 5,423 cells of 4,000 genes ridge loses 0.007 of its correlation by it."""
LOCAL_DIRECTIONS = 50
"""Directions that distances are taken in: further ones are mostly noise, and noise makes all rows equally far."""
FOLDS = 5
MOST_PATTERNS = 8
"""Sets of rows that a slow method is fitted on in turn, where targets were measured on different rows."""
LEAST_SLOPE_ROWS = 3
"""Two points fix a slope whatever the noise."""

RIDGE_GRID = tuple(float(x) for x in np.logspace(-3, 3, 13))
"""Penalties, in units of the mean squared length of a row."""
PLS_GRID = tuple(range(2, 21))
KERNEL_GRID = tuple((gamma, alpha) for gamma in (0.1, 0.3, 1.0, 3.0) for alpha in (0.03, 0.1, 0.3, 1.0, 3.0))
"""Gammas, in units of one over the median squared distance, and penalties."""
NEIGHBOUR_GRID = tuple((directions, k) for directions in (5, 10, 20, 50) for k in (3, 5, 10, 20, 40))


@dataclass(frozen=True)
class Inputs:
    """What a baseline may see; what several need is worked out once.

    Attributes:
        train_NF: Features of the training rows, a scipy sparse matrix or an array.
        target_NP: Their measured values, NaN where none.
        test_MF: Features of the test rows.
        zero_shot: What a pretrained model predicts for the training rows and the test rows, untuned.
        seed: Seed of every draw.
    """

    train_NF: Any
    target_NP: Array
    test_MF: Any
    zero_shot: tuple[Array, Array] | None = None
    seed: int = 0

    @cached_property
    def directions(self) -> tuple[Array, Array]:
        """Training and test rows along their principal directions, strongest first.

        A small table keeps every direction, so that linear methods lose nothing.
        """
        train_NF, test_MF = (_rows(table) for table in (self.train_NF, self.test_MF))
        if train_NF.shape[0] * train_NF.shape[1] > MOST_EXACT:
            from sklearn.decomposition import TruncatedSVD

            sample = _sample(train_NF.shape[0], MOST_ROWS, self.seed, "directions")
            kept = min(MOST_DIRECTIONS, len(sample) - 1, train_NF.shape[1] - 1)
            svd = TruncatedSVD(kept, random_state=derive(self.seed, "svd") % 2**32).fit(train_NF[sample])
            train_NF, test_MF = svd.transform(train_NF), svd.transform(test_MF)
        return _principal(_dense(train_NF), _dense(test_MF))

    @cached_property
    def reduced(self) -> str:
        """What `directions` left out, for the reader; empty where nothing."""
        rows, columns = self.train_NF.shape
        if rows * columns <= MOST_EXACT:
            return ""
        return f"{self.directions[0].shape[1]} principal directions of {_of(min(rows, MOST_ROWS), rows)} training rows"

    @cached_property
    def means(self) -> Array:
        """Training mean of each target; of all targets together for one that was never measured."""
        return _means(self.target_NP)


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a baseline predicts.

    Attributes:
        values_MP: Predictions for the test rows.
        how: The settings that were chosen and the rows they were chosen on; empty where there are none.
    """

    values_MP: Array
    how: str = ""


Ways = Callable[[Array, Array, Array, Sequence[Any]], Iterator[Array]]
"""Predictions of test rows for each setting in turn, from training rows and their targets, NaN where not measured."""


def measure(
    train_features_BF: Any,
    train_target_BP: Array,
    test_features_BF: Any,
    judge: Callable[[Array], tuple[Figure, ...]],
    *,
    zero_shot: tuple[Array, Array] | None = None,
    seed: int = 0,
) -> tuple[Baseline, ...]:
    """All baselines that the rows allow.

    Args:
        train_features_BF: Features of the training rows, a scipy sparse matrix or an array; without any column, only
            what needs no features is tried.
        train_target_BP: Their measured values, NaN where none.
        test_features_BF: Features of the test rows.
        judge: Takes predictions for the test rows and gives the domain figures.
        zero_shot: What the pretrained model predicts for the training and the test rows, where it can, untuned.
        seed: Seed of every draw.
    """
    inputs = Inputs(train_features_BF, train_target_BP, test_features_BF, zero_shot, seed)
    began = time.perf_counter()
    featureless = train_features_BF.shape[1] == 0
    if not featureless:
        # Worked out here, so that each that needs the directions is charged for them, and not only the first.
        _ = inputs.directions
    spent = time.perf_counter() - began
    found = []
    for name, predict in BASELINES.items():
        if (name == "calibrated" and zero_shot is None) or (featureless and name not in WITHOUT_DIRECTIONS):
            continue
        began = time.perf_counter()
        predicted = predict(inputs)
        seconds = time.perf_counter() - began + (0.0 if name in WITHOUT_DIRECTIONS else spent)
        title, how = TITLES[name]
        sentence = f"{how}: {predicted.how}" if predicted.how else how
        figures = judge(predicted.values_MP)
        found.append(Baseline(name=name, title=title, how=sentence, seconds=seconds, figures=figures))
    return tuple(found)


def mean_profile(inputs: Inputs) -> Predicted:
    """Every target's training mean, for every row."""
    return Predicted(np.tile(inputs.means, (inputs.test_MF.shape[0], 1)))


def calibrated(inputs: Inputs) -> Predicted:
    """The pretrained model's own predictions with a slope and a shift for each target, by least squares.

    A target with fewer than three measured training values, or of which the model predicts a constant, is only
    shifted; one with none is left as it is.
    """
    if inputs.zero_shot is None:
        raise ValueError("to calibrate takes predictions of a pretrained model")
    train_NP, test_MP = (table.astype(np.float64) for table in inputs.zero_shot)
    seen = ~np.isnan(inputs.target_NP)
    n = np.maximum(seen.sum(axis=0), 1)
    given, wanted = np.where(seen, train_NP, 0.0), np.where(seen, inputs.target_NP, 0.0)
    mean_given, mean_wanted = given.sum(axis=0) / n, wanted.sum(axis=0) / n
    given, wanted = (np.where(seen, t - m, 0.0) for t, m in ((given, mean_given), (wanted, mean_wanted)))
    square, scale = (given**2).sum(axis=0), np.abs(train_NP).max(axis=0, initial=0.0)
    # Below this share of the largest prediction a spread is rounding, and a slope upon it would be noise.
    sloped = (seen.sum(axis=0) >= LEAST_SLOPE_ROWS) & (np.sqrt(square / n) > 1e-9 * scale)
    slope = np.where(sloped, (given * wanted).sum(axis=0) / np.where(sloped, square, 1.0), 1.0)
    return Predicted(slope * (test_MP - mean_given) + mean_wanted)


def ridge(inputs: Inputs, grid: Sequence[float] = RIDGE_GRID) -> Predicted:
    """Ridge regression; each target is fitted on the rows where it was measured."""
    best, tuned = _choose(ridge_path, inputs, grid, MOST_ROWS)
    train_NK, test_MK = inputs.directions
    predicted = _fitted(ridge_path, train_NK, inputs.target_NP, test_MK, best, inputs.target_NP.shape[1])
    return Predicted(predicted, _how(f"penalty {best:.3g} of the mean squared length of a row", tuned, inputs))


def partial_least_squares(inputs: Inputs, grid: Sequence[int] = PLS_GRID) -> Predicted:
    """Partial least squares on features that are centred but not scaled."""
    best, tuned = _choose(pls_path, inputs, grid, MOST_ROWS)
    train_NK, test_MK = inputs.directions
    predicted = _fitted(pls_path, train_NK, inputs.target_NP, test_MK, best)
    return Predicted(predicted, _how(f"{best} components", tuned, inputs))


def kernel_ridge(inputs: Inputs, grid: Sequence[tuple[float, float]] = KERNEL_GRID) -> Predicted:
    """Kernel ridge regression with a Gaussian kernel on the strongest directions, on at most MOST_ROWS rows."""
    best, tuned = _choose(kernel_path, inputs, grid, MOST_KERNEL_ROWS)
    train_NK, test_MK = inputs.directions
    rows = _sample(len(train_NK), MOST_ROWS, inputs.seed, "kernel")
    predicted = _fitted(kernel_path, train_NK[rows], inputs.target_NP[rows], test_MK, best)
    fitted = f", fitted on {_of(len(rows), len(train_NK))} rows" if len(rows) < len(train_NK) else ""
    return Predicted(predicted, _how(f"gamma {best[0]:g}, penalty {best[1]:g}{fitted}", tuned, inputs))


def nearest(inputs: Inputs, grid: Sequence[tuple[int, int]] = NEIGHBOUR_GRID) -> Predicted:
    """Mean of the nearest training rows along the strongest directions, of those of them that were measured."""
    best, tuned = _choose(neighbour_path, inputs, grid, MOST_ROWS)
    train_NK, test_MK = inputs.directions
    predicted = next(neighbour_path(train_NK, inputs.target_NP, test_MK, [best]))
    return Predicted(predicted, _how(f"{best[1]} rows in {best[0]} directions", tuned, inputs))


BASELINES: Mapping[str, Callable[[Inputs], Predicted]] = {
    "mean_profile": mean_profile,
    "calibrated": calibrated,
    "ridge": ridge,
    "pls": partial_least_squares,
    "kernel_ridge": kernel_ridge,
    "nearest": nearest,
}
WITHOUT_DIRECTIONS = frozenset({"mean_profile", "calibrated"})
TITLES: Mapping[str, tuple[str, str]] = {
    "mean_profile": ("Mean profile", "predicts the training mean of every target for every row"),
    "calibrated": (
        "Pretrained, calibrated only",
        "the untuned model's own predictions, with one slope and one shift per target fitted on the training rows",
    ),
    "ridge": ("Ridge regression", "a linear model on the features, its penalty cross-validated"),
    "pls": ("Partial least squares", "a linear model through a few components, their number cross-validated"),
    "kernel_ridge": (
        "Kernel ridge regression",
        "a smooth model on principal directions of the features, its width (gamma) and penalty cross-validated",
    ),
    "nearest": (
        "Nearest rows",
        "the mean of the most similar training rows by principal directions, their number cross-validated",
    ),
}


def ridge_path(train_NK: Array, target_NP: Array, test_MK: Array, grid: Sequence[float]) -> Iterator[Array]:
    """Ridge regression for each penalty, in units of the mean squared length of a row.

    Source: Hoerl and Kennard 1970, Technometrics 12:55.
    """
    train_NK, test_MK, target_NP, mean_P = _centred(train_NK, test_MK, target_NP)
    values_K, axes_KK = np.linalg.eigh(train_NK.T @ train_NK)
    along_KP, test_MK = axes_KK.T @ (train_NK.T @ target_NP), test_MK @ axes_KK
    unit = float(values_K.sum()) / len(train_NK) or 1.0
    for penalty in grid:
        yield mean_P + test_MK @ (along_KP / (values_K.clip(0)[:, None] + penalty * unit))


def pls_path(train_NK: Array, target_NP: Array, test_MK: Array, grid: Sequence[int]) -> Iterator[Array]:
    """Partial least squares for each number of components; one fit serves all, for each component follows the last.

    Works on the covariances alone. Source: Dayal and MacGregor 1997, Journal of Chemometrics 11:73, algorithm 2.
    """
    train_NK, test_MK, target_NP, mean_P = _centred(train_NK, test_MK, target_NP)
    square_KK, cross_KP = train_NK.T @ train_NK, train_NK.T @ target_NP
    # Beyond this share of the first covariance, what is left is rounding.
    least, strength = 1e-10 * np.linalg.norm(cross_KP), max(1e-12 * float(np.trace(square_KK)), 1e-300)
    turns: list[Array] = []
    loads: list[Array] = []
    predicted = [np.tile(mean_P, (len(test_MK), 1))]
    for _ in range(max(grid)):
        if np.linalg.norm(cross_KP) <= least:
            break
        weight_K = _leading(cross_KP)
        turn_K = weight_K - sum((load @ weight_K * turn for load, turn in zip(loads, turns, strict=True)), 0.0)
        size = float(turn_K @ square_KK @ turn_K)
        if size <= strength:
            break
        load_K, answer_P = square_KK @ turn_K / size, turn_K @ cross_KP / size
        cross_KP = cross_KP - size * np.outer(load_K, answer_P)
        turns.append(turn_K)
        loads.append(load_K)
        predicted.append(predicted[-1] + np.outer(test_MK @ turn_K, answer_P))
    for components in grid:
        yield predicted[min(components, len(predicted) - 1)]


def kernel_path(
    train_NK: Array, target_NP: Array, test_MK: Array, grid: Sequence[tuple[float, float]]
) -> Iterator[Array]:
    """Kernel ridge regression for each gamma and penalty. Source: Saunders et al. 1998, ICML, equation 9."""
    from scipy.linalg import cho_factor, cho_solve

    train_NK, test_MK, target_NP, mean_P = _centred(
        train_NK[:, :LOCAL_DIRECTIONS], test_MK[:, :LOCAL_DIRECTIONS], target_NP
    )
    own_NN = _squared_distances(train_NK, train_NK)
    unit = float(np.median(own_NN)) or 1.0
    step = max(1, MOST_EXACT * 8 // max(1, len(train_NK)))
    blocks = [test_MK[i : i + step] for i in range(0, len(test_MK), step)]
    for gamma, penalty in grid:
        kernel_NN = np.exp(-gamma / unit * own_NN)
        kernel_NN[np.diag_indices_from(kernel_NN)] += penalty
        weights_NP = cho_solve(cho_factor(kernel_NN, overwrite_a=True, check_finite=False), target_NP)
        near = (np.exp(-gamma / unit * _squared_distances(block, train_NK)) @ weights_NP for block in blocks)
        yield mean_P + np.concatenate(list(near)) if blocks else np.zeros((0, len(mean_P)))


def neighbour_path(
    train_NK: Array, target_NP: Array, test_MK: Array, grid: Sequence[tuple[int, int]]
) -> Iterator[Array]:
    """Mean of the nearest training rows, for each number of directions and of rows."""
    from sklearn.neighbors import NearestNeighbors

    mean_P, seen = _means(target_NP), ~np.isnan(target_NP)
    above_NP = np.where(seen, target_NP - mean_P, 0.0)
    found: dict[int, Any] = {}
    for directions, k in grid:
        if directions not in found:
            most = min(len(train_NK), max(count for width, count in grid if width == directions))
            index = NearestNeighbors(n_neighbors=most, algorithm="brute").fit(train_NK[:, :directions])
            found[directions] = index.kneighbors(test_MK[:, :directions], return_distance=False)
        # One neighbour at a time, for all at once would be k tables of predictions.
        total_MP, count_MP = np.zeros((2, len(test_MK), len(mean_P)))
        for column in found[directions][:, :k].T:
            total_MP += above_NP[column]
            count_MP += seen[column]
        yield mean_P + total_MP / np.maximum(count_MP, 1)


def _fitted(
    path: Ways, train_NK: Array, target_NP: Array, test_MK: Array, setting: Any, most: int = MOST_PATTERNS
) -> Array:
    """Predictions with one setting, each target fitted on the rows where it was measured.

    Targets that were measured on the same rows, such as those of one panel, share one fit. With more than `most` sets
    of rows there is one fit for all, in which a missing value counts as its target's mean.
    """
    patterns, which_P = np.unique(~np.isnan(target_NP), axis=1, return_inverse=True)
    if patterns.shape[1] > most:
        return next(path(train_NK, target_NP, test_MK, [setting]))
    predicted_MP = np.tile(_means(target_NP), (len(test_MK), 1))
    for i in range(patterns.shape[1]):
        rows, columns = patterns[:, i], which_P.reshape(-1) == i
        if rows.any():
            wanted = target_NP[np.ix_(rows, columns)]
            predicted_MP[:, columns] = next(path(train_NK[rows], wanted, test_MK, [setting]))
    return predicted_MP


def _choose(path: Ways, inputs: Inputs, grid: Sequence[Any], most: int) -> tuple[Any, str]:
    """The setting with the least error in cross-validation, and a word on how it was found.

    Each target's squared error counts in units of its variance, so that a loud target does not choose for all.
    """
    train_NK, target_NP = inputs.directions[0], inputs.target_NP
    if len(grid) == 1 or len(train_NK) < 2:
        return grid[len(grid) // 2], ""
    rows = _sample(len(train_NK), most, inputs.seed, "tune")
    folds = min(FOLDS, len(rows))
    fold_N = np.random.default_rng(derive(inputs.seed, "folds")).permutation(len(rows)) % folds
    spread_P = _filled(target_NP, inputs.means).var(axis=0)
    unit_P = np.where(spread_P > 0, 1 / np.where(spread_P > 0, spread_P, 1.0), 0.0)
    error_G = np.zeros(len(grid))
    for fold in range(folds):
        held, kept = rows[fold_N == fold], rows[fold_N != fold]
        predictions = path(train_NK[kept], target_NP[kept], train_NK[held], grid)
        for i, predicted in enumerate(predictions):
            error_G[i] += float(np.nansum((predicted - target_NP[held]) ** 2 * unit_P))
    part = f" of {_of(len(rows), len(train_NK))} training rows" if len(rows) < len(train_NK) else ""
    return grid[int(error_G.argmin())], f"{folds} folds{part}"


def _how(settings: str, tuned: str, inputs: Inputs) -> str:
    return "; ".join(part for part in (settings, tuned, inputs.reduced) if part)


def _of(some: int, whole: int) -> str:
    return f"{some:,} of {whole:,}" if some < whole else f"{whole:,}"


def _means(target_NP: Array) -> Array:
    """Mean of each target; of all targets together for one that was never measured."""
    seen = ~np.isnan(target_NP)
    total, count = np.where(seen, target_NP, 0.0).sum(axis=0, dtype=np.float64), seen.sum(axis=0)
    overall = total.sum() / max(1, int(count.sum()))
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), overall))


def _filled(target_NP: Array, mean_P: Array) -> Array:
    return np.where(np.isnan(target_NP), mean_P, target_NP)


def _sample(rows: int, most: int, seed: int, purpose: str) -> NDArray[np.int64]:
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(derive(seed, purpose)).choice(rows, most, replace=False))


def _rows(table: Any) -> Any:
    """A table whose rows can be taken by number."""
    return table.tocsr() if hasattr(table, "tocsr") else np.asarray(table)


def _dense(table: Any) -> Array:
    return np.asarray(table.toarray() if hasattr(table, "toarray") else table, dtype=np.float64)


def _principal(train_NF: Array, test_MF: Array) -> tuple[Array, Array]:
    """Both tables along the principal directions of the first; directions without any spread are dropped."""
    mean_F = train_NF.mean(axis=0)
    axes_KF: Array
    _, size_K, axes_KF = np.linalg.svd(train_NF - mean_F, full_matrices=False)
    kept = size_K > 1e-9 * max(float(size_K.max(initial=0.0)), 1e-300)
    axes_KF = axes_KF[kept] if kept.any() else axes_KF[:1]
    return (train_NF - mean_F) @ axes_KF.T, (test_MF - mean_F) @ axes_KF.T


def _centred(train_NK: Array, test_MK: Array, target_NP: Array) -> tuple[Array, Array, Array, Array]:
    """Features of both, and targets, less their training means; and the targets' means, which fill what is missing."""
    mean_K, mean_P = train_NK.mean(axis=0), _means(target_NP)
    return train_NK - mean_K, test_MK - mean_K, _filled(target_NP, mean_P) - mean_P, mean_P


def _leading(cross_KP: Array) -> Array:
    """The direction of the features that shares most with the targets, of length 1."""
    small = cross_KP.T @ cross_KP if cross_KP.shape[1] < cross_KP.shape[0] else cross_KP @ cross_KP.T
    top = np.linalg.eigh(small)[1][:, -1]
    weight_K = cross_KP @ top if cross_KP.shape[1] < cross_KP.shape[0] else top
    return np.asarray(weight_K / np.linalg.norm(weight_K))


def _squared_distances(left: Array, right: Array) -> Array:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2 * left @ right.T
    return np.asarray(np.maximum(squares, 0.0))
