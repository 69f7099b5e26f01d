"""The pages: evidence becomes what a template shows, and the template becomes one self-contained file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from metier.core.evidence import Evidence, Measure
from metier.report import answers, charts, curves, figures, places
from metier.report.voice import Voice

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_ANSWERS = 2
"""Rows of each group that stand open; the others are folded."""
ICONS = {
    "better": "✓",
    "worse": "✕",
    "no clear change": "≈",
    "not compared": "–",
    "equivalent": "=",
    "inconclusive": "?",
}
"""A sign for each verdict, so that colour is never alone."""
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(%|[kMGT]?B|h|min|s|nats|points|个百分点|秒|分|小时)(?![A-Za-z]))")


@dataclass(frozen=True, slots=True)
class Tile:
    """One key figure.

    Attributes:
        label: What it is.
        value: The figure, large.
        notes: Lines below it.
        style: CSS class of its verdict, "" for none.
    """

    label: str
    value: str
    notes: Sequence[str]
    style: str = ""


@dataclass(frozen=True, slots=True)
class PhaseRow:
    """One line of the cost table."""

    name: str
    wall: str
    cpu: str
    memory: str
    share: Markup


def report_page(
    evidence: Evidence,
    *,
    lines: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    recipe_yaml: str,
    voice: Voice,
) -> str:
    """The page of one run."""
    runs = [(voice.say("tuned"), evidence)]
    numbers = figures.answers_numbers(evidence)
    return render(
        "report.html",
        voice,
        numbers=numbers,
        per_second=per_second(numbers=numbers),
        where=places.draw(evidence, voice),
        evidence=evidence,
        model=short_model(evidence.setting.model),
        when=when(evidence.finished),
        retention=retention_verdict(evidence),
        primary=primary_of(evidence),
        tiles=tiles(evidence, voice),
        compares=any(m.group == "domain" and m.before is not None for m in evidence.measures),
        gained=figures.cards(runs, "domain", voice),
        kept=figures.cards(runs, "retention", voice),
        units={measure.name: measure for measure in evidence.measures},
        curves=curves.draw(lines, evidence.cost.best_step, voice),
        groups=answers.grouped(evidence.answers, mark=not numbers),
        shown=SHOWN_ANSWERS,
        phases=phase_rows(evidence, voice),
        total=_total(evidence),
        moved=moved_share(evidence),
        recipe=recipe_yaml,
        environment=plain_values(environment),
    )


def comparison_page(
    runs: Sequence[tuple[str, Evidence]], links: Mapping[str, str], verdict: Sequence[str], voice: Voice
) -> str:
    """The page that puts several runs side by side; `links` are the addresses of their reports by name."""
    numbers = figures.answers_numbers(runs[0][1])
    return render(
        "comparison.html",
        voice,
        runs=runs,
        links=links,
        verdict=verdict,
        model=short_model(runs[0][1].setting.model),
        when=when(max(evidence.finished for _, evidence in runs)),
        gained=figures.cards(runs, "domain", voice),
        kept=figures.cards(runs, "retention", voice),
        lines=[_line(name, runs) for group in ("domain", "retention") for name in figures.measure_names(runs, group)],
        forgot=_forgot(runs, voice),
        same_base=len({evidence.setting.model_fingerprint for _, evidence in runs}) == 1,
        same_data=len({evidence.setting.data_fingerprint for _, evidence in runs}) == 1,
        units={m.name: m for _, evidence in reversed(runs) for m in evidence.measures},
        train_seconds=[train_seconds(evidence) for _, evidence in runs],
        total_seconds=[total_seconds(evidence) for _, evidence in runs],
        memory=[peak_memory_bytes(evidence) for _, evidence in runs],
        moved=[moved_share(evidence) for _, evidence in runs],
        baselines=figures.baselines_over(runs),
        numbers=numbers,
        per_second=per_second(numbers=numbers),
    )


def tiles(evidence: Evidence, voice: Voice) -> list[Tile]:
    """The key figures: gain, retention, time, memory, disk."""
    cost = evidence.cost
    peak = max(cost.phases, key=lambda phase: phase.peak_memory_bytes, default=None)
    train = train_seconds(evidence)
    found = [_gain_tile(evidence, voice), _retention_tile(evidence, voice)]
    train_note = [voice.say("tile_time_note", train=voice.seconds(train))] if train else []
    found.append(Tile(voice.say("tile_time"), voice.seconds(total_seconds(evidence)), train_note))
    if peak is not None and peak.peak_memory_bytes:
        note = voice.say("tile_memory_note", phase=voice.phase(peak.name))
        found.append(Tile(voice.say("tile_memory"), voice.size(peak.peak_memory_bytes), [note]))
    moved = voice.say("tile_disk_note", share=percent(moved_share(evidence)))
    found.append(Tile(voice.say("tile_disk"), voice.size(cost.bytes_on_disk), [moved]))
    return [tile for tile in found if tile is not None]


def primary_of(evidence: Evidence) -> Measure | None:
    """The measure that decides; the first of the domain where none has that name."""
    named = figures.measure_of(evidence, evidence.primary)
    return named or next((measure for measure in evidence.measures if measure.group == "domain"), None)


def retention_verdict(evidence: Evidence) -> str:
    """All retention measures in one word: one that is clearly worse is enough for "worse"."""
    verdicts = {measure.verdict for measure in evidence.measures if measure.group == "retention"}
    return next((word for word in ("worse", "better", "no clear change") if word in verdicts), "not compared")


def train_seconds(evidence: Evidence) -> float:
    """Wall time of the training phases."""
    return sum(phase.wall_seconds for phase in evidence.cost.phases if phase.name == "train")


def total_seconds(evidence: Evidence) -> float:
    """Wall time of all phases."""
    return sum(phase.wall_seconds for phase in evidence.cost.phases)


def peak_memory_bytes(evidence: Evidence) -> int:
    """Highest memory over all phases."""
    return max((phase.peak_memory_bytes for phase in evidence.cost.phases), default=0)


def moved_share(evidence: Evidence) -> float:
    """Share of the model's numbers that training changed."""
    return evidence.cost.parameters_moved / max(1, evidence.cost.parameters_total)


def per_second(*, numbers: bool) -> str:
    """Key of what training read a second: where answers are numbers, that is genes, rows or what the task counts."""
    return "inputs_per_second" if numbers else "tokens_per_second"


def percent(share: float) -> str:
    """A share with two significant digits: 0.68 %, 100 %."""
    return f"{share * 100:.3g} %" if share >= 0.1 else f"{share * 100:.2g} %"


def short_model(model: str) -> str:
    """A Hub id whole, the last part of a local path."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1] if is_local(model) else model


def is_local(model: str) -> bool:
    """Whether a model is named by a place on this machine."""
    return PurePath(model).is_absolute() or model.startswith((".", "~")) or "\\" in model or Path(model).exists()


def when(finished: str) -> str:
    """A moment in UTC to the minute; the text itself where it is no ISO 8601."""
    try:
        return datetime.fromisoformat(finished).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return finished


def phase_rows(evidence: Evidence, voice: Voice) -> list[PhaseRow]:
    """The cost table, with the part of the whole that each phase took."""
    whole = total_seconds(evidence) or 1.0
    return [
        PhaseRow(
            name=voice.phase(phase.name),
            wall=voice.seconds(phase.wall_seconds),
            cpu=voice.seconds(phase.cpu_seconds),
            memory=voice.size(phase.peak_memory_bytes) if phase.peak_memory_bytes else "–",
            share=charts.fraction(
                phase.wall_seconds / whole, f"{voice.phase(phase.name)}: {voice.seconds(phase.wall_seconds)}"
            ),
        )
        for phase in evidence.cost.phases
    ]


def _total(evidence: Evidence) -> dict[str, float]:
    cpu = sum(phase.cpu_seconds for phase in evidence.cost.phases)
    return {"wall": total_seconds(evidence), "cpu": cpu, "memory": peak_memory_bytes(evidence)}


def _gain_tile(evidence: Evidence, voice: Voice) -> Tile | None:
    measure = primary_of(evidence)
    if measure is None:
        return None
    notes = [figures.interval_text(measure.after, measure.unit, voice)]
    if measure.before is not None:
        notes = [voice.say("from", value=voice.amount(measure.before.value, measure.unit))]
    if measure.change is not None:
        interval = figures.interval_text(measure.change, measure.unit, voice, signed=True)
        notes += [voice.change(measure.change.value, measure.unit), f"({interval})"]
    value = voice.amount(measure.after.value, measure.unit)
    return Tile(voice.measure(measure), value, notes, figures.verdict_style(measure.verdict))


def _retention_tile(evidence: Evidence, voice: Voice) -> Tile:
    measures = [measure for measure in evidence.measures if measure.group == "retention"]
    compared = [measure for measure in measures if measure.change is not None]
    worse = [measure for measure in compared if measure.verdict == "worse"]
    label = voice.say("tile_retention")
    if not compared:
        return Tile(label, "–", [voice.say("tile_no_retention")])
    if not worse:
        return Tile(label, voice.say("tile_kept"), [voice.say("tile_kept_note", all=len(compared))], "good")
    most = max(worse, key=_relative_loss)
    change = voice.change(most.change.value, most.unit) if most.change else ""
    notes = [voice.say("tile_worse_note"), voice.say("tile_worst", title=voice.measure(most), change=change)]
    return Tile(label, voice.say("tile_worse", worse=len(worse), all=len(compared)), notes, "bad")


def _relative_loss(measure: Measure) -> float:
    base = abs(measure.before.value) if measure.before else 0.0
    return (figures.loss_of(measure) or 0.0) / (base or 1.0)


def _line(name: str, runs: Sequence[tuple[str, Evidence]]) -> dict[str, Any]:
    """One line of the comparison's table: base and every run, and which run is clearly best."""
    found = [figures.measure_of(evidence, name) for _, evidence in runs]
    measure = next(m for m in found if m is not None)
    return {
        "measure": measure,
        "base": figures.base_of(name, runs),
        "runs": found,
        "best": clearly_best([m.after if m else None for m in found], higher_is_better=measure.higher_is_better),
        "baselines": figures.baselines_of(name, runs),
    }


def clearly_best(estimates: Sequence[Any], *, higher_is_better: bool) -> int | None:
    """Index of the figure whose interval lies apart from all others on the good side, if there is one."""
    found = [(i, e) for i, e in enumerate(estimates) if e is not None]
    if len(found) < 2:
        return None
    best, leader = max(found, key=lambda pair: pair[1].value if higher_is_better else -pair[1].value)
    others = [e for i, e in found if i != best]
    apart = all((leader.low > e.high) if higher_is_better else (leader.high < e.low) for e in others)
    return best if apart and all(figures.has_interval(e) for _, e in found) else None


def _forgot(runs: Sequence[tuple[str, Evidence]], voice: Voice) -> list[dict[str, Any]]:
    """Each comparable retention measure with the run that lost most, and whether its interval lies apart."""
    found = []
    for name, card in zip(
        figures.measure_names(runs, "retention"), figures.cards(runs, "retention", voice), strict=True
    ):
        if len(card.changes) > 1:
            found.append({"card": card, "most": lost_most(name, runs)})
    return found


def lost_most(name: str, runs: Sequence[tuple[str, Evidence]]) -> tuple[int, bool] | None:
    """Which run lost most of a measure (index among the runs compared), and whether its interval lies apart."""
    measures = [m for _, evidence in runs if (m := figures.measure_of(evidence, name)) is not None and m.change]
    losses = [figures.loss_of(measure) or 0.0 for measure in measures]
    if len(measures) < 2 or max(losses) <= 0 or losses.count(max(losses)) > 1:
        return None
    most = losses.index(max(losses))
    changes = [measure.change for measure in measures]
    return most, clearly_best(changes, higher_is_better=not measures[0].higher_is_better) == most


def plain_values(environment: Mapping[str, Any]) -> dict[str, str]:
    """Versions and machine, each as a text."""
    return {key: _plain(value) for key, value in environment.items()}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def tight(text: str) -> str:
    """The text with its units kept on the line of their number."""
    return _BEFORE_UNIT.sub("\u00a0", text)


def render(template: str, voice: Voice, **values: Any) -> str:
    """A template filled, with the style sheet inside and a policy that allows nothing else."""
    css = (TEMPLATES / "style.css").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return _environment(voice).get_template(template).render(css=Markup(css), css_hash=digest, v=voice, **values)  # noqa: S704 - our own file


def _environment(voice: Voice) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: (
            value if isinstance(value, Markup) or not isinstance(value, str) else answers.visible(value)
        ),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["tight"] = tight
    environment.globals |= {
        "t": voice.say,
        "icon": ICONS,
        "percent": percent,
        "style_of": figures.verdict_style,
        "interval_text": figures.interval_text,
        "has_interval": figures.has_interval,
        "behind": figures.behind,
        "short_model": short_model,
        "tick": charts.number,
    }
    return environment
