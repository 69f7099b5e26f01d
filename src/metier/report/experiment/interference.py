"""The page of several tasks on one base: heat maps of what each way to hold them does to each task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metier.core.comparison import Interference, Way
from metier.core.evidence import Estimate
from metier.report import figures, page
from metier.report.answers import visible
from metier.report.experiment_words import WAYS_ZH
from metier.report.held import held
from metier.report.voice import Voice

LEVELS = 9
"""Strengths of colour that the style sheet has."""


@dataclass(frozen=True, slots=True)
class Square:
    """One cell: its score, the interval of that, and the class of its colour."""

    text: str
    interval: str
    style: str


@dataclass(frozen=True, slots=True)
class Map:
    """One heat map, which is a table too.

    Attributes:
        title: What it shows.
        hint: What its rows are, "" where their names say it.
        columns: The tasks.
        rows: Name of each row, and its cells.
    """

    title: str
    hint: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Square]]]


@dataclass(frozen=True, slots=True)
class Tasks:
    """The heat maps.

    Attributes:
        maps: All ways on all tasks, then each way that has several steps.
        notes: Times to switch, and what was forgotten, in sentences.
    """

    maps: Sequence[Map]
    notes: Sequence[str]


@dataclass(frozen=True, slots=True)
class Beside:
    """One model for all on one task, beside that task's own adapter.

    Attributes:
        way: What a reader calls it.
        task: Name of the task.
        change: Its score minus that of the adapter.
        interval: The interval of that.
        verdict: What the interval says.
    """

    way: str
    task: str
    change: str
    interval: str
    verdict: str


def interference_page(found: Interference, voice: Voice, environment: Mapping[str, Any]) -> str:
    """The whole page as one self-contained file."""
    return page.render(
        "interference.html",
        voice,
        found=found,
        model=page.short_model(found.model),
        when=page.when(found.finished),
        verdict=held(found, voice),
        names=[visible(task) for task in found.tasks],
        measures=[
            visible(voice.measure_title(key, title)) for key, title in zip(found.measure, found.titles, strict=True)
        ],
        tasks=draw(found, voice),
        beside=list(_beside_own(found, voice)),
        environment=page.plain_values(environment),
    )


def draw(found: Interference, voice: Voice) -> Tasks:
    """All heat maps, and what is to be said of them."""
    base = (voice.say("base"), found.base)
    every = [base, *((_called(voice, way), _at_the_end(way, len(found.tasks))) for way in found.ways)]
    maps = [_map(voice, found, (voice.say("ways"), ""), every)]
    for way in found.ways:
        if len(way.scores) > 1:
            hint = voice.say("rows_trained" if way.name == "switched" else "rows_after")
            rows = [(visible(task), scores) for task, scores in zip(found.tasks, way.scores, strict=False)]
            maps.append(_map(voice, found, (_called(voice, way), hint), rows))
    return Tasks(maps, list(_notes(voice, found)))


def _at_the_end(way: Way, tasks: int) -> Sequence[Estimate]:
    """What a way does to each task in the end: its own adapter, one model for all, or the last of a sequence."""
    if way.name == "switched":
        return [way.scores[task][task] for task in range(tasks)]
    return way.scores[-1]


def _map(
    voice: Voice, found: Interference, heading: tuple[str, str], rows: Sequence[tuple[str, Sequence[Estimate]]]
) -> Map:
    best = _best(found)
    squares = [
        (name, [_square(voice, found, task, score, best[task]) for task, score in enumerate(scores)])
        for name, scores in rows
    ]
    return Map(*heading, [visible(task) for task in found.tasks], squares)


def _square(voice: Voice, found: Interference, task: int, score: Estimate, best: float) -> Square:
    """As strong as its share of what was gained; of another colour, and marked, where it is worse than the base."""
    share = _share(found, task, score.value, best)
    level, unit = round(min(1.0, abs(share)) * LEVELS), found.units[task]
    text, interval = voice.amount(score.value, unit), figures.interval_text(score, unit, voice)
    if share < 0:
        return Square(f"▾ {text}", interval, f"loss heat-{level}")
    return Square(text, interval, f"gain heat-{level}")


def _beside_own(found: Interference, voice: Voice) -> Iterator[Beside]:
    for way in found.ways:
        for task, pair in zip(found.tasks, way.beside_own, strict=False):
            if pair is not None:
                change = pair.difference
                yield Beside(
                    _called(voice, way),
                    visible(task),
                    voice.change(change.value, pair.unit),
                    voice.interval(change.low, change.high, pair.unit, signed=True),
                    pair.verdict,
                )


def _best(found: Interference) -> list[float]:
    """The best score of each task over all ways."""
    best = []
    for task, higher in enumerate(found.higher_is_better):
        every = [row[task].value for way in found.ways for row in way.scores]
        scores = [value for value in every if math.isfinite(value)]
        best.append((max(scores) if higher else min(scores)) if scores else math.nan)
    return best


def _share(found: Interference, task: int, score: float, best: float) -> float:
    """How much of what can be gained over the base this is; below zero where the base is better."""
    base = found.base[task].value
    if not all(map(math.isfinite, (score, base, best))) or best == base:
        return 0.0
    return (score - base) / abs(best - base) * (1 if found.higher_is_better[task] else -1)


def _called(voice: Voice, way: Way) -> str:
    return visible(WAYS_ZH.get(way.name, way.title) if voice.language == "zh" else way.title)


def _notes(voice: Voice, found: Interference) -> Iterator[str]:
    for way in found.ways:
        if way.seconds_to_switch is not None:
            yield voice.say("switching", way=_called(voice, way), seconds=voice.seconds(way.seconds_to_switch))
        lost = [
            f"{visible(task)} {voice.distance(forgotten, unit)}"
            for task, forgotten, unit in zip(found.tasks, way.forgotten, found.units, strict=False)
            if math.isfinite(forgotten) and forgotten > 0
        ]
        if lost:
            yield voice.say("forgotten", way=_called(voice, way), items=voice.say("list_comma").join(lost))
