"""Charts as hand-written SVG: they take their colours from the page and stretch with it, and need no script.

Bars use percentages of their own width, so a narrow screen squeezes the bar and never the text. A panel of curves puts
its paths in an inner drawing that stretches, and its labels around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

BAR_HEIGHT = 18
"""Of one bar, in CSS pixels."""
WIDTH = 1000
"""Of a panel's inner drawing, in its own units."""
_SIDE = 200
"""Of a scatter's inner drawing: whole units are finer than a pixel, and short to write."""


@dataclass(frozen=True, slots=True)
class Scale:
    """What the two ends of a chart stand for."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Where a value lies, 0 to 100; what is off the chart lies at its end."""
        if math.isnan(value) or self.high <= self.low:
            return 0.0
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))


Axis = tuple[Scale, Sequence[tuple[float, str]]]
"""What an axis spans, and where it has which labels."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel.

    Attributes:
        style: Its CSS class.
        points: (x, y) in data units, by ascending x.
    """

    style: Literal["faint", "smooth", "validation", "single"]
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Mark:
    """A point of a panel that carries a label."""

    x: float
    y: float | None
    label: str


def bar_scale(values: Sequence[float], unit: str) -> Scale:
    """A scale that holds zero and every finite value; shares always span 0 to 100 %."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min([0.0, *finite]), max([0.0, *finite])
    if unit == "share" and low >= 0 and high <= 1:
        return Scale(0.0, 1.0)
    if low == high:
        return Scale(0.0, 1.0)
    room = 0.04 * (high - low)
    return Scale(low - room if low < 0 else 0.0, high + room if high > 0 else 0.0)


def bar(
    value: float,
    ends: tuple[float, float] | None,
    scale: Scale,
    *,
    style: str,
    title: str,
    predicted: float | None = None,
) -> Markup:
    """One horizontal bar from zero to `value`, with a whisker over `ends` where there is an interval.

    Args:
        value: Where the bar ends.
        ends: Of the interval, None where there is none.
        scale: What the ends of the chart stand for.
        style: CSS class of the series.
        title: What it says, for readers who do not see it.
        predicted: What was expected, drawn as a tick through the bar; None where nothing was.
    """
    zero, tip = scale.percent(0.0), scale.percent(value)
    middle = BAR_HEIGHT / 2
    parts = [
        box("track", 0, 100, 0, BAR_HEIGHT),
        *(upright("grid", 25 * quarter, 0, BAR_HEIGHT) for quarter in (1, 2, 3)),
        box(f"bar {style}", min(zero, tip), abs(tip - zero), 2, BAR_HEIGHT - 4),
    ]
    if scale.low < 0:
        parts.append(upright("zero", zero, 0, BAR_HEIGHT))
    if ends is not None:
        parts.append(_whisker(scale.percent(ends[0]), scale.percent(ends[1]), middle))
    if predicted is not None:
        parts += [upright(line, scale.percent(predicted), -2, BAR_HEIGHT + 2) for line in ("halo", "predicted")]
    return drawing("bar-chart", BAR_HEIGHT, title, parts)


def difference(
    value: float,
    ends: tuple[float, float] | None,
    reach: float,
    *,
    style: str,
    title: str,
    zone: float = 0.0,
    narrow: tuple[float, float] | None = None,
) -> Markup:
    """A difference as a dot with its interval, around a zero in the middle.

    Args:
        value: The difference.
        ends: Of its interval, None where there is none.
        reach: What each side of the chart stands for.
        style: CSS class of what the interval says.
        title: What it says, for readers who do not see it.
        zone: Differences below this count as none; they lie in a band.
        narrow: Ends of a narrower interval, drawn thicker.
    """
    middle = BAR_HEIGHT / 2
    scale = Scale(-reach, reach)
    parts = [across("axis", middle), upright("zero", 50, 0, BAR_HEIGHT)]
    if zone:
        left, right = scale.percent(-zone), scale.percent(zone)
        parts.insert(0, box("zone", left, right - left, -6, BAR_HEIGHT + 12))
    if ends is not None:
        low, high = scale.percent(ends[0]), scale.percent(ends[1])
        parts.append(box(f"span {style}", low, high - low, middle - 2, 4))
    if narrow is not None:
        low, high = map(scale.percent, narrow)
        parts.append(box(f"span {style}", low, high - low, middle - 4, 8))
    parts.append(
        Markup('<circle class="dot {}" cx="{:.2f}%" cy="{:g}" r="5"/>').format(style, scale.percent(value), middle)
    )
    return drawing("change-chart", BAR_HEIGHT, title, parts)


def between(first: float, second: float, scale: Scale, *, style: str, title: str) -> Markup:
    """Two figures of one thing as dots on a line, the first hollow: what it was, and what it became."""
    middle = BAR_HEIGHT / 2
    parts = [across("axis", middle)]
    if math.isfinite(first) and math.isfinite(second):
        left, right = sorted(map(scale.percent, (first, second)))
        parts.append(box(f"span {style}", left, right - left, middle - 2, 4))
    parts += [
        Markup('<circle class="dot {}" cx="{:.2f}%" cy="{:g}" r="5"/>').format(look, scale.percent(value), middle)
        for look, value in ((f"hollow {style}", first), (style, second))
        if math.isfinite(value)
    ]
    return drawing("change-chart", BAR_HEIGHT, title, parts)


def dot(value: float, ends: tuple[float, float] | None, scale: Scale, *, style: str, title: str) -> Markup:
    """One line of a dot plot, as high as its label: a value and its interval, over rules that run through all lines."""
    rules = [
        upright("zero" if tick == 0 and scale.low < 0 else "grid", scale.percent(tick), 0, "100%")
        for tick in ticks(scale.low, scale.high, 4)
    ]
    spans = [across(f"reach {style}", "50%", *map(scale.percent, ends))] if ends is not None else []
    circle = Markup('<circle class="dot {}" cx="{:.2f}%" cy="50%" r="5"/>').format(style, scale.percent(value))
    return drawing("dot-chart", None, title, [*rules, *spans, circle])


def dot_axis(scale: Scale, title: str) -> Markup:
    """The labels below a dot plot."""
    parts = [
        tick_label(f"{scale.percent(tick):.2f}%", 14, number(tick), anchor_at(scale, tick))
        for tick in ticks(scale.low, scale.high, 4)
    ]
    return drawing("dot-chart", None, title, parts)


def correlation_scale(values: Sequence[float]) -> Scale:
    """From zero to one, and as far below zero as the values reach."""
    lowest = min((value for value in values if math.isfinite(value)), default=0.0)
    return Scale(max(-1.0, math.floor(4 * lowest) / 4) if lowest < 0 else 0.0, 1.0)


def scatter(points: Sequence[tuple[float, float]], *, title: str, description: str) -> Markup:
    """Points on a square with one scale for both axes, and the line on which both are equal.

    Args:
        points: (across, up), finite, at least one.
        title: Its name, for readers who do not see it.
        description: What it shows, in a sentence.
    """
    scale = _air([value for point in points for value in point])
    found = ticks(scale.low, scale.high, 3)
    parts: list[Markup] = []
    for tick in found if len(found) > 2 else ticks(scale.low, scale.high, 5):
        along = scale.percent(tick)
        parts += [upright("grid", along, 0, "100%"), across("grid", f"{100 - along:.2f}%")]
        parts.append(tick_label(f"{along:.2f}%", "100%", number(tick), "middle", down=16))
        parts.append(tick_label(-6, f"{100 - along:.2f}%", number(tick), "end", down=4))
    places = sorted({(round(scale.percent(x) * _SIDE / 100), round(scale.percent(y) * _SIDE / 100)) for x, y in points})
    # A line of no length with round ends is a dot, in a third of a circle's characters.
    drawn = "".join(f"M{x} {_SIDE - y}h0" for x, y in places)
    inner = Markup(
        '<svg viewBox="0 0 {0} {0}" width="100%" height="100%" preserveAspectRatio="none" aria-hidden="true">'
        '<path class="identity" d="M0 {0}L{0} 0"/><path class="points" d="{1}"/></svg>'
    ).format(_SIDE, drawn)
    return drawing("scatter", None, title, [*parts, inner], description)


def reach_of(values: Sequence[float]) -> float:
    """How far a chart of differences must reach to either side."""
    return 1.12 * max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0


def fraction(share: float, title: str) -> Markup:
    """A small bar for a part of a whole."""
    parts = [box("track", 0, 100, 1, 6), box("bar tuned", 0, 100 * min(1.0, max(0.0, share)), 1, 6)]
    return drawing("fraction-chart", 8, title, parts)


def panel(
    lines: Sequence[Line],
    x_scale: Scale,
    *,
    height: int,
    title: str,
    description: str,
    marks: Sequence[Mark] = (),
    show_x: Callable[[float], str] | None = None,
) -> Markup:
    """One panel of curves over a shared x axis.

    Args:
        lines: What to draw, the last on top.
        x_scale: The shared axis, which counts whole things.
        height: In CSS pixels, without the axis labels.
        title: Its name, for readers who do not see it.
        description: What it shows, in a sentence.
        marks: Vertical lines through the panel; those with a y also get a point.
        show_x: How to print the x axis; None where a panel below prints it.
    """
    rises = [y for line in lines for _, y in line.points if math.isfinite(y)]
    y_scale = _room(rises)
    whole = [tick for tick in ticks(x_scale.low, x_scale.high, 5) if tick.is_integer()]
    parts = frame(
        (x_scale, [(tick, show_x(tick) if show_x else "") for tick in whole]),
        (y_scale, [(tick, number(tick)) for tick in ticks(y_scale.low, y_scale.high, 3 if height < 120 else 5)]),
        height,
    )
    parts += [upright("mark", x_scale.percent(mark.x), 0, height) for mark in marks]
    parts.append(stretched([_polyline(line, x_scale, y_scale, height) for line in lines], height))
    parts += [_point(line.style, x_scale, y_scale, line.points[0], height) for line in lines if len(line.points) == 1]
    parts += [
        _point("kept", x_scale, y_scale, (mark.x, mark.y), height, mark.label) for mark in marks if mark.y is not None
    ]
    return drawing("panel", height, title, parts, description)


def frame(x: Axis, y: Axis, height: int) -> list[Markup]:
    """The rules of a panel and their labels: to the left of it, and below it."""
    parts: list[Markup] = []
    for tick, label in y[1]:
        down = from_top(y[0], tick, height)
        parts += [across("grid", down), tick_label(-8, down + 4, label, "end")]
    for tick, label in x[1]:
        along = x[0].percent(tick)
        parts.append(upright("grid", along, 0, height))
        if label:
            parts.append(tick_label(f"{along:.2f}%", height + 18, label, anchor_at(x[0], tick)))
    return parts


def stretched(shapes: Sequence[Markup], height: int) -> Markup:
    """A drawing inside another that stretches across; its shapes are `WIDTH` wide."""
    return Markup(
        '<svg viewBox="0 0 {0} {1}" width="100%" height="{1}" preserveAspectRatio="none" aria-hidden="true">{2}</svg>'
    ).format(WIDTH, height, Markup("").join(shapes))


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two ends, about as many as asked for."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label, short: 0.0008, 5e-5, 12,000."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.10g}".replace("-", "−")


def _air(values: Sequence[float]) -> Scale:
    """A scale that holds every value with a little room at both ends."""
    low, high = min(values), max(values)
    air = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return Scale(low - air, high + air)


def _room(values: Sequence[float]) -> Scale:
    """A scale with some air; from zero where the values come near it."""
    if not values:
        return Scale(0.0, 1.0)
    low, high = min(values), max(values)
    if 0 <= low < 0.4 * high:
        return Scale(0.0, 1.06 * high)
    air = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    return Scale(low - air, high + air)


def _polyline(line: Line, x_scale: Scale, y_scale: Scale, height: int) -> Markup:
    places = " ".join(
        f"{x_scale.percent(x) * WIDTH / 100:.1f},{from_top(y_scale, y, height):.1f}"
        for x, y in line.points
        if math.isfinite(y)
    )
    return Markup('<polyline class="curve {}" points="{}"/>').format(line.style, places)


def _point(style: str, x_scale: Scale, y_scale: Scale, at: tuple[float, float], height: int, label: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(label) if label else Markup("")
    return Markup('<circle class="point {}" cx="{:.2f}%" cy="{:.1f}" r="4.5">{}</circle>').format(
        style, x_scale.percent(at[0]), from_top(y_scale, at[1], height), title
    )


def from_top(scale: Scale, value: float, height: float) -> float:
    """How many pixels below the top of a panel a value lies."""
    return height * (1 - scale.percent(value) / 100)


def anchor_at(scale: Scale, value: float) -> str:
    """Which end of a label stands at its tick, so that labels at the ends stay inside."""
    place = scale.percent(value)
    return "start" if place < 2 else "end" if place > 96 else "middle"


def drawing(style: str, height: float | None, title: str, parts: Sequence[Markup], description: str = "") -> Markup:
    """The outer drawing; without a height, the style sheet gives one."""
    described = Markup("<desc>{}</desc>").format(description) if description else Markup("")
    tall = Markup("") if height is None else Markup(' height="{:g}"').format(height)
    return Markup('<svg class="{}" role="img" aria-label="{}" width="100%"{}><title>{}</title>{}{}</svg>').format(
        style, title, tall, title, described, Markup("").join(parts)
    )


def box(style: str, x: float, width: float, y: float, height: float) -> Markup:
    """A rectangle: percent across, pixels down."""
    return Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="{:g}" height="{:g}"/>').format(
        style, x, width, y, height
    )


def upright(style: str, x: float, top: float, bottom: float | str) -> Markup:
    """A line from top to bottom."""
    return Markup('<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="{2:g}" y2="{3}"/>').format(
        style, x, top, _length(bottom)
    )


def across(style: str, y: float | str, left: float = 0, right: float = 100) -> Markup:
    """A line from left to right."""
    return Markup('<line class="{0}" x1="{1:.2f}%" x2="{2:.2f}%" y1="{3}" y2="{3}"/>').format(
        style, left, right, _length(y)
    )


def _whisker(low: float, high: float, middle: float) -> Markup:
    halo = across("halo", middle, low, high)
    ends = (upright("whisker", end, middle - 4, middle + 4) for end in (low, high))
    return Markup("").join([halo, across("whisker", middle, low, high), *ends])


def tick_label(x: float | str, y: float | str, text: str, anchor: str, *, down: float = 0) -> Markup:
    """A small text in the drawing."""
    lower = Markup(' dy="{:g}"').format(down) if down else Markup("")
    return Markup('<text class="tick" x="{}" y="{}"{} text-anchor="{}">{}</text>').format(
        x, y if isinstance(y, str) else f"{y:.1f}", lower, anchor, text
    )


def _length(length: float | str) -> str:
    return length if isinstance(length, str) else f"{length:g}"
