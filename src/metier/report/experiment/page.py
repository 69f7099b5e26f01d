"""The page of an experiment: a comparison becomes what the template shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metier.core.comparison import Arm
from metier.report import figures, page
from metier.report.experiment import costs, forest, growth, plane, rates, told
from metier.report.experiment.finding import beside, finding
from metier.report.experiment.view import BASE, View
from metier.report.page import Tile


def experiment_page(view: View, environment: Mapping[str, Any]) -> str:
    """The whole page as one self-contained file."""
    found = view.found
    return page.render(
        "experiment.html",
        view.voice,
        found=found,
        view=view,
        model=page.short_model(found.model),
        when=page.when(found.finished),
        verdict=found.verdict or finding(view),
        tiles=tiles(view),
        plane=plane.draw(view),
        gain_unit=_unit(view),
        forest=forest.draw(view),
        rates=rates.draw(view),
        growth=growth.draw(view),
        costs=costs.draw(view),
        guards=forest.guards(view),
        stability=[_stability(view, arm) for arm in found.arms],
        groups=told.grouped(view),
        shown=page.SHOWN_ANSWERS,
        units={key: Titled(key, title, found.units[key]) for key, title in found.titles.items()},
        numbers=found.task in figures.NUMBERS,
        environment=page.plain_values(environment),
    )


@dataclass(frozen=True, slots=True)
class Titled:
    """What the table of cheap ways asks of a measure: key, title and unit."""

    name: str
    title: str
    unit: str


def tiles(view: View) -> list[tuple[str, Tile]]:
    """The base and every arm: figure, gain, kept, cost; each with the class of its colour."""
    made = []
    if view.base is not None:
        figure = view.voice.amount(view.base.value, view.unit)
        notes = [view.measure(view.found.primary), figures.interval_text(view.base, view.unit, view.voice)]
        made.append(("base", Tile(view.called(BASE), figure, notes)))
    return made + [(view.style(arm.name), _tile(view, arm)) for arm in view.found.arms]


def _tile(view: View, arm: Arm) -> Tile:
    voice, figure = view.voice, view.figure(arm)
    if figure is None:
        return Tile(view.called(arm.name), "–", [voice.say("diverged")], "bad")
    notes = []
    change = beside(view, arm, BASE)
    if change is not None:
        span = voice.interval(*change.ends, view.unit, signed=True)
        notes.append(f"{voice.change(change.value, view.unit)} ({span})")
    else:
        notes.append(figures.interval_text(figure, view.unit, voice))
    if arm.kept is not None:
        notes.append(f"{voice.say('kept_share')} {voice.amount(arm.kept.value, 'share')}")
    seconds = voice.seconds(arm.predicted.seconds_measured)
    memory = voice.size(arm.predicted.peak_memory_bytes_measured)
    notes.append(" · ".join((seconds, memory, voice.size(arm.bytes_on_disk))))
    return Tile(view.called(arm.name), voice.amount(figure.value, view.unit), notes)


def _stability(view: View, arm: Arm) -> dict[str, Any]:
    voice, found = view.voice, arm.stability
    return {
        "name": view.called(arm.name),
        "style": view.style(arm.name),
        "deviation": voice.distance(found.deviation, view.unit) if len(arm.cells) > 1 else "–",
        "worst": voice.amount(found.worst, view.unit) if found.worst is not None else "–",
        "diverged": voice.amount(found.diverged, "share"),
        "sensitivity": voice.change(found.sensitivity, "nats") if found.sensitivity is not None else "–",
    }


def _unit(view: View) -> str:
    """What the plane's upright axis counts in, "" for figures without a unit."""
    if view.unit == "share":
        return view.voice.say("points_unit" if view.base is not None else "percent_unit")
    return view.unit if view.unit == "nats" else ""
