"""What was gained against what was kept: every arm and seed, the paths of their strengths, and the best of it all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from metier.core.comparison import Arm
from metier.core.evidence import Strength
from metier.report import plots
from metier.report.charts import Axis, number
from metier.report.experiment.view import Row, Table, View, ends, numbers
from metier.report.plots import Cross, Marker, Name, Plot, Point, Rule, Shape

HEIGHT = 380
"""Of a plane, in CSS pixels."""
CHEAP = 3
"""Most cheap ways drawn as lines, the best ones; the table has all."""


@dataclass(frozen=True, slots=True)
class Planes:
    """Both planes.

    Attributes:
        test: Gain on the test rows.
        up: What its upright axis is.
        table: The figures behind it.
        paths: Gain on the validation rows over the strength of the update; None where no strengths were tried.
        strengths: The figures behind that.
    """

    test: Markup
    up: str
    table: Table
    paths: Markup | None
    strengths: Table


def draw(view: View) -> Planes | None:
    """The planes, or None where nothing says what was kept."""
    if not any(arm.kept is not None and math.isfinite(arm.kept.value) for arm in view.alive):
        return None
    says = view.voice.say
    return Planes(
        test=_test(view),
        up=view.gain_title,
        table=Table(
            (says("arm"), says("gain"), says("kept_share"), says("by_seed")),
            [_row(view, arm) for arm in view.found.arms],
        ),
        paths=_paths(view) if any(_mean_path(arm) for arm in view.found.arms) else None,
        strengths=Table(
            (says("arm"), says("gain"), says("kept_share")),
            [
                Row(f"{view.called(arm.name)}, × {share.share:g}", view.style(arm.name), _said(view, share))
                for arm in view.found.arms
                for share in _mean_path(arm)
            ],
        ),
    )


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both directions, from left to right: more is better in both."""
    best: list[Point] = []
    for x, y in sorted(set(points), reverse=True):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best[::-1]


def stairs(points: Sequence[Point], left: float, bottom: float) -> list[Point]:
    """The edge of what was reached: nothing that was tried lies above it and to its right."""
    corners: list[Point] = []
    for x, y in points:
        corners += [(corners[-1][0] if corners else left, y), (x, y)]
    return [*corners, (corners[-1][0], bottom)] if corners else []


def _test(view: View) -> Markup:
    arms = [arm for arm in view.alive if arm.kept is not None and math.isfinite(arm.kept.value)]
    crosses = [_cross(view, arm) for arm in arms]
    lowest = min([0.0, *(cross.at[1] for cross in crosses)]) if view.base is not None else -math.inf
    cheap = [pair for pair in view.baselines()[:CHEAP] if view.better_than(pair[1].value) >= lowest]
    seeds = [point for arm in arms for point in _seeds(view, arm)]
    lines = [view.better_than(estimate.value) for _, estimate in cheap]
    x = _kept_axis(view, [value for cross in crosses for value in (cross.at[0], *(cross.x_ends or ()))])
    y = plots.axis(
        [*lines, *(m.at[1] for m in seeds), *(v for c in crosses for v in (c.at[1], *(c.y_ends or ())))],
        say=lambda value: view.tick(value, signed=view.base is not None),
        hold=[0.0] if view.base is not None else [],
    )
    origin: list[Point] = [(1.0, 0.0)] if view.base is not None else []
    best = front([*(cross.at for cross in crosses), *origin]) if view.is_higher_better or origin else []
    names = [
        Name(view.called(arm.name), view.style(arm.name), cross.at) for arm, cross in zip(arms, crosses, strict=True)
    ]
    names += [Name(view.voice.say("base"), "base", point) for point in origin]
    rules = [Rule(value, "across", "cheap") for value in lines]
    names += [
        Name(view.voice.baseline(baseline), "soft", rule, is_optional=place > 0)
        for place, ((baseline, _), rule) in enumerate(zip(cheap, rules, strict=True))
    ]
    rules += _floor(view)
    names += [Name(view.voice.say("floor"), "bad", rule) for rule in _floor(view)]
    plot = Plot(
        x,
        y,
        HEIGHT,
        shapes=[Shape(stairs(best, x[0].low, y[0].low), "front")] if best else [],
        rules=rules,
        crosses=crosses,
        markers=[*seeds, *(Marker(point, "square", "base", view.voice.say("base")) for point in origin)],
        names=names,
    )
    said = "; ".join(f"{row.name}: {', '.join(row.cells[:2])}" for row in (_row(view, arm) for arm in arms))
    return plots.draw(plot, title=view.voice.say("plane"), description=said)


def _paths(view: View) -> Markup:
    paths = {arm.name: path for arm in view.found.arms if (path := _mean_path(arm))}
    every = [share for path in paths.values() for share in path]
    x = _kept_axis(view, [share.kept for share in every])
    y = plots.axis(
        [share.gain for share in every], say=lambda value: ("+" if value > 0 else "") + number(value), hold=[0.0]
    )
    markers, names = [], []
    for name, path in paths.items():
        names.append(Name(view.called(name), view.style(name), (path[-1].kept, path[-1].gain)))
        for share in path:
            at, said = (
                (share.kept, share.gain),
                f"{view.called(name)}, × {share.share:g}: {', '.join(_said(view, share))}",
            )
            markers.append(Marker(at, "dot", view.style(name), said))
            if share.chosen:
                markers.append(Marker(at, "ring", f"hollow {view.style(name)}", said))
                names.append(Name(f"× {share.share:g}", "strong", at, is_optional=True))
    shares = [
        Name(f"× {share.share:g}", "soft", (share.kept, share.gain), is_optional=True)
        for path in paths.values()
        for share in path
        if 0 < share.share < 1 and not share.chosen
    ]
    rules = _floor(view)
    plot = Plot(
        x,
        y,
        HEIGHT,
        shapes=[Shape([(s.kept, s.gain) for s in path], f"curve {view.style(name)}") for name, path in paths.items()],
        rules=rules,
        markers=markers,
        names=[*names, *(Name(view.voice.say("floor"), "bad", rule) for rule in rules), *shares],
    )
    said = "; ".join(
        f"{view.called(name)}: " + ", ".join(f"× {s.share:g} {_said(view, s)[1]}" for s in path)
        for name, path in paths.items()
    )
    return plots.draw(plot, title=view.voice.say("strengths"), description=said)


def _cross(view: View, arm: Arm) -> Cross:
    figure = arm.figures[view.found.primary]
    pair = view.pair("base", arm.name)
    spans = [view.better_than(end) for end in (ends(figure) or ())]
    if pair is not None and view.base is not None:
        sign = 1 if view.is_higher_better else -1
        spans = [sign * end for end in (pair.difference.low, pair.difference.high)]
    spans = list(numbers(*spans))
    assert arm.kept is not None  # noqa: S101 - only arms with a share kept are drawn
    return Cross(
        (arm.kept.value, view.better_than(figure.value)),
        ends(arm.kept),
        (min(spans), max(spans)) if len(spans) == 2 else None,
        view.style(arm.name),
    )


def _seeds(view: View, arm: Arm) -> list[Marker]:
    return [
        Marker(
            (cell.kept, view.better_than(cell.figures[view.found.primary])),
            view.shape(arm.name),
            f"seed {view.style(arm.name)}",
            f"{view.called(arm.name)}, {view.voice.say('seed')} {cell.seed}",
        )
        for cell in arm.cells
        if cell.kept is not None and len([*numbers(cell.kept, cell.figures.get(view.found.primary))]) == 2
    ]


def _kept_axis(view: View, kept: Sequence[float]) -> Axis:
    floor = [view.found.floor] if view.found.floor is not None else []
    scale, marks = plots.axis([*kept, *floor, 1.0], say=lambda value: f"{number(round(value * 100, 9))} %", about=5)
    return scale, plots.spaced(scale, [mark for mark in marks if mark[0] <= 1 + 1e-9])


def _floor(view: View) -> list[Rule]:
    return [] if view.found.floor is None else [Rule(view.found.floor, "upright", "floor")]


def _row(view: View, arm: Arm) -> Row:
    voice, found = view.voice, view.found
    figure, pair = view.figure(arm), view.pair("base", arm.name)
    gain = "–"
    if pair is not None:
        change = pair.difference
        span = voice.interval(change.low, change.high, pair.unit, signed=True)
        gain = f"{voice.change(change.value, pair.unit)} ({span})"
    elif figure is not None:
        gain = voice.amount(figure.value, view.unit)
    kept = "–"
    if arm.kept is not None:
        kept = voice.amount(arm.kept.value, "share")
        if ends(arm.kept):
            kept += f" ({voice.interval(arm.kept.low, arm.kept.high, 'share')})"
    seeds = " · ".join(
        voice.amount(cell.figures[found.primary], view.unit) if found.primary in cell.figures else voice.say("diverged")
        for cell in arm.cells
    )
    return Row(view.called(arm.name), view.style(arm.name), (gain, kept, seeds))


def _mean_path(arm: Arm) -> list[Strength]:
    """The strengths of an arm, mean over its seeds; those that are no numbers are left out."""
    shares: dict[float, list[Strength]] = {}
    for cell in arm.cells:
        for strength in cell.strengths:
            if all(map(math.isfinite, (strength.gain, strength.kept))):
                shares.setdefault(strength.share, []).append(strength)
    return [
        Strength(
            share=share,
            gain=statistics.fmean(s.gain for s in found),
            kept=statistics.fmean(s.kept for s in found),
            chosen=any(s.chosen for s in found),
        )
        for share, found in sorted(shares.items())
    ]


def _said(view: View, strength: Strength) -> tuple[str, str]:
    return view.voice.change(strength.gain, "nats"), view.voice.amount(strength.kept, "share")
