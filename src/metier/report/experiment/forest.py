"""Paired differences around zero, with the zone in which they count as none; and what each guard moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from metier.core.comparison import Guard, Pair
from metier.report import charts, plots
from metier.report.answers import visible
from metier.report.experiment.view import BASE, Row, Table, View, numbers
from metier.report.experiment_words import GUARDS_ZH

STYLES = {"better": "good", "worse": "bad", "equivalent": "neutral", "inconclusive": "neutral"}
"""CSS class of a verdict."""


@dataclass(frozen=True, slots=True)
class Line:
    """One difference.

    Attributes:
        label: Who minus whom.
        style: CSS class of the arm it speaks of.
        chart: The drawing.
        value: The difference.
        interval: Its interval.
        verdict: What the interval says.
        needed: What would settle it, "" where it is settled.
        cells: The same for the table: p, p after Holm, rows, seeds, degrees of freedom, what is still seen.
    """

    label: str
    style: str
    chart: Markup
    value: str
    interval: str
    verdict: str
    needed: str
    cells: Sequence[str]


@dataclass(frozen=True, slots=True)
class Block:
    """Differences on one axis.

    Attributes:
        title: What they are taken of, or between.
        direction: Which way is good, in words.
        lines: The differences.
        axis: Labels below them.
        ends: What lies to the left and to the right.
    """

    title: str
    direction: str
    lines: Sequence[Line]
    axis: Markup
    ends: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Forest:
    """The primary measure first, the others folded.

    Attributes:
        primary: Arms beside each other, then beside the base.
        others: The same for every other measure.
        delta: Differences of the primary measure below this count as none.
    """

    primary: Sequence[Block]
    others: Sequence[Block]
    delta: str


@dataclass(frozen=True, slots=True)
class Guarded:
    """One guard: what is kept with it and without it at the same gain."""

    title: str
    arm: str
    style: str
    chart: Markup
    without: str
    with_it: str
    change: str
    interval: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Guards:
    """The figure and the table behind it."""

    lines: Sequence[Guarded]
    table: Table


def draw(view: View) -> Forest | None:
    """The figure, or None where nothing was compared."""
    if not view.found.pairs:
        return None
    keys = list(dict.fromkeys(pair.measure for pair in view.found.pairs))
    primary = [key for key in keys if key == view.found.primary]
    return Forest(
        primary=[block for key in primary for block in _blocks(view, key)],
        others=[block for key in keys if key not in primary for block in _blocks(view, key)],
        delta=view.voice.distance(view.found.delta, view.unit),
    )


def guards(view: View) -> Guards | None:
    """Every guard, on one axis of what is kept; None where none was tried."""
    found = view.found.guards
    if not found:
        return None
    scale, _ = plots.axis([*numbers(*(v for g in found for v in (g.kept, g.kept_without))), 1.0], say=str)
    lines = [_guarded(view, guard, charts.Scale(scale.low, 1.0)) for guard in found]
    heads = ("guard", "arm", "without_guard", "with_guard", "change", "verdict")
    return Guards(
        lines,
        Table(
            [view.voice.say(key) for key in heads],
            [
                Row(
                    line.title,
                    line.style,
                    (
                        line.arm,
                        line.without,
                        line.with_it,
                        f"{line.change} ({line.interval})",
                        view.voice.say(f"guard_{line.verdict}"),
                    ),
                )
                for line in lines
            ],
        ),
    )


def _blocks(view: View, key: str) -> list[Block]:
    """Arms against each other, then against the base: their sizes differ too much for one axis."""
    pairs = [pair for pair in view.found.pairs if pair.measure == key]
    between = [pair for pair in pairs if pair.left != BASE]
    against = [pair for pair in pairs if pair.left == BASE]
    title = view.measure(key)
    headings = ((between, "between_arms"), (against, "against_base"))
    return [_block(view, found, f"{title}: {view.voice.say(key)}") for found, key in headings if found]


def _block(view: View, pairs: Sequence[Pair], title: str) -> Block:
    spans = [v for p in pairs for v in (p.difference.value, p.difference.low, p.difference.high, p.delta)]
    reach = charts.reach_of(spans)
    higher, unit = pairs[0].higher_is_better, pairs[0].unit
    scale = charts.Scale(-reach, reach)
    marks = [
        (tick, charts.number(round(tick * 100, 9) if unit == "share" else tick))
        for tick in charts.ticks(-reach, reach, 4)
    ]
    marks = [(tick, f"+{said}" if tick > 0 else said) for tick, said in marks]
    labels = [
        charts.tick_label(f"{scale.percent(tick):.2f}%", 14, said, charts.anchor_at(scale, tick))
        for tick, said in plots.spaced(scale, marks)
    ]
    words = (view.voice.say("worse"), view.voice.say("better"))
    return Block(
        title=title,
        direction=view.voice.say("higher_is_better" if higher else "lower_is_better"),
        lines=[_line(view, pair, reach) for pair in pairs],
        axis=Markup("").join(labels),
        ends=words if higher else (words[1], words[0]),
    )


def _line(view: View, pair: Pair, reach: float) -> Line:
    voice, found = view.voice, pair.difference
    label = f"{view.called(pair.right)} − {view.called(pair.left)}"
    value = voice.change(found.value, pair.unit)
    interval = voice.interval(found.low, found.high, pair.unit, signed=True)
    said = voice.say(f"pair_{pair.verdict}")
    wide = (found.low, found.high)
    narrow = (found.narrow_low, found.narrow_high)
    return Line(
        label=label,
        style=view.style(pair.right),
        chart=charts.difference(
            found.value,
            wide if all(map(math.isfinite, wide)) else None,
            reach,
            style=STYLES[pair.verdict],
            title=f"{label}: {value} ({interval}), {said}",
            zone=pair.delta,
            narrow=narrow if all(map(math.isfinite, narrow)) else None,
        ),
        value=value,
        interval=interval,
        verdict=pair.verdict,
        needed=needed(view, pair),
        cells=(
            _p(found.p),
            "–" if pair.primary else _p(found.p_adjusted),
            voice.count(found.rows) + (f" ({voice.count(found.clusters)})" if found.clusters != found.rows else ""),
            voice.count(found.seeds),
            charts.number(round(found.degrees_of_freedom, 1)) if math.isfinite(found.degrees_of_freedom) else "–",
            voice.distance(found.smallest_seen, pair.unit),
        ),
    )


def needed(view: View, pair: Pair) -> str:
    """What would settle an open pair; "" where it is settled."""
    if pair.verdict != "inconclusive":
        return ""
    rows = None if pair.rows_needed is None else view.voice.count(pair.rows_needed)
    if rows and pair.seeds_needed:
        return view.voice.say("needs_either", rows=rows, seeds=pair.seeds_needed)
    if rows:
        return view.voice.say("needs_rows", rows=rows)
    return view.voice.say("needs_seeds", seeds=pair.seeds_needed) if pair.seeds_needed else view.voice.say("needs_more")


def _guarded(view: View, guard: Guard, scale: charts.Scale) -> Guarded:
    voice = view.voice
    title = visible(_in_chinese(guard) if voice.language == "zh" else guard.title)
    without, with_it = voice.amount(guard.kept_without, "share"), voice.amount(guard.kept, "share")
    found = guard.difference
    change = voice.change(found.value, "share")
    interval = voice.interval(found.low, found.high, "share", signed=True)
    beside = f"{voice.say('without_guard')} {without}, {voice.say('with_guard')} {with_it}"
    said = f"{title}, {view.called(guard.arm)}: {beside}"
    return Guarded(
        title=title,
        arm=view.called(guard.arm),
        style=view.style(guard.arm),
        chart=charts.between(guard.kept_without, guard.kept, scale, style=STYLES[guard.verdict], title=said),
        without=without,
        with_it=with_it,
        change=change,
        interval=interval,
        verdict=guard.verdict,
    )


def _in_chinese(guard: Guard) -> str:
    names = guard.name.split("+")
    if any(name not in GUARDS_ZH for name in names):
        return guard.title
    strong = {name: f" {number:g}" for name, number in guard.strengths.items()}
    return "；".join(f"{GUARDS_ZH[name]}{strong.get(name, '')}" for name in names)


def _p(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
