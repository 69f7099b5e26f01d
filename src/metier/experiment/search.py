"""The search for a learning rate, as a pure function: given what was tried, what to try next.

Coarse points around a first guess, a factor of three apart; where the best lies at the end of what was tried, the end
is moved on; then one finer point on each side of the best. Short trainings still take rates for best that are a little
too high for whole ones, so that the first whole training is made with a finer step below as well. All of it is judged
on validation, never on test rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from metier.core import DivergedError

Stage = Literal["coarse", "fine", "edge"]

STEP = 3.0
"""Factor between two coarse points. Source: the grids in common use, 1e-4, 3e-4, 1e-3 for LoRA."""
FINE = math.sqrt(STEP)
"""Factor between the best point and a finer one beside it."""
FLAT = 1e-4
"""Losses that differ by less than this part do not differ: what was tried first is then taken. Judgement."""
SAME = 0.02
"""Logarithm of a factor within which two rates are one, rounded differently."""
MOST_EDGES = 3
"""How often an end is moved on: 27 times the grid's own width. Judgement; 23 of the 104 models and ranks in the public
Tulu 3 sweep (tinker-cookbook documentation) had their best at an end of the grid."""


@dataclass(frozen=True, slots=True)
class Point:
    """A rate to try.

    Attributes:
        rate: Peak learning rate.
        stage: Why it is tried.
    """

    rate: float
    stage: Stage


@dataclass(frozen=True, slots=True)
class Tried:
    """A rate that was tried.

    Attributes:
        rate: Peak learning rate.
        stage: Why it was tried.
        loss: Lowest validation loss; infinity where there was no number.
        diverged: Whether there was none, or none below the base's.
    """

    rate: float
    stage: Stage
    loss: float
    diverged: bool


def next_point(centre: float, tried: Sequence[Tried], *, fine: bool, most: float = math.inf) -> Point | None:
    """What to try next; None where the search is over.

    Args:
        centre: First guess.
        tried: All that was tried so far, in order.
        fine: Whether finer points are tried in the end.
        most: No higher rate is tried.
    """
    coarse = [rounded(centre * factor) for factor in (1.0, STEP, 1 / STEP)]
    for rate in coarse:
        if _is_open(rate, tried, most):
            return Point(rate, "coarse")
    edge = _edge(tried, most)
    if edge is not None:
        return Point(edge, "edge")
    best = _best([one for one in tried if one.stage != "fine"])
    if fine and best is not None:
        for rate in (rounded(best.rate * FINE), rounded(best.rate / FINE)):
            if _is_open(rate, tried, most):
                return Point(rate, "fine")
    return None


def look(centre: float, attempt: Callable[[Point], Tried], *, fine: bool, most: float = math.inf) -> tuple[Tried, ...]:
    """Everything that was tried, in order; the arguments are those of `next_point`, and what tries a point."""
    tried: list[Tried] = []
    while (point := next_point(centre, tried, fine=fine, most=most)) is not None:
        tried.append(attempt(point))
    return tuple(tried)


def best_of(tried: Sequence[Tried], *, where: str, hint: str) -> Tried:
    """The best that was tried, see `chosen`.

    Raises:
        DivergedError: If none had a number; it says where, and the hint.
    """
    best = chosen(tried)
    if best is None:
        rates = [one.rate for one in tried]
        raise DivergedError(
            f"every learning rate from {min(rates):g} to {max(rates):g} diverged", where=where, hint=hint
        )
    return best


def chosen(tried: Sequence[Tried]) -> Tried | None:
    """The best that was tried; where none was better than the base, the least bad; None where none had a number."""
    best = _best(tried)
    if best is not None:
        return best
    finite = [one for one in tried if math.isfinite(one.loss)]
    return min(finite, key=lambda one: one.loss) if finite else None


def is_at_edge(tried: Sequence[Tried]) -> bool:
    """Whether the best lies at an end of what was tried, with nothing beyond it that would be worse."""
    best = chosen(tried)
    if best is None or len(tried) == 1:
        return True
    rates = [one.rate for one in tried]
    return best.rate in {min(rates), max(rates)}


def sensitivity(tried: Sequence[Tried]) -> float | None:
    """Mean rise of the validation loss a factor of three beside the best; None where nothing was tried there."""
    best = chosen(tried)
    if best is None:
        return None
    beside = [
        one.loss - best.loss
        for one in tried
        if abs(abs(math.log(one.rate / best.rate)) - math.log(STEP)) < 0.1 and math.isfinite(one.loss)
    ]
    return sum(beside) / len(beside) if beside else None


def settled(tried: Sequence[Tried], rate: float, whole: Callable[[float], float]) -> float:
    """The rate that a whole training prefers: the best of short ones, or a finer step below it.

    Args:
        tried: All that was tried.
        rate: The best of it.
        whole: Trains whole at a rate and takes the validation loss.
    """
    lower = _below(tried, rate)
    loss = whole(rate)
    return lower if is_lower(whole(lower), loss) else rate


def _below(tried: Sequence[Tried], rate: float) -> float:
    """The rate one finer step below another, as it was written where it was tried."""
    wanted = rate / FINE
    near = [one.rate for one in tried if abs(math.log(one.rate / wanted)) < SAME]
    return min(near, key=lambda one: abs(math.log(one / wanted)), default=rounded(wanted))


def is_lower(loss: float, than: float) -> bool:
    """Whether a loss is lower than another by more than nothing."""
    return loss + FLAT * abs(loss) < than


def rounded(rate: float) -> float:
    """Three digits are plenty."""
    return float(f"{rate:.3g}")


def _is_open(rate: float, tried: Sequence[Tried], most: float) -> bool:
    """Whether a rate is still to be tried: it is allowed, new, and no lower one diverged."""
    return rate <= most and all(one.rate != rate for one in tried) and not _is_pruned(rate, tried)


def _is_pruned(rate: float, tried: Sequence[Tried]) -> bool:
    """Whether a lower rate diverged; one that only stayed above the base may be too low, unless less did better."""
    return any(
        one.diverged
        and one.rate < rate
        and (not math.isfinite(one.loss) or any(two.rate < one.rate and two.loss < one.loss for two in tried))
        for one in tried
    )


def _edge(tried: Sequence[Tried], most: float) -> float | None:
    """The next point beyond an end at which the best lies; where all diverged, the next lower one."""
    grid = [one for one in tried if one.stage != "fine"]
    if sum(one.stage == "edge" for one in grid) == MOST_EDGES or len(grid) < len(tried):
        return None
    best, rates = _best(grid), [one.rate for one in grid]
    if best is None or best.rate == min(rates):
        return rounded(min(rates) / STEP)
    higher = rounded(max(rates) * STEP)
    return higher if best.rate == max(rates) and _is_open(higher, tried, most) else None


def _best(tried: Sequence[Tried]) -> Tried | None:
    """The lowest loss; of those that do not differ from it, the one that was tried first."""
    usable = [one for one in tried if not one.diverged]
    lowest = min((one.loss for one in usable), default=math.inf)
    return next((one for one in usable if not is_lower(lowest, one.loss)), None)
