"""A comparison as the page reads it: what things are called, how they are drawn, which way is up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from metier.core.comparison import Arm, Comparison, Pair
from metier.core.evidence import Baseline, Estimate
from metier.report.answers import visible
from metier.report.charts import number
from metier.report.experiment_words import ARMS_ZH
from metier.report.figures import has_interval
from metier.report.plots import MARKS
from metier.report.voice import Voice

BASE = "base"
"""The untuned model among the arms of a pair."""
COLOURS = 6
"""Series that the style sheet has colours for; with the shapes of marks, thirty arms differ."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table: whose, the class of its colour ("" for none), and its figures as text."""

    name: str
    style: str
    cells: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """The figures behind a drawing."""

    heads: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class View:
    """A comparison and the voice that tells it."""

    found: Comparison
    voice: Voice

    @property
    def unit(self) -> str:
        """Of the primary measure."""
        return self.found.units[self.found.primary]

    @property
    def is_higher_better(self) -> bool:
        """Which way the primary measure is good."""
        return self.found.higher_is_better[self.found.primary]

    @property
    def base(self) -> Estimate | None:
        """The untuned model's primary figure; None where it cannot do the task."""
        return known(self.found.base.get(self.found.primary))

    @property
    def alive(self) -> list[Arm]:
        """The arms that ended with a primary figure."""
        return [arm for arm in self.found.arms if self.figure(arm) is not None]

    def figure(self, arm: Arm) -> Estimate | None:
        """An arm's primary figure; None where it has none or it is no number."""
        return known(arm.figures.get(self.found.primary))

    def arm(self, name: str) -> Arm | None:
        """The arm of that name."""
        return next((arm for arm in self.found.arms if arm.name == name), None)

    def called(self, name: str) -> str:
        """What a reader calls an arm or the base."""
        if name == BASE:
            return self.voice.say("base")
        arm = self.arm(name)
        title = arm.title if arm else name
        return visible(ARMS_ZH.get(name, title) if self.voice.language == "zh" else title)

    def style(self, name: str) -> str:
        """CSS class of an arm's colour."""
        return f"run-{self._place(name) % COLOURS}" if self.arm(name) else "base"

    def shape(self, name: str) -> str:
        """Shape of an arm's marks."""
        return MARKS[self._place(name) % len(MARKS)]

    def measure(self, key: str) -> str:
        """What a reader calls a measure."""
        return visible(self.voice.measure_title(key, self.found.titles.get(key, key)))

    def pair(self, left: str, right: str, measure: str | None = None) -> Pair | None:
        """Two arms on a measure, the primary one where none is named."""
        wanted = (left, right, measure or self.found.primary)
        return next((pair for pair in self.found.pairs if (pair.left, pair.right, pair.measure) == wanted), None)

    def better_than(self, value: float) -> float:
        """How far a primary figure lies above the base on the good side; the figure itself where there is no base."""
        if self.base is None:
            return value
        return (value - self.base.value) * (1 if self.is_higher_better else -1)

    @property
    def gain_title(self) -> str:
        """What the axis of `better_than` is."""
        title = self.measure(self.found.primary)
        if self.base is None:
            return title
        return self.voice.say("gain_in", measure=title)

    def tick(self, value: float, *, signed: bool = False) -> str:
        """Label of a primary figure on an axis."""
        scaled = round(value * 100, 9) if self.unit == "share" else value
        sign = "+" if signed and scaled > 0 else ""
        return f"{sign}{number(scaled)}"

    def baselines(self) -> list[tuple[Baseline, Estimate]]:
        """The cheap ways that have the primary figure, best first."""
        sign = -1 if self.is_higher_better else 1
        pairs = [
            (baseline, figure.estimate)
            for baseline in self.found.baselines
            for figure in baseline.figures
            if figure.name == self.found.primary and math.isfinite(figure.estimate.value)
        ]
        return sorted(pairs, key=lambda pair: sign * pair[1].value)

    def ranked(self) -> list[Arm]:
        """The arms that ended with numbers, best first."""
        sign = -1 if self.is_higher_better else 1
        return sorted(self.alive, key=lambda arm: sign * arm.figures[self.found.primary].value)

    def _place(self, name: str) -> int:
        return next((i for i, arm in enumerate(self.found.arms) if arm.name == name), 0)


def known(estimate: Estimate | None) -> Estimate | None:
    """The estimate where it is a number."""
    return estimate if estimate is not None and math.isfinite(estimate.value) else None


def ends(estimate: Estimate | None) -> tuple[float, float] | None:
    """Both ends of an interval that can be drawn."""
    if estimate is None or not has_interval(estimate):
        return None
    found = (estimate.low, estimate.high)
    return found if all(map(math.isfinite, found)) else None


def numbers(*values: float | None) -> Iterator[float]:
    """Those that are numbers."""
    return (value for value in values if value is not None and math.isfinite(value))
