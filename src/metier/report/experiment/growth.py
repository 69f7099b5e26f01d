"""Arms over the number of training rows: bands of their intervals, and where one overtakes another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from metier.core.comparison import CurvePoint
from metier.report import plots
from metier.report.charts import Scale
from metier.report.experiment.view import Row, Table, View, ends
from metier.report.plots import Marker, Name, Plot, Rule, Shape

HEIGHT = 300
"""Of the plot, in CSS pixels."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where the lines of two arms cross: the better arm before and after, at about so many rows."""

    before: str
    after: str
    rows: float


@dataclass(frozen=True, slots=True)
class Growth:
    """The figure, what it says of crossings, and the table behind it."""

    chart: Markup
    up: str
    sentences: Sequence[str]
    table: Table


def draw(view: View) -> Growth | None:
    """The figure, or None where arms were trained on all rows only."""
    arms = {name: points for name in dict.fromkeys(p.arm for p in view.found.curve) if (points := _of(view, name))}
    if not arms or len({point.rows for points in arms.values() for point in points}) < 2:
        return None
    every = [point for points in arms.values() for point in points]
    crossings = [found for pair in itertools.combinations(arms, 2) for found in crossed(view, arms, *pair)]
    rows = sorted({point.rows for point in every})
    low, high = math.log10(rows[0]), math.log10(rows[-1])
    scale = Scale(low - 0.06 * (high - low), high + 0.06 * (high - low))
    y = plots.axis(
        [v for p in every for v in (*(ends(p.estimate) or ()), p.estimate.value, *filter(math.isfinite, p.values))],
        say=view.tick,
        hold=[view.base.value] if view.base else [],
    )
    marks = plots.spaced(scale, [(math.log10(count), view.voice.count(count)) for count in rows])
    base = [Rule(view.base.value, "across", "cheap")] if view.base else []
    cheap = view.baselines()[:1]
    rules = [*base, *(Rule(e.value, "across", "cheap") for _, e in cheap if y[0].low <= e.value <= y[0].high)]
    called = [view.voice.say("base")] * len(base) + [view.voice.baseline(b) for b, _ in cheap]
    turns = [Rule(math.log10(found.rows), "upright", "turn") for found in crossings[:1]]
    plot = Plot(
        (scale, marks),
        y,
        HEIGHT,
        shapes=[
            *(Shape(_band(points), f"band {view.style(name)}", is_closed=True) for name, points in arms.items()),
            *(Shape(_middle(points), f"curve {view.style(name)}") for name, points in arms.items()),
        ],
        rules=[*rules, *turns],
        markers=[
            Marker((math.log10(point.rows), value), view.shape(name), f"seed {view.style(name)}", view.called(name))
            for name, points in arms.items()
            for point in points
            for value in point.values
            if math.isfinite(value)
        ],
        names=[
            *(Name(view.called(name), view.style(name), _middle(points)[-1]) for name, points in arms.items()),
            *(
                Name(f"≈ {_round(found.rows, view)}", "strong", rule)
                for found, rule in zip(crossings, turns, strict=False)
            ),
            *(Name(text, "soft", rule) for text, rule in zip(called, rules, strict=False)),
        ],
    )
    title = view.measure(view.found.primary)
    said = "; ".join(
        f"{view.called(name)}: "
        + ", ".join(f"{view.voice.rows(p.rows)} {view.voice.amount(p.estimate.value, view.unit)}" for p in points)
        for name, points in arms.items()
    )
    return Growth(
        chart=plots.draw(plot, title=view.voice.say("growth"), description=said),
        up=title,
        sentences=_sentences(view, crossings),
        table=Table(
            [
                *map(view.voice.say, ("arm", "training_rows", "learning_rate")),
                title,
                *map(view.voice.say, ("intervals", "by_seed")),
            ],
            [_row(view, point) for point in every],
        ),
    )


def crossed(view: View, arms: dict[str, list[CurvePoint]], one: str, other: str) -> list[Crossing]:
    """Where two arms change places, on straight lines between sizes over the logarithm of rows."""
    both = [
        (math.log10(a.rows), a.estimate.value - b.estimate.value)
        for a in arms[one]
        for b in arms[other]
        if a.rows == b.rows
    ]
    found = []
    for (x, gap), (next_x, next_gap) in itertools.pairwise(both):
        if gap * next_gap < 0:
            first, second = (one, other) if (gap > 0) == view.is_higher_better else (other, one)
            found.append(Crossing(first, second, 10 ** (x + (next_x - x) * gap / (gap - next_gap))))
    return found


def _sentences(view: View, crossings: Sequence[Crossing]) -> list[str]:
    if not crossings:
        return [view.voice.say("no_crossing")]
    return [
        view.voice.say("crossing", after=view.called(c.after), before=view.called(c.before), rows=_round(c.rows, view))
        for c in crossings
    ]


def _round(rows: float, view: View) -> str:
    """Two digits: lines between few sizes tell no more."""
    digits = max(0, math.floor(math.log10(rows)) - 1)
    return view.voice.count(int(round(rows, -digits)))


def _of(view: View, name: str) -> list[CurvePoint]:
    points = [p for p in view.found.curve if p.arm == name and p.rows > 0 and math.isfinite(p.estimate.value)]
    return sorted(points, key=lambda point: point.rows)


def _middle(points: Sequence[CurvePoint]) -> list[plots.Point]:
    return [(math.log10(point.rows), point.estimate.value) for point in points]


def _band(points: Sequence[CurvePoint]) -> list[plots.Point]:
    spans = [(math.log10(p.rows), found) for p in points if (found := ends(p.estimate))]
    return [*((x, low) for x, (low, _) in spans), *((x, high) for x, (_, high) in reversed(spans))]


def _row(view: View, point: CurvePoint) -> Row:
    voice, span = view.voice, ends(point.estimate)
    cells = (
        voice.count(point.rows),
        plots.power_of_ten(point.learning_rate),
        voice.amount(point.estimate.value, view.unit),
        voice.interval(*span, view.unit) if span else "–",
        " · ".join(voice.amount(value, view.unit) for value in point.values),
    )
    return Row(view.called(point.arm), view.style(point.arm), cells)
