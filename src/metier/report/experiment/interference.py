"""Several tasks on one base as heat maps: what each way to hold them does to each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from metier.core.comparison import Interference, Way
from metier.report.answers import visible
from metier.report.experiment.view import View
from metier.report.experiment_words import WAYS_ZH

LEVELS = 9
"""Strengths of colour that the style sheet has."""


@dataclass(frozen=True, slots=True)
class Square:
    """One cell: its score, and the class of its colour."""

    text: str
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
    """The section.

    Attributes:
        maps: All ways on all tasks, then each way that has several steps.
        notes: Times to switch, and what was forgotten, in sentences.
    """

    maps: Sequence[Map]
    notes: Sequence[str]


def draw(view: View) -> Tasks | None:
    """The section, or None where there is one task."""
    found = view.found.interference
    if found is None:
        return None
    says = view.voice.say
    base = (says("base"), found.base)
    every = [base, *((_called(view, way), _held(way, len(found.tasks))) for way in found.ways)]
    maps = [_map(view, found, (says("ways"), ""), every)]
    for way in found.ways:
        if len(way.scores) > 1:
            hint = says("rows_trained" if way.name == "switched" else "rows_after")
            rows = [(visible(task), scores) for task, scores in zip(found.tasks, way.scores, strict=False)]
            maps.append(_map(view, found, (_called(view, way), hint), rows))
    return Tasks(maps, list(_notes(view, found)))


def _held(way: Way, tasks: int) -> Sequence[float]:
    """What a way does to each task in the end: its own adapter, one model for all, or the last of a sequence."""
    if way.name == "switched" and len(way.scores) == tasks:
        return [scores[task] for task, scores in enumerate(way.scores)]
    return way.scores[-1]


def _map(view: View, found: Interference, heading: tuple[str, str], rows: Sequence[tuple[str, Sequence[float]]]) -> Map:
    best = _best(found)
    squares = [
        (name, [_square(view, found, task, score, best[task]) for task, score in enumerate(scores)])
        for name, scores in rows
    ]
    return Map(*heading, [visible(task) for task in found.tasks], squares)


def _square(view: View, found: Interference, task: int, score: float, best: float) -> Square:
    """As strong as its share of what was gained; of another colour, and marked, where it is worse than the base."""
    share = _share(found, task, score, best)
    level = round(min(1.0, abs(share)) * LEVELS)
    text = view.voice.amount(score, found.units[task])
    return Square(f"▾ {text}", f"loss heat-{level}") if share < 0 else Square(text, f"gain heat-{level}")


def _best(found: Interference) -> list[float]:
    """The best score of each task over all ways."""
    best = []
    for task, higher in enumerate(found.higher_is_better):
        scores = [row[task] for way in found.ways for row in way.scores if math.isfinite(row[task])]
        best.append((max(scores) if higher else min(scores)) if scores else math.nan)
    return best


def _share(found: Interference, task: int, score: float, best: float) -> float:
    """How much of what can be gained over the base this is; below zero where the base is better."""
    base = found.base[task]
    if not all(map(math.isfinite, (score, base, best))) or best == base:
        return 0.0
    return (score - base) / abs(best - base) * (1 if found.higher_is_better[task] else -1)


def _called(view: View, way: Way) -> str:
    return visible(WAYS_ZH.get(way.name, way.title) if view.voice.language == "zh" else way.title)


def _notes(view: View, found: Interference) -> Sequence[str]:
    says, notes = view.voice.say, []
    for way in found.ways:
        if way.seconds_to_switch is not None:
            notes.append(says("switching", way=_called(view, way), seconds=view.voice.seconds(way.seconds_to_switch)))
        lost = [
            f"{visible(task)} {view.voice.distance(forgotten, unit)}"
            for task, forgotten, unit in zip(found.tasks, way.forgotten, found.units, strict=False)
            if math.isfinite(forgotten) and forgotten > 0
        ]
        if lost:
            notes.append(says("forgotten", way=_called(view, way), items=says("list_comma").join(lost)))
    return notes
