"""Measures as charts: each becomes a card of bars, with its change around zero below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from metier.core.evidence import Baseline, Estimate, Evidence, Measure
from metier.report.charts import Scale, bar, bar_scale, difference, reach_of
from metier.report.voice import Voice

NUMBERS = frozenset({"cells", "own"})
"""Kinds of task whose answers are numbers."""


@dataclass(frozen=True, slots=True)
class Row:
    """One bar, or one change, with its text.

    Attributes:
        label: Whose figure it is.
        value: The figure.
        interval: Its interval, or why there is none.
        chart: The drawing.
        style: CSS class of the series.
        verdict: What the interval of a change says; "" for a bar.
        tag: A remark beside it.
    """

    label: str
    value: str
    interval: str
    chart: Markup
    style: str
    verdict: str = ""
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Card:
    """One measure as the page shows it.

    Attributes:
        title: What a reader calls it.
        direction: Which way is good, in words.
        higher_is_better: Which way is good.
        unit: Printed beside the title, "" for shares.
        note: A remark below the title.
        bars: Base, runs, baselines.
        changes: One for each run that can be compared with the base.
        verdict: Of the only change; "not compared" or "" where there are none or several.
        is_primary: Whether it decides.
    """

    title: str
    direction: str
    higher_is_better: bool
    unit: str
    note: str
    bars: Sequence[Row]
    changes: Sequence[Row]
    verdict: str
    is_primary: bool


def has_interval(estimate: Estimate) -> bool:
    """Whether the interval says anything: one row has none."""
    return estimate.n > 1 and not estimate.interval.startswith("none")


def interval_text(estimate: Estimate, unit: str, voice: Voice, *, signed: bool = False) -> str:
    """The interval in words, or that there is none."""
    if not has_interval(estimate):
        return voice.say("no_interval_one" if estimate.n <= 1 else "no_interval")
    return voice.interval(estimate.low, estimate.high, unit, signed=signed)


def answers_numbers(evidence: Evidence) -> bool:
    """Whether the model answers with numbers."""
    return evidence.setting.task in NUMBERS


def behind(measure: Measure, voice: Voice) -> str:
    """How many rows stand behind a measure, or values where it is a mean over targets."""
    n = measure.after.n
    return voice.say("values", n=voice.count(n)) if measure.name.endswith("_target") else voice.rows(n)


def cards(runs: Sequence[tuple[str, Evidence]], group: str, voice: Voice) -> list[Card]:
    """The measures of a group over one or several runs: the one that decides, then the others in their order."""
    found = [_card(name, runs, voice) for name in measure_names(runs, group)]
    return sorted(found, key=lambda card: not card.is_primary)


def measure_names(runs: Sequence[tuple[str, Evidence]], group: str) -> list[str]:
    """Names of a group's measures over all runs, each once."""
    return list(dict.fromkeys(m.name for _, evidence in runs for m in evidence.measures if m.group == group))


def measure_of(evidence: Evidence, name: str) -> Measure | None:
    """The measure of that name, if the run has it."""
    return next((measure for measure in evidence.measures if measure.name == name), None)


def base_of(name: str, runs: Sequence[tuple[str, Evidence]]) -> Estimate | None:
    """The base model's figure: of the first run that has one."""
    found = (measure_of(evidence, name) for _, evidence in runs)
    return next((measure.before for measure in found if measure is not None and measure.before is not None), None)


def baselines_over(runs: Sequence[tuple[str, Evidence]]) -> list[Baseline]:
    """The baselines of all runs; of those with the same name, the first."""
    found: dict[str, Baseline] = {}
    for _, evidence in runs:
        for baseline in evidence.baselines:
            found.setdefault(baseline.name, baseline)
    return list(found.values())


def baselines_of(name: str, runs: Sequence[tuple[str, Evidence]]) -> list[tuple[Baseline, Estimate]]:
    """The baselines that have this measure, with its figure."""
    return [(b, figure.estimate) for b in baselines_over(runs) for figure in b.figures if figure.name == name]


def loss_of(measure: Measure) -> float | None:
    """How far a measure moved the wrong way, positive for worse; None where there is nothing to compare."""
    if measure.change is None:
        return None
    return -measure.change.value if measure.higher_is_better else measure.change.value


def _card(name: str, runs: Sequence[tuple[str, Evidence]], voice: Voice) -> Card:
    found = [(label, evidence, measure_of(evidence, name)) for label, evidence in runs]
    have = [(label, measure) for label, _, measure in found if measure is not None]
    first = have[0][1]
    changes = _changes(have, voice)
    return Card(
        title=voice.measure(first),
        direction=voice.say("higher_is_better" if first.higher_is_better else "lower_is_better"),
        higher_is_better=first.higher_is_better,
        unit="" if first.unit in {"share", "score", "ratio"} else first.unit,
        note=_note(name, first, runs, voice),
        bars=_bars(name, have, runs, voice),
        changes=changes,
        verdict=first.verdict if len(runs) == 1 and not _is_distance(first) else "",
        is_primary=any(evidence.primary == name for _, evidence in runs),
    )


def _note(name: str, measure: Measure, runs: Sequence[tuple[str, Evidence]], voice: Voice) -> str:
    if base_of(name, runs) is not None:
        return ""
    return voice.say("no_base" if measure.group == "domain" else "distance")


def _is_distance(measure: Measure) -> bool:
    return measure.group == "retention" and measure.before is None


def _bars(
    name: str, have: Sequence[tuple[str, Measure]], runs: Sequence[tuple[str, Evidence]], voice: Voice
) -> list[Row]:
    base = base_of(name, runs)
    series = [(voice.say("base"), base, "base")] if base is not None else []
    several = len(runs) > 1
    series += [(label, m.after, f"run-{i % 6}" if several else "tuned") for i, (label, m) in enumerate(have)]
    series += [(voice.baseline(b), estimate, "baseline") for b, estimate in baselines_of(name, runs)]
    unit = have[0][1].unit
    scale = bar_scale([v for _, e, _ in series for v in (e.value, *_shown_ends(e))], unit)
    return [_bar(label, estimate, style, unit, scale, voice) for label, estimate, style in series]


def _bar(label: str, estimate: Estimate, style: str, unit: str, scale: Scale, voice: Voice) -> Row:
    value, interval = voice.amount(estimate.value, unit), interval_text(estimate, unit, voice)
    ends = (estimate.low, estimate.high) if has_interval(estimate) else None
    drawn = bar(estimate.value, ends, scale, style=style, title=f"{label}: {value} ({interval})")
    return Row(label, value, interval, drawn, style)


def _changes(have: Sequence[tuple[str, Measure]], voice: Voice) -> list[Row]:
    compared = [(i, label, m, m.change) for i, (label, m) in enumerate(have) if m.change is not None]
    reach = reach_of([v for _, _, _, change in compared for v in (change.value, *_shown_ends(change))])
    rows = []
    for i, label, measure, change in compared:
        said = label if len(have) > 1 else voice.say("change")
        value = voice.change(change.value, measure.unit)
        interval = interval_text(change, measure.unit, voice, signed=True)
        title = f"{said}: {value} ({interval}), {voice.say(measure.verdict)}"
        ends = (change.low, change.high) if has_interval(change) else None
        style = verdict_style(measure.verdict)
        drawn = difference(change.value, ends, reach, style=style, title=title)
        series = f"run-{i % 6}" if len(have) > 1 else ""
        rows.append(Row(said, value, interval, drawn, series, measure.verdict))
    return rows


def verdict_style(verdict: str) -> str:
    """CSS class of a verdict."""
    return {"better": "good", "worse": "bad"}.get(verdict, "neutral")


def _shown_ends(estimate: Estimate) -> tuple[float, ...]:
    ends = (estimate.low, estimate.high) if has_interval(estimate) else ()
    return tuple(end for end in ends if math.isfinite(end))
