"""What an experiment would take, and what is left out so that it keeps to a budget: pure functions of prices.

Everything counts in whole trainings: a trial of the search is a third of one, a part of the data curve its share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from metier.core import RecipeError
from metier.report import Voice

SEARCH_SHARE = 1 / 3
"""Share of the steps that a trial of the search takes, with the whole schedule."""
LEAST_SEEDS = 2
"""Fewer seeds say nothing of the chance of training."""
LEAST_ROWS = 100
"""With fewer test rows the interval of a share near one half is wider than 10 points to each side, and most verdicts
would be inconclusive. Source: Wilson 1927."""
CHECKED = 3
"""Points at which the rate is looked at again on the smallest part of the data curve."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done.

    Attributes:
        arms: Names of the arms, in the order given.
        trials: Trials of the search for each arm: 0, 3 or 5.
        seeds: Whole trainings of each arm.
        shares: Parts of the training rows below all of them, ascending.
        rows: Test rows that are measured.
    """

    arms: tuple[str, ...]
    trials: int
    seeds: int
    shares: tuple[float, ...]
    rows: int

    @property
    def trainings(self) -> int:
        """Trainings in all, long and short."""
        curve = self.seeds * len(self.shares) + (CHECKED if self.shares else 0)
        return len(self.arms) * (self.trials + self.settling + self.seeds + curve)

    @property
    def settling(self) -> int:
        """Whole trainings of each arm with a rate that may not be taken: with fine points, one."""
        return int(self.trials > CHECKED)


@dataclass(frozen=True, slots=True)
class Prices:
    """What one thing costs, in seconds of wall time.

    Attributes:
        train: A whole training of each arm, by name; an arm that nobody can foretell is left out.
        row: Measuring one test row.
        fixed: Measuring what does not grow with the test rows, once.
        once: What is done once for all: loading, the base, the cheap alternatives.
        strengths: Trying shares of the update after one training.
        has_floor: Whether that is done after every training, and not after whole ones alone.
    """

    train: Mapping[str, float]
    row: float = 0.0
    fixed: float = 0.0
    once: float = 0.0
    strengths: float = 0.0
    has_floor: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """What needs no more time.

    Attributes:
        spent: Seconds so far.
        search: Trials of the search that were made, by arm.
        whole: Whole trainings that were made with another rate and not taken, by arm.
        seeds: Whole trainings that were made, by arm.
        curve: Trainings on parts that were made, by arm and share.
        base: Whether the base was measured; the test rows are settled then.
    """

    spent: float = 0.0
    search: Mapping[str, int] = field(default_factory=dict)
    whole: Mapping[str, int] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    curve: Mapping[tuple[str, float], int] = field(default_factory=dict)
    base: bool = False


def seconds_left(size: Size, prices: Prices, done: Done) -> float:
    """What is still to be spent on an experiment of this size."""
    measure = size.rows * prices.row + prices.fixed
    trying = prices.strengths if prices.has_floor else 0.0
    left = 0.0 if done.base else prices.once + measure
    for arm in size.arms:
        whole = prices.train.get(arm, 0.0)
        left += max(0, size.trials - done.search.get(arm, 0)) * (SEARCH_SHARE * whole + trying)
        left += max(0, size.settling - done.whole.get(arm, 0)) * (whole + trying)
        left += max(0, size.seeds - done.seeds.get(arm, 0)) * (whole + prices.strengths + measure)
        for share in size.shares:
            checks = CHECKED if share == size.shares[0] else 0
            missing = max(0, size.seeds + checks - done.curve.get((arm, share), 0))
            left += missing * (share * whole + trying) + min(missing, size.seeds) * measure
    return left


def _fewer_shares(size: Size) -> Size | None:
    """The largest part goes first: it costs most and lies nearest to all rows, which are trained on anyway."""
    return replace(size, shares=size.shares[:-1]) if size.shares else None


def _no_fine_points(size: Size) -> Size | None:
    return replace(size, trials=3) if size.trials > 3 else None


def _fewer_seeds(size: Size) -> Size | None:
    return replace(size, seeds=size.seeds - 1) if size.seeds > LEAST_SEEDS else None


def _fewer_rows(size: Size) -> Size | None:
    return replace(size, rows=max(LEAST_ROWS, size.rows // 2)) if size.rows > LEAST_ROWS else None


def _fewer_arms(size: Size) -> Size | None:
    return replace(size, arms=size.arms[:-1]) if len(size.arms) > 1 else None


ORDER: Sequence[Callable[[Size], Size | None]] = (
    _fewer_shares,
    _no_fine_points,
    _fewer_seeds,
    _fewer_rows,
    _fewer_arms,
)
"""In this order things are left out, each as often as it helps."""


def fit(wanted: Size, prices: Prices, budget: float | None, done: Done | None = None) -> Size:
    """The largest experiment that keeps to the budget, shrunk in the stated order.

    Raises:
        RecipeError: If not even one arm fits; the message says what would be enough.
    """
    done = done or Done()
    if budget is None:
        return wanted
    size, room = wanted, budget - done.spent
    for shrink in ORDER:
        if shrink is _fewer_rows and done.base:
            continue
        smaller = shrink(size)
        while seconds_left(size, prices, done) > room and smaller is not None:
            size, smaller = smaller, shrink(smaller)
    needed = seconds_left(size, prices, done)
    if needed > room and not done.spent:
        voice = Voice("en")
        raise RecipeError(
            f"{voice.seconds(budget)} are not enough for even one method: {size.arms[0]} alone, with "
            f"{size.trials} trials, {size.seeds} seeds and {size.rows} test rows, takes about {voice.seconds(needed)}",
            where="compare.budget",
            hint=f"allow {_minutes(needed)} or more; the whole experiment takes about "
            f"{_minutes(seconds_left(wanted, prices, done))}; or train fewer steps with train.max_steps",
        )
    return size


def left_out(wanted: Size, size: Size) -> tuple[str, ...]:
    """What was left out, as sentences."""
    said = []
    if lost := [share for share in wanted.shares if share not in size.shares]:
        said.append(f"no training on {', '.join(f'{share:.0%}' for share in lost)} of the rows")
    if size.trials < wanted.trials:
        said.append(f"{size.trials} trials of the learning rate instead of {wanted.trials}")
    if size.seeds < wanted.seeds:
        said.append(f"{size.seeds} seeds instead of {wanted.seeds}")
    if size.rows < wanted.rows:
        said.append(f"{size.rows} test rows instead of {wanted.rows}")
    if lost_arms := wanted.arms[len(size.arms) :]:
        said.append(f"without {', '.join(lost_arms)}")
    return tuple(said)


def _minutes(seconds: float) -> str:
    return f"{max(1, -(-seconds * 1.1 // 60)):.0f}min"
