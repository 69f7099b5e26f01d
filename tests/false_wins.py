"""How often each rule calls one of two equal arms the winner: `python tests/false_wins.py` prints the table.

A test row is right with a chance of its own; a training moves that chance, for all rows alike, by its seed's luck, with a
standard deviation of 1.2 points, and each way to tune moves it for each row by its `taste`. The two arms share the rows.

Shapes: R simulated experiments, S seeds, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metier.evaluation import two_way

MEAN_RIGHT, SHARPNESS = 0.7, 3.67
"""Chance of being right: a beta distribution with which two equal arms disagree on a third of the rows."""
SEED_POINTS = 0.012
"""Standard deviation of the share of right answers over seeds, of one arm."""
CONFIDENCE = 0.95
AT_ONCE = 250


@dataclass(frozen=True)
class Setting:
    """Size and truth of the simulated experiments."""

    rows: int
    seeds: int
    gain: float = 0.0
    taste: float = 0.0
    seed_points: float = SEED_POINTS


SETTINGS = (
    Setting(300, 3),
    Setting(1000, 3),
    Setting(1000, 5),
    Setting(1000, 5, gain=0.03),
    Setting(1000, 3, taste=0.1),
    Setting(300, 5, taste=0.3),
    Setting(300, 3, seed_points=0.03),
    Setting(300, 2),
)
RULES = ("single seed", "mean of seeds, examples only", "seeds only", "two-way of two mean squares", "two-way")


def differences(setting: Setting, generator: np.random.Generator, experiments: int) -> np.ndarray:
    """Right minus left, each right answer 1; shape (R, S, N)."""
    shape = (experiments, setting.seeds, setting.rows)
    right = generator.beta(MEAN_RIGHT * SHARPNESS, (1 - MEAN_RIGHT) * SHARPNESS, (experiments, 1, setting.rows))
    taste = generator.normal(0, setting.taste, (2, experiments, 1, setting.rows))
    luck = generator.normal(0, setting.seed_points, (2, experiments, setting.seeds, 1))
    first = generator.random(shape) < right + luck[0] + taste[0]
    second = generator.random(shape) < right + luck[1] + taste[1] + setting.gain
    return second.astype(float) - first


def half_widths(table: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Centre and half width of each rule's interval, shape (R,) each."""
    from scipy.stats import t

    quantile = 0.5 + CONFIDENCE / 2
    _, seeds, rows = table.shape
    one, mean, each = table[:, 0], table.mean(axis=1), table.mean(axis=2)
    found = two_way.spread(table)
    return {
        "single seed": (one.mean(axis=1), t.ppf(quantile, rows - 1) * one.std(axis=1, ddof=1) / rows**0.5),
        "mean of seeds, examples only": (
            found.value,
            t.ppf(quantile, rows - 1) * mean.std(axis=1, ddof=1) / rows**0.5,
        ),
        "seeds only": (found.value, t.ppf(quantile, seeds - 1) * each.std(axis=1, ddof=1) / seeds**0.5),
        "two-way of two mean squares": (found.value, t.ppf(quantile, _of_two_squares(found)) * found.variance**0.5),
        "two-way": (found.value, t.ppf(quantile, found.degrees_of_freedom) * found.variance**0.5),
    }


def _of_two_squares(found: two_way.Spread) -> np.ndarray:
    """Degrees of freedom that take the part of the seeds for a mean square of its own."""
    between = found.variance - found.of_rows
    return found.variance**2 / (found.of_rows**2 / (found.clusters - 1) + between**2 / (found.seeds - 1))


def simulate(setting: Setting, experiments: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """For each rule: how often a winner was called, and how often the interval held the truth."""
    generator = np.random.default_rng(seed)
    # Chances are cut off at 0 and 1, so the true mean difference is not quite the gain: it is taken from the model.
    truth = true_difference(setting)
    called = {rule: [] for rule in RULES}
    covered = {rule: [] for rule in RULES}
    for start in range(0, experiments, AT_ONCE):
        table = differences(setting, generator, min(AT_ONCE, experiments - start))
        for rule, (centre, half) in half_widths(table).items():
            called[rule].append(abs(centre) > half)
            covered[rule].append(abs(centre - truth) <= half)
    return {
        rule: (float(np.concatenate(called[rule]).mean()), float(np.concatenate(covered[rule]).mean()))
        for rule in RULES
    }


def true_difference(setting: Setting) -> float:
    """Mean difference over all rows and seeds that might have been drawn."""
    generator = np.random.default_rng(1)
    right = generator.beta(MEAN_RIGHT * SHARPNESS, (1 - MEAN_RIGHT) * SHARPNESS, 1_000_000)
    right += generator.normal(0, 1, right.shape) * np.hypot(setting.taste, setting.seed_points)
    return float((np.clip(right + setting.gain, 0, 1) - np.clip(right, 0, 1)).mean())


def main(experiments: int = 10_000) -> None:
    """Print the table in Markdown."""
    print("| rows | seeds | truth | taste | luck of a seed |", " | ".join(RULES), "|")
    print("|---|---|---|---|---|" + "---|" * len(RULES))
    for setting in SETTINGS:
        found = simulate(setting, experiments)
        cells = " | ".join(f"{called:.3f} ({covered:.3f})" for called, covered in found.values())
        print(
            f"| {setting.rows} | {setting.seeds} | {100 * true_difference(setting):+.1f} | {100 * setting.taste:.0f} "
            f"| {100 * setting.seed_points:.1f} | {cells} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
