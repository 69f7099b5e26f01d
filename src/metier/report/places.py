"""Where a model of numbers works: its figures by target and by group of rows become scatters, dot plots and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from metier.core.evidence import Breakdown, Estimate, Evidence, Scatter
from metier.report import charts
from metier.report.answers import visible
from metier.report.figures import Row, has_interval
from metier.report.voice import Voice

SCATTERS = 12
"""Most targets drawn as a scatter: four of the best, of the middle and of the worst."""
POINTS = 150
"""Most points of a scatter: more hide one another at its size."""
LINES = 40
"""Most lines of a dot plot; of more, the best and the worst half of as many."""
NAMED = 12
"""Most parts without a figure that are named below a dot plot; the table has all."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One scatter.

    Attributes:
        title: Its target.
        figure: Pearson of the target, "" where there is none.
        chart: The drawing.
    """

    title: str
    figure: str
    chart: Markup


@dataclass(frozen=True, slots=True)
class Scatters:
    """Predicted against measured values of some targets.

    Attributes:
        lead: Which targets, and how many rows.
        groups: Panels under their heading, "" where all targets are shown.
    """

    lead: str
    groups: Sequence[tuple[str, Sequence[Panel]]]


@dataclass(frozen=True, slots=True)
class Plot:
    """One dot plot.

    Attributes:
        title: What its lines are.
        lead: What figure and interval mean.
        top: The lines, or the best of them where they are too many.
        left_out: How many lie between, "" for none.
        bottom: The worst of them.
        axis: The labels below.
        missing: Parts without a figure, and why, "" for none.
        is_wide: Whether it has the width of the page.
    """

    title: str
    lead: str
    top: Sequence[Row]
    left_out: str
    bottom: Sequence[Row]
    axis: Markup
    missing: str
    is_wide: bool


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table.

    Attributes:
        name: The part.
        n: Rows behind it.
        figures: Pearson, concordance and error, each with its interval, "" where there is none.
        note: Why a figure is missing.
    """

    name: str
    n: str
    figures: Sequence[tuple[str, str]]
    note: str


@dataclass(frozen=True, slots=True)
class Where:
    """The section of the page.

    Attributes:
        scatters: Predicted against measured, None where no target has points.
        plots: Pearson by target where there are several, then by each grouping of the rows.
        table: Every breakdown, under the name of what it is taken by.
        is_short: Whether the table is all there is to say on the only target.
    """

    scatters: Scatters | None
    plots: Sequence[Plot]
    table: Sequence[tuple[str, Sequence[Line]]]
    is_short: bool


def draw(evidence: Evidence, voice: Voice) -> Where | None:
    """The section, or None where nothing was broken down."""
    if not evidence.breakdowns and not evidence.scatters:
        return None
    by: dict[str, list[Breakdown]] = {}
    for part in evidence.breakdowns:
        by.setdefault(part.by, []).append(part)
    noun = target_noun(evidence)
    targets = by.get(noun, [])
    several = len(targets) > 1
    plots = [
        _plot(name, parts, voice, is_target=name == noun, several=several)
        for name, parts in by.items()
        if several or name != noun
    ]
    return Where(
        scatters=_scatters(evidence.scatters, {part.key: part for part in targets}, voice),
        plots=_explained_once(plots),
        table=[
            (by_title(name, voice), [_table_line(part, voice) for part in by_pearson(parts)])
            for name, parts in by.items()
        ],
        is_short=not plots,
    )


def _explained_once(plots: Sequence[Plot]) -> list[Plot]:
    """The plots without what another says already."""
    leads = [plot.lead for plot in plots]
    return [replace(plot, lead="") if plot.lead in leads[:i] else plot for i, plot in enumerate(plots)]


def target_noun(evidence: Evidence) -> str:
    """What a target is called: the breakdown that the scatters' targets stand in, else the first."""
    drawn = {scatter.key for scatter in evidence.scatters}
    named = (part.by for part in evidence.breakdowns if part.key in drawn)
    return next(named, evidence.breakdowns[0].by if evidence.breakdowns else "")


def by_title(by: str, voice: Voice) -> str:
    """Such as "By cell type"."""
    return voice.say("by", part=voice.part(by))


def by_pearson(parts: Sequence[Breakdown]) -> list[Breakdown]:
    """Best first; those without a figure last, in their order."""
    return sorted(parts, key=lambda part: -_known(part.pearson) if part.pearson else math.inf)


def chosen(
    scatters: Sequence[Scatter], targets: dict[str, Breakdown]
) -> list[tuple[str, Sequence[tuple[Scatter, Breakdown | None]]]]:
    """Which scatters are drawn, best first, under the key of their heading: all, or four of three kinds."""
    pairs = [(scatter, targets.get(scatter.key)) for scatter in scatters if points(scatter)]
    ranked = sorted(
        (pair for pair in pairs if pair[1] is not None and pair[1].pearson is not None),
        key=lambda pair: -_known(pair[1].pearson if pair[1] else None),
    )
    others = [pair for pair in pairs if pair[1] is None or pair[1].pearson is None]
    if len(ranked) <= SCATTERS:
        return [("", [*ranked, *others][:SCATTERS])] if pairs else []
    each = SCATTERS // 3
    middle = (len(ranked) - each) // 2
    return [("best", ranked[:each]), ("middle", ranked[middle : middle + each]), ("worst", ranked[-each:])]


def points(scatter: Scatter) -> list[tuple[float, float]]:
    """Measured and predicted values, evenly taken where they are many."""
    pairs = zip(scatter.measured, scatter.predicted, strict=True)
    found = [(x, y) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]
    if len(found) <= POINTS:
        return found
    return [found[round(i * (len(found) - 1) / (POINTS - 1))] for i in range(POINTS)]


def _scatters(scatters: Sequence[Scatter], targets: dict[str, Breakdown], voice: Voice) -> Scatters | None:
    groups = chosen(scatters, targets)
    if not groups:
        return None
    shown = sum(len(pairs) for _, pairs in groups)
    lead = [voice.say("scatters_points" if shown > 1 else "scatters_one", n=POINTS)]
    if shown < len(scatters):
        lead.insert(0, voice.say("scatters_chosen" if len(groups) > 1 else "scatters_some", n=shown, all=len(scatters)))
    elif shown > 1:
        lead.insert(0, voice.say("scatters_all"))
    panels = [(voice.say(key) if key else "", [_panel(*pair, voice) for pair in pairs]) for key, pairs in groups]
    return Scatters(("" if voice.language == "zh" else " ").join(lead), panels)


def _panel(scatter: Scatter, target: Breakdown | None, voice: Voice) -> Panel:
    pearson = target.pearson if target else None
    figure = "" if pearson is None else f"Pearson {_correlation(pearson, voice)[0]}"
    drawn = points(scatter)
    ends = [(min(values), max(values)) for values in zip(*drawn, strict=True)]
    measured, predicted = (voice.interval(low, high, "score") for low, high in ends)
    told = voice.say(
        "range", measured=measured, predicted=predicted, n=voice.count(len(drawn)), all=voice.count(scatter.n)
    )
    name = visible(scatter.key)
    title = f"{name}: {figure}" if figure else name
    return Panel(name, figure, charts.scatter(drawn, title=title, description=told))


def _plot(by: str, parts: Sequence[Breakdown], voice: Voice, *, is_target: bool, several: bool) -> Plot:
    ranked = [(part, part.pearson) for part in by_pearson(parts) if part.pearson is not None]
    half = LINES // 2
    split = len(ranked) > LINES
    top, bottom = (ranked[:half], ranked[-half:]) if split else (ranked, [])
    scale = charts.correlation_scale(
        [end for _, e in ranked for end in (e.value, *((e.low,) if has_interval(e) else ()))]
    )
    lead = "by_target_lead" if is_target else "by_group_lead" if several else "by_group_lead_one"
    rows = [[_line(part, e, scale, voice, show_n=not is_target) for part, e in some] for some in (top, bottom)]
    return Plot(
        title=by_title(by, voice),
        lead=voice.say(lead) if ranked else "",
        top=rows[0],
        left_out=voice.say("left_out", n=len(ranked) - LINES) if split else "",
        bottom=rows[1],
        axis=charts.dot_axis(scale, "Pearson") if ranked else Markup(""),
        missing=_missing(parts, voice),
        is_wide=is_target,
    )


def _line(part: Breakdown, pearson: Estimate, scale: charts.Scale, voice: Voice, *, show_n: bool) -> Row:
    name, n = part_name(part, voice), f"n = {voice.count(part.n)}"
    value, interval = _correlation(pearson, voice)
    ends = (pearson.low, pearson.high) if has_interval(pearson) else None
    drawn = charts.dot(pearson.value, ends, scale, style="tuned", title=f"{name}: {value} ({interval}), {n}")
    return Row(name, value, interval, drawn, "", tag=n if show_n else "")


def _table_line(part: Breakdown, voice: Voice) -> Line:
    error, rmse = ("–", ""), part.rmse
    if rmse is not None:
        known = voice.interval(rmse.low, rmse.high, "score") if has_interval(rmse) else voice.say("no_interval")
        error = (voice.amount(rmse.value, "score"), known)
    found = (*(_correlation(estimate, voice) for estimate in (part.pearson, part.ccc)), error)
    return Line(part_name(part, voice), voice.count(part.n), found, voice.why(part.note))


def _correlation(estimate: Estimate | None, voice: Voice) -> tuple[str, str]:
    """A correlation and its interval, always with three decimals, so that they stand in columns."""
    if estimate is None:
        return "–", ""
    value, low, high = (
        f"{round(x, 3) + 0.0:.3f}".replace("-", "−") for x in (estimate.value, estimate.low, estimate.high)
    )
    # A group's figure with one target behind it has many rows all the same: "one value" would mislead.
    return value, f"{low} {voice.say('to')} {high}" if has_interval(estimate) else voice.say("no_interval")


def part_name(part: Breakdown, voice: Voice) -> str:
    """Which protein, cell type or donor; rows without a value have none."""
    return visible(part.key) if part.key.strip() else voice.say("unnamed")


def _missing(parts: Sequence[Breakdown], voice: Voice) -> str:
    missing = [part for part in parts if part.pearson is None]
    if not missing:
        return ""
    comma, stop, brackets = ("，", "；", "（{}）") if voice.language == "zh" else (", ", "; ", " ({})")
    named = []
    for part in missing[:NAMED]:
        told = [f"n = {voice.count(part.n)}", *([voice.why(part.note)] if part.note else [])]
        named.append(part_name(part, voice) + brackets.format(comma.join(told)))
    if len(missing) > NAMED:
        named.append(voice.say("and_more", n=len(missing) - NAMED))
    return voice.say("without_figure", items=stop.join(named))


def _known(estimate: Estimate | None) -> float:
    return estimate.value if estimate is not None and math.isfinite(estimate.value) else -math.inf
