"""What each arm cost: bars over one scale a card, with what the plan had said as a tick."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from metier.core.comparison import Arm, Cell
from metier.report import charts
from metier.report.experiment.view import View
from metier.report.figures import NUMBERS, Row


@dataclass(frozen=True, slots=True)
class Bars:
    """One kind of cost.

    Attributes:
        title: What it is.
        direction: Which way is good, in words.
        rows: One bar for each arm.
        is_planned: Whether a tick stands for the plan's word.
    """

    title: str
    direction: str
    rows: Sequence[Row]
    is_planned: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """One figure of an arm, and what was said of it before: by the plan, and by the trials of the learning rate."""

    measured: float
    planned: float | None = None
    by_trials: float | None = None

    @property
    def predicted(self) -> float | None:
        """The latest word before it was measured."""
        return self.planned if self.by_trials is None else self.by_trials


def draw(view: View) -> list[Bars]:
    """Every kind of cost that was measured."""
    speed = "inputs_per_second" if view.found.task in NUMBERS else "tokens_per_second"
    kinds: tuple[tuple[str, Callable[[Arm], Cost], Callable[[float], str]], ...] = (
        ("memory", _memory, view.voice.size),
        ("seconds_in_all", _seconds, view.voice.seconds),
        ("seconds_to_best", lambda arm: Cost(mean(arm, lambda cell: cell.seconds_to_best)), view.voice.seconds),
        ("search_time", lambda arm: Cost(arm.search_seconds), view.voice.seconds),
        ("bytes_on_disk", lambda arm: Cost(arm.bytes_on_disk), view.voice.size),
        ("time_to_load", lambda arm: Cost(arm.seconds_to_load), view.voice.seconds),
        (speed, lambda arm: Cost(mean(arm, lambda cell: cell.tokens_per_second)), _whole),
    )
    bars = [_bars(view, key, cost, say) for key, cost, say in kinds]
    return [found for found in bars if found.rows]


def mean(arm: Arm, figure: Callable[[Cell], float]) -> float:
    """Mean over the seeds that ended with numbers; over all where none did."""
    cells = [cell for cell in arm.cells if not cell.diverged] or list(arm.cells)
    found = [value for cell in cells if math.isfinite(value := figure(cell))]
    return statistics.fmean(found) if found else math.nan


def _bars(view: View, key: str, cost: Callable[[Arm], Cost], say: Callable[[float], str]) -> Bars:
    found = [
        (arm, made) for arm in view.found.arms if math.isfinite((made := cost(arm)).measured) and made.measured > 0
    ]
    scale = charts.bar_scale([value for _, c in found for value in (c.measured, c.predicted or 0.0)], "")
    rows = []
    for arm, made in found:
        name, value = view.called(arm.name), say(made.measured)
        by = "planned" if made.by_trials is None else "by_trials"
        planned = "" if made.predicted is None else view.voice.say(by, value=say(made.predicted))
        said = f"{name}: {value}" + (f" ({planned})" if planned else "")
        style = view.style(arm.name)
        drawn = charts.bar(made.measured, None, scale, style=style, title=said, predicted=made.predicted)
        rows.append(Row(name, value, planned, drawn, style))
    return Bars(
        title=view.voice.say(key),
        direction=view.voice.say("higher_is_better" if key.endswith("per_second") else "lower_is_better"),
        rows=rows,
        is_planned=any(made.predicted is not None for _, made in found),
    )


def _memory(arm: Arm) -> Cost:
    said = arm.predicted
    return Cost(said.peak_memory_bytes_measured, said.peak_memory_bytes, said.peak_memory_bytes_by_trials)


def _seconds(arm: Arm) -> Cost:
    return Cost(arm.predicted.seconds_measured, arm.predicted.seconds, arm.predicted.seconds_by_trials)


def _whole(value: float) -> str:
    return f"{value:,.0f}"
