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
_WIDTH = 1000
"""Of a panel's inner drawing, in its own units."""


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


def bar(value: float, ends: tuple[float, float] | None, scale: Scale, *, style: str, title: str) -> Markup:
    """One horizontal bar from zero to `value`, with a whisker over `ends` where there is an interval."""
    zero, tip = scale.percent(0.0), scale.percent(value)
    middle = BAR_HEIGHT / 2
    parts = [
        _rect("track", 0, 100, 0, BAR_HEIGHT),
        *(_rule("grid", 25 * quarter, 0, BAR_HEIGHT) for quarter in (1, 2, 3)),
        _rect(f"bar {style}", min(zero, tip), abs(tip - zero), 2, BAR_HEIGHT - 4),
    ]
    if scale.low < 0:
        parts.append(_rule("zero", zero, 0, BAR_HEIGHT))
    if ends is not None:
        parts.append(_whisker(scale.percent(ends[0]), scale.percent(ends[1]), middle))
    return _svg("bar-chart", BAR_HEIGHT, title, parts)


def difference(value: float, ends: tuple[float, float] | None, reach: float, *, style: str, title: str) -> Markup:
    """A difference as a dot with its interval, around a zero in the middle; `reach` is what each side stands for."""
    scale = Scale(-reach, reach)
    middle = BAR_HEIGHT / 2
    parts = [_across("axis", middle), _rule("zero", 50, 0, BAR_HEIGHT)]
    if ends is not None:
        low, high = scale.percent(ends[0]), scale.percent(ends[1])
        parts.append(_rect(f"span {style}", low, high - low, middle - 2, 4))
    parts.append(
        Markup('<circle class="dot {}" cx="{:.2f}%" cy="{:g}" r="5"/>').format(style, scale.percent(value), middle)
    )
    return _svg("change-chart", BAR_HEIGHT, title, parts)


def reach_of(values: Sequence[float]) -> float:
    """How far a chart of differences must reach to either side."""
    return 1.12 * max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0


def fraction(share: float, title: str) -> Markup:
    """A small bar for a part of a whole."""
    parts = [_rect("track", 0, 100, 1, 6), _rect("bar tuned", 0, 100 * min(1.0, max(0.0, share)), 1, 6)]
    return _svg("fraction-chart", 8, title, parts)


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
    parts: list[Markup] = []
    for tick in ticks(y_scale.low, y_scale.high, 3 if height < 120 else 5):
        y = _down(y_scale, tick, height)
        parts += [_across("grid", y), _label(-8, y + 4, number(tick), "end")]
    for tick in (tick for tick in ticks(x_scale.low, x_scale.high, 5) if tick.is_integer()):
        parts.append(_rule("grid", x_scale.percent(tick), 0, height))
        if show_x:
            parts.append(_label(f"{x_scale.percent(tick):.2f}%", height + 18, show_x(tick), _anchor(x_scale, tick)))
    parts += [_rule("mark", x_scale.percent(mark.x), 0, height) for mark in marks]
    parts.append(_paths(lines, x_scale, y_scale, height))
    parts += [_point(line.style, x_scale, y_scale, line.points[0], height) for line in lines if len(line.points) == 1]
    parts += [
        _point("kept", x_scale, y_scale, (mark.x, mark.y), height, mark.label) for mark in marks if mark.y is not None
    ]
    return _svg("panel", height, title, parts, description)


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


def _room(values: Sequence[float]) -> Scale:
    """A scale with some air; from zero where the values come near it."""
    if not values:
        return Scale(0.0, 1.0)
    low, high = min(values), max(values)
    if 0 <= low < 0.4 * high:
        return Scale(0.0, 1.06 * high)
    air = 0.08 * (high - low) or 0.5 * abs(high) or 1.0
    return Scale(low - air, high + air)


def _paths(lines: Sequence[Line], x_scale: Scale, y_scale: Scale, height: int) -> Markup:
    drawn = Markup("").join(
        Markup('<polyline class="curve {}" points="{}"/>').format(
            line.style,
            " ".join(
                f"{x_scale.percent(x) * _WIDTH / 100:.1f},{_down(y_scale, y, height):.1f}"
                for x, y in line.points
                if math.isfinite(y)
            ),
        )
        for line in lines
    )
    return Markup(
        '<svg viewBox="0 0 {0} {1}" width="100%" height="{1}" preserveAspectRatio="none" aria-hidden="true">{2}</svg>'
    ).format(_WIDTH, height, drawn)


def _point(style: str, x_scale: Scale, y_scale: Scale, at: tuple[float, float], height: int, label: str = "") -> Markup:
    title = Markup("<title>{}</title>").format(label) if label else Markup("")
    return Markup('<circle class="point {}" cx="{:.2f}%" cy="{:.1f}" r="4.5">{}</circle>').format(
        style, x_scale.percent(at[0]), _down(y_scale, at[1], height), title
    )


def _down(scale: Scale, value: float, height: float) -> float:
    return height * (1 - scale.percent(value) / 100)


def _anchor(scale: Scale, value: float) -> str:
    place = scale.percent(value)
    return "start" if place < 2 else "end" if place > 96 else "middle"


def _svg(style: str, height: float, title: str, parts: Sequence[Markup], description: str = "") -> Markup:
    described = Markup("<desc>{}</desc>").format(description) if description else Markup("")
    return Markup(
        '<svg class="{}" role="img" aria-label="{}" width="100%" height="{:g}"><title>{}</title>{}{}</svg>'
    ).format(style, title, height, title, described, Markup("").join(parts))


def _rect(style: str, x: float, width: float, y: float, height: float) -> Markup:
    return Markup('<rect class="{}" x="{:.2f}%" width="{:.2f}%" y="{:g}" height="{:g}"/>').format(
        style, x, width, y, height
    )


def _rule(style: str, x: float, top: float, bottom: float) -> Markup:
    return Markup('<line class="{0}" x1="{1:.2f}%" x2="{1:.2f}%" y1="{2:g}" y2="{3:g}"/>').format(style, x, top, bottom)


def _across(style: str, y: float, left: float = 0, right: float = 100) -> Markup:
    return Markup('<line class="{0}" x1="{1:.2f}%" x2="{2:.2f}%" y1="{3:g}" y2="{3:g}"/>').format(style, left, right, y)


def _whisker(low: float, high: float, middle: float) -> Markup:
    halo = _across("halo", middle, low, high)
    ends = (_rule("whisker", end, middle - 4, middle + 4) for end in (low, high))
    return Markup("").join([halo, _across("whisker", middle, low, high), *ends])


def _label(x: float | str, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)
