"""The two-way interval keeps its word where rules that leave one kind of chance out do not."""

from __future__ import annotations

import pytest
from false_wins import Setting, simulate, true_difference

EXPERIMENTS = 1500
"""Three standard errors of a rate of 0.05 are then 0.017."""
MOST_FALSE_WINS = 0.08


@pytest.fixture(scope="module")
def three_seeds_of_1000() -> dict[str, tuple[float, float]]:
    return simulate(Setting(1000, 3), EXPERIMENTS)


@pytest.mark.parametrize("setting", [Setting(300, 3), Setting(1000, 5), Setting(300, 5, taste=0.3)])
def test_few_false_wins_and_honest_coverage(setting):
    called, covered = simulate(setting, EXPERIMENTS)["two-way"]
    assert called <= MOST_FALSE_WINS
    assert covered >= 1 - MOST_FALSE_WINS


def test_more_rows_do_not_bring_false_wins(three_seeds_of_1000):
    called, covered = three_seeds_of_1000["two-way"]
    assert called <= MOST_FALSE_WINS
    assert covered >= 1 - MOST_FALSE_WINS


def test_one_seed_is_not_enough(three_seeds_of_1000):
    assert three_seeds_of_1000["single seed"][0] > 0.11


def test_averaging_over_seeds_is_not_enough(three_seeds_of_1000):
    assert three_seeds_of_1000["mean of seeds, examples only"][0] > 0.11


def test_seeds_alone_are_not_enough():
    assert simulate(Setting(300, 5, taste=0.3), EXPERIMENTS)["seeds only"][0] > 0.11


def test_three_points_are_found_as_often_as_not():
    setting = Setting(1000, 5, gain=0.03)
    assert true_difference(setting) == pytest.approx(0.029, abs=0.001)
    called, covered = simulate(setting, EXPERIMENTS)["two-way"]
    assert called >= 0.5
    assert covered >= 1 - MOST_FALSE_WINS
