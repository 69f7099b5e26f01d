"""Plots of two sizes against each other: points, lines and bands, each named where it stands instead of in a legend.

Places across are shares of the width and places down are pixels, so that a narrow screen squeezes a plot and never its
text. Names look for a place that is free at every width.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

from metier.report.charts import (
    WIDTH,
    Axis,
    Scale,
    across,
    drawing,
    frame,
    from_top,
    number,
    stretched,
    ticks,
    upright,
)

WIDTHS = (225, 330, 480, 700, 960)
"""Widths in CSS pixels at which names must stand free: of a telephone to that of the page."""
NARROW, BROAD = 7.3, 12.0
"""CSS pixels that a character of a name takes, generously, for fonts differ: most letters, and all others."""
_BROAD = frozenset("MWmw@%&#<>=+~")
"""Characters of ASCII that take more than a letter."""
LONGEST = 178.0
"""CSS pixels of a name; a longer one is cut, for the table has all of it."""
Anchor = Literal["start", "middle", "end"]
_ENDS: tuple[tuple[float, float, Anchor], ...] = ((0, 6, "start"), (100, -6, "end"), (50, 0, "middle"))
"""Where a name could stand along a line across: percent, pixels from there, and its end that stands there."""
_UP, _DOWN = 10.0, 4.0
"""How far a name reaches above and below its baseline, in CSS pixels."""
_REACH = 6.0
"""Half the side of what a mark covers."""
_THIN = 1.0
"""The same of a line through the plot: names may stand close to it."""

MARKS = ("circle", "square", "triangle", "diamond", "down")
"""Shapes of marks, so that colour is never alone."""
_PATHS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4.1-4.1h8.2v8.2h-8.2z",
    "triangle": "M0-5.4L5.2 4H-5.2z",
    "diamond": "M0-5.8L5.8 0L0 5.8L-5.8 0z",
    "down": "M0 5.4L5.2-4H-5.2z",
    "ring": "M-8 0a8 8 0 1 0 16 0a8 8 0 1 0-16 0z",
    "dot": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "times": "M-4.5-4.5L4.5 4.5M4.5-4.5L-4.5 4.5",
}

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """A line, or an area where it is closed.

    Attributes:
        points: (x, y) in data units.
        style: Its CSS classes.
        is_closed: Whether its inside is filled.
    """

    points: Sequence[Point]
    style: str
    is_closed: bool = False


@dataclass(frozen=True, slots=True)
class Marker:
    """One measured point.

    Attributes:
        at: (x, y) in data units.
        shape: Key of its shape.
        style: Its CSS classes.
        title: What a pointer that rests on it is told.
    """

    at: Point
    shape: str
    style: str
    title: str


@dataclass(frozen=True, slots=True)
class Cross:
    """A mean with its intervals; None where there is none."""

    at: Point
    x_ends: tuple[float, float] | None
    y_ends: tuple[float, float] | None
    style: str


@dataclass(frozen=True, slots=True)
class Rule:
    """A line through the whole plot at one value."""

    value: float
    runs: Literal["across", "upright"]
    style: str


@dataclass(frozen=True, slots=True)
class Name:
    """A text beside what it names.

    Attributes:
        text: What it says.
        style: Its CSS classes.
        of: A point, or a rule.
        is_optional: Whether it is left out where nothing is free.
    """

    text: str
    style: str
    of: Point | Rule
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Plot:
    """Everything one plot shows."""

    x: Axis
    y: Axis
    height: int
    shapes: Sequence[Shape] = ()
    rules: Sequence[Rule] = ()
    crosses: Sequence[Cross] = ()
    markers: Sequence[Marker] = ()
    names: Sequence[Name] = ()

    def place(self, at: Point) -> Point:
        """Percent across and pixels down."""
        return self.x[0].percent(at[0]), from_top(self.y[0], at[1], self.height)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a name could stand.

    Attributes:
        percent: Place of its anchor across.
        across: Pixels from there to its end.
        down: Pixels from the top to its baseline.
        anchor: Which end of the text that is.
        cost: How far it is from what it names.
    """

    percent: float
    across: float
    down: float
    anchor: Anchor
    cost: float


@dataclass(slots=True)
class _Taken:
    """What already stands in a plot: boxes of names, and points with their reach, better not covered."""

    points: list[tuple[float, float, float]]
    names: list[tuple[Spot, float]] = field(default_factory=list)


def draw(plot: Plot, *, title: str, description: str) -> Markup:
    """The whole plot as one drawing.

    Args:
        plot: What it shows.
        title: Its name, for readers who do not see it.
        description: What it shows, in a sentence.
    """
    parts = frame(plot.x, plot.y, plot.height)
    areas = [_shape(plot, shape) for shape in plot.shapes]
    parts.append(stretched(areas, plot.height))
    parts += [_rule(plot, rule) for rule in plot.rules]
    parts += [_cross(plot, cross) for cross in plot.crosses]
    parts += [_marker(plot, marker) for marker in plot.markers]
    parts += [_name(plot, name, spot) for name, spot in placed(plot)]
    return drawing("panel plot", plot.height, title, parts, description)


def placed(plot: Plot) -> Iterator[tuple[Name, Spot]]:
    """Every name at the best place that is left, in the order given: what matters most comes first."""
    taken = _Taken([*((*place, _REACH) for place in _obstacles(plot)), *((*place, _THIN) for place in _ruled(plot))])
    for name in plot.names:
        width = pixels(cut(name.text))
        scored = [(spot.cost + _conflicts(spot, width, taken, plot.height), i, spot) for i, spot in _spots(plot, name)]
        cost, _, best = min(scored, key=lambda item: item[:2])
        if name.is_optional and cost >= _HIDDEN:
            continue
        taken.names.append((best, width))
        yield name, best


def axis(values: Sequence[float], *, say: Callable[[float], str], about: int = 5, hold: Sequence[float] = ()) -> Axis:
    """An axis that holds every finite value with a little air.

    Args:
        values: What it must hold.
        say: How a tick is labelled.
        about: How many ticks.
        hold: Values that it holds without air, such as an end that nothing can pass.
    """
    finite = [value for value in [*values, *hold] if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    air = 0.07 * (high - low) or 0.1 * abs(high) or 1.0
    scale = Scale(low - air, high + air)
    return scale, [(tick, say(tick)) for tick in ticks(scale.low, scale.high, about)]


def logarithmic(values: Sequence[float], steps: Sequence[float], say: Callable[[float], str]) -> Axis:
    """An axis of logarithms: `values` are positive, places are their logarithms to base ten.

    Args:
        values: What it must hold.
        steps: Mantissas that get a tick.
        say: How a tick is labelled, by its value.
    """
    low, high = math.log10(min(values)), math.log10(max(values))
    air = 0.06 * (high - low) or 0.3
    scale = Scale(low - air, high + air)
    marks = [step * 10.0**power for power in range(math.floor(scale.low), math.ceil(scale.high) + 1) for step in steps]
    return scale, spaced(scale, [(math.log10(mark), say(mark)) for mark in marks])


def spaced(scale: Scale, marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The ticks inside a scale whose labels have room on the narrowest screen; the last always stays."""
    inside = sorted((mark for mark in marks if scale.low <= mark[0] <= scale.high), reverse=True)
    kept: list[tuple[float, str]] = []
    for place, label in inside:
        if not kept:
            kept.append((place, label))
            continue
        apart = (scale.percent(kept[-1][0]) - scale.percent(place)) / 100 * WIDTHS[0]
        if apart > (pixels(label) + pixels(kept[-1][1])) / 2 + 8:
            kept.append((place, label))
    return kept[::-1]


def power_of_ten(value: float) -> str:
    """A learning rate's label, short: 3e-4, 1.7e-3."""
    if not math.isfinite(value) or value <= 0:
        return "?"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{number(float(mantissa))}e{int(exponent)}"


def columns(text: str) -> int:
    """Columns that a text takes: wide characters take two. Source: Unicode Annex 11."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def pixels(text: str) -> float:
    """About how wide a name is drawn, rather too much than too little."""
    latin = 0x250
    return sum(BROAD if ord(sign) >= latin or sign in _BROAD else NARROW for sign in text)


def cut(text: str) -> str:
    """The text, its end left out where it is too long to stand in a plot."""
    if pixels(text) <= LONGEST:
        return text
    kept = ""
    for sign in text:
        if pixels(kept + sign + "…") > LONGEST:
            break
        kept += sign
    return kept.rstrip() + "…"


def finite(points: Sequence[Point]) -> list[Point]:
    """The points that can be drawn."""
    return [point for point in points if all(map(math.isfinite, point))]


_ASTRAY = 0.4
"""What a name at an edge costs for each percent of the width between it and what it names."""
_HIDDEN = 20.0
"""From this cost on something is covered."""


def _conflicts(spot: Spot, width: float, taken: _Taken, height: int) -> float:
    """What a name at this spot would cover, at any width: other names are worst, then the edge, then points."""
    top, bottom = spot.down - _UP, spot.down + _DOWN
    level = [(percent, reach) for percent, down, reach in taken.points if top - reach < down < bottom + reach]
    names = [
        (other, other_width)
        for other, other_width in taken.names
        if top < other.down + _DOWN + 1 and other.down - _UP - 1 < bottom
    ]
    cost = 200.0 if top < -6 or bottom > height + 2 else 0.0
    for whole in WIDTHS:
        left, right = _sides(spot, width, whole)
        covered = sum(
            other_left < right + 4 and left < other_right + 4
            for other_left, other_right in (_sides(*name, whole) for name in names)
        )
        marks = sum(left - reach < percent * whole / 100 < right + reach for percent, reach in level)
        here = 300.0 * covered + min(_HIDDEN + 4 * marks, 50.0) * bool(marks)
        cost = max(cost, here, 200.0 * (left < -2 or right > whole + 2))
    return cost


def _sides(spot: Spot, width: float, whole: float) -> tuple[float, float]:
    start = spot.percent * whole / 100 + spot.across
    left = start - {"start": 0.0, "middle": width / 2, "end": width}[spot.anchor]
    return left, left + width


def _spots(plot: Plot, name: Name) -> Iterator[tuple[int, Spot]]:
    found = _along(plot, name.of) if isinstance(name.of, Rule) else _around(plot.place(name.of))
    return enumerate(found)


def _around(at: Point) -> Iterator[Spot]:
    percent, down = at
    for far in (11.0, 22.0, 36.0, 52.0, 70.0, 90.0, 112.0, 136.0, 162.0):
        # The first ring touches; the farther ones get a line to what they name, and cost for it.
        cost = (far - 11) / 4
        yield Spot(percent, far, down + 4, "start", cost)
        yield Spot(percent, -far, down + 4, "end", cost + 0.1)
        yield Spot(percent, 0, down - far, "middle", cost + 0.2)
        yield Spot(percent, 0, down + far + 9, "middle", cost + 0.3)
        for sign, lower in ((-1, 0), (1, 9)):
            yield Spot(percent, 0.7 * far, down + sign * 0.8 * far + lower, "start", cost + 0.4)
            yield Spot(percent, -0.7 * far, down + sign * 0.8 * far + lower, "end", cost + 0.5)
            # A long name beside a point near the middle fits a narrow screen only from its edge. No line leads there,
            # so the farther the edge is, the less it will do.
            yield Spot(0, 2, down + sign * far + lower, "start", cost + 10 + _ASTRAY * percent)
            yield Spot(100, -2, down + sign * far + lower, "end", cost + 10 + _ASTRAY * (100 - percent))


def _along(plot: Plot, rule: Rule) -> Iterator[Spot]:
    if rule.runs == "across":
        down = from_top(plot.y[0], rule.value, plot.height)
        for place, (percent, shift, anchor) in enumerate(_ENDS):
            yield Spot(percent, shift, down - 5, anchor, place)
            yield Spot(percent, shift, down + 14, anchor, place + 0.5)
        return
    percent = plot.x[0].percent(rule.value)
    for place, down in enumerate((plot.height - 7.0, 12.0, plot.height - 23.0, 28.0, plot.height / 2.0)):
        yield Spot(percent, 6, down, "start", place)
        yield Spot(percent, -6, down, "end", place + 0.5)


def _obstacles(plot: Plot) -> Iterator[Point]:
    for marker in plot.markers:
        yield plot.place(marker.at)
    for cross in plot.crosses:
        yield plot.place(cross.at)
        for end in cross.y_ends or ():
            yield plot.place((cross.at[0], end))
        for end in cross.x_ends or ():
            yield plot.place((end, cross.at[1]))
    for shape in plot.shapes:
        if not shape.is_closed:
            yield from _sampled([plot.place(point) for point in finite(shape.points)])


def _ruled(plot: Plot) -> Iterator[Point]:
    for rule in plot.rules:
        if rule.runs == "across":
            down = from_top(plot.y[0], rule.value, plot.height)
            yield from _sampled([(0, down), (100, down)])
        else:
            percent = plot.x[0].percent(rule.value)
            yield from _sampled([(percent, 0), (percent, plot.height)])


def _sampled(places: Sequence[Point]) -> Iterator[Point]:
    """Places along a line, near enough that no name slips between two."""
    for (x, y), (next_x, next_y) in itertools.pairwise(places):
        pieces = 2 + int(max(abs(next_x - x) * WIDTHS[-1] / 100, abs(next_y - y)) / 20)
        yield from ((x + (next_x - x) * i / pieces, y + (next_y - y) * i / pieces) for i in range(pieces + 1))


def _shape(plot: Plot, shape: Shape) -> Markup:
    places = " ".join(
        f"{percent * WIDTH / 100:.1f},{down:.1f}" for percent, down in map(plot.place, finite(shape.points))
    )
    tag = "polygon" if shape.is_closed else "polyline"
    return Markup('<{0} class="{1}" points="{2}"/>').format(tag, shape.style, places)


def _rule(plot: Plot, rule: Rule) -> Markup:
    if rule.runs == "across":
        return across(rule.style, from_top(plot.y[0], rule.value, plot.height))
    return upright(rule.style, plot.x[0].percent(rule.value), 0, plot.height)


def _cross(plot: Plot, cross: Cross) -> Markup:
    percent, down = plot.place(cross.at)
    arms = []
    if cross.x_ends is not None:
        arms.append(across(f"arm {cross.style}", down, *map(plot.x[0].percent, cross.x_ends)))
    if cross.y_ends is not None:
        low, high = (from_top(plot.y[0], end, plot.height) for end in cross.y_ends)
        arms.append(upright(f"arm {cross.style}", percent, high, low))
    return Markup("").join(arms)


def _marker(plot: Plot, marker: Marker) -> Markup:
    percent, down = plot.place(marker.at)
    return Markup(
        '<svg x="{:.2f}%" y="{:.1f}" aria-hidden="true"><path class="marker {}" d="{}"><title>{}</title></path></svg>'
    ).format(percent, down, marker.style, _PATHS[marker.shape], marker.title)


def _name(plot: Plot, name: Name, spot: Spot) -> Markup:
    text = Markup('<text class="name {}" x="{:.2f}%" y="{:.1f}" dx="{:g}" text-anchor="{}">{}</text>').format(
        name.style, spot.percent, spot.down, spot.across, spot.anchor, cut(name.text)
    )
    if isinstance(name.of, Rule) or spot.cost < 1:
        return text
    percent, down = plot.place(name.of)
    if spot.percent != percent:
        return text
    leader = Markup(
        '<svg x="{:.2f}%" y="{:.1f}" aria-hidden="true"><path class="leader" d="M0 0L{:.1f} {:.1f}"/></svg>'
    ).format(percent, down, spot.across * 0.85, spot.down - 4 - down)
    return leader + text
