"""The search for a learning rate: the validation loss of every trial of every arm, over one axis of rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from metier.core.comparison import Arm, Trial
from metier.report import plots
from metier.report.charts import number
from metier.report.experiment.view import Row, Table, View
from metier.report.plots import Marker, Name, Plot, Point, Shape, power_of_ten

HEIGHT = 300
"""Of the plot, in CSS pixels."""
SHAPES = {"coarse": "circle", "fine": "dot", "edge": "diamond"}
"""What a trial of each stage is drawn as."""
ABOVE = 6.0
"""A loss is off the plot where it lies this many times farther above the lowest than the middle one does."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The figure.

    Attributes:
        chart: The drawing.
        stages: Stages that occur, with the shape of their marks.
        has_diverged: Whether a trial lies at the top for it diverged, or its loss is off the plot.
        warnings: Arms whose best rate lies at the edge of what was tried, in sentences.
        table: Every trial.
    """

    chart: Markup
    stages: Sequence[str]
    has_diverged: bool
    warnings: Sequence[str]
    table: Table


def draw(view: View) -> Rates | None:
    """The figure, or None where nothing was searched."""
    arms = [arm for arm in view.found.arms if any(_is_rate(trial.rate) for trial in arm.trials)]
    if not arms:
        return None
    top = highest([t.loss for arm in arms for t in arm.trials if t.loss is not None and math.isfinite(t.loss)])
    shown = [loss for arm in arms for _, loss in _points(arm, top)]
    y = plots.axis(shown, say=number)
    rates = [trial.rate for arm in arms for trial in arm.trials if _is_rate(trial.rate)]
    wide = math.log10(max(rates) / min(rates))
    x = plots.logarithmic(rates, (1, 3) if wide < 2.4 else (1,), power_of_ten)
    off = [trial for arm in arms for trial in arm.trials if not _is_shown(trial, top)]
    plot = Plot(
        x,
        y,
        HEIGHT,
        shapes=[Shape(_line(arm, top), f"curve {view.style(arm.name)}") for arm in arms],
        markers=[marker for arm in arms for marker in _markers(view, arm, top, y[0].high)],
        names=[name for arm in arms for name in _names(view, arm, top)],
    )
    warnings = [
        view.voice.say("edge_warning", arm=view.called(arm.name), rate=power_of_ten(arm.learning_rate))
        for arm in arms
        if arm.at_edge
    ]
    return Rates(
        chart=plots.draw(plot, title=view.voice.say("rates"), description=_description(view, arms)),
        stages=[stage for stage in SHAPES if any(t.stage == stage for arm in arms for t in arm.trials)],
        has_diverged=bool(off),
        warnings=warnings,
        table=Table(
            [view.voice.say(key) for key in ("arm", "learning_rate", "stage", "validation_loss", "seconds")],
            [_table_row(view, arm, trial) for arm in arms for trial in sorted(arm.trials, key=lambda t: t.rate)],
        ),
    )


def highest(losses: Sequence[float]) -> float:
    """The highest loss that is drawn: one that is far off would flatten all the others."""
    if not losses:
        return math.inf
    low, middle = min(losses), statistics.median(losses)
    return low + ABOVE * (middle - low) if middle > low else math.inf


def _points(arm: Arm, top: float) -> list[Point]:
    return sorted((math.log10(t.rate), t.loss) for t in arm.trials if t.loss is not None and _is_shown(t, top))


def _line(arm: Arm, top: float) -> list[Point]:
    """The arm's losses by rate; of several at one rate the lowest."""
    found: dict[float, float] = {}
    for x, loss in _points(arm, top):
        found[x] = min(loss, found.get(x, math.inf))
    return sorted(found.items())


def _is_rate(rate: float) -> bool:
    return math.isfinite(rate) and rate > 0


def _is_shown(trial: Trial, top: float) -> bool:
    return _is_rate(trial.rate) and trial.loss is not None and math.isfinite(trial.loss) and trial.loss <= top


def _chosen(arm: Arm, top: float) -> Point | None:
    at = math.log10(arm.learning_rate) if _is_rate(arm.learning_rate) else math.nan
    return next(((x, loss) for x, loss in _line(arm, top) if math.isclose(x, at, abs_tol=1e-6)), None)


def _markers(view: View, arm: Arm, top: float, edge: float) -> list[Marker]:
    style, found = view.style(arm.name), []
    for trial in arm.trials:
        if not _is_rate(trial.rate):
            continue
        said = f"{view.called(arm.name)}, {power_of_ten(trial.rate)}: {_loss(view, trial)}"
        if _is_shown(trial, top) and trial.loss is not None:
            found.append(Marker((math.log10(trial.rate), trial.loss), SHAPES[trial.stage], style, said))
        else:
            found.append(Marker((math.log10(trial.rate), edge), "times", f"lost {style}", said))
    chosen = _chosen(arm, top)
    if chosen is not None:
        found.append(Marker(chosen, "ring", f"hollow {style}", view.voice.say("chosen")))
    return found


def _names(view: View, arm: Arm, top: float) -> list[Name]:
    line = _line(arm, top)
    if not line:
        return []
    at = _chosen(arm, top) or min(line, key=lambda point: point[1])
    return [Name(f"{view.called(arm.name)} {power_of_ten(arm.learning_rate)}", view.style(arm.name), at)]


def _loss(view: View, trial: Trial) -> str:
    lost = trial.loss is None or not math.isfinite(trial.loss)
    return view.voice.say("diverged") if lost or trial.loss is None else view.voice.amount(trial.loss, "nats")


def _table_row(view: View, arm: Arm, trial: Trial) -> Row:
    rate, stage, loss = power_of_ten(trial.rate), view.voice.say(f"stage_{trial.stage}"), _loss(view, trial)
    if math.isclose(trial.rate, arm.learning_rate, rel_tol=1e-6):
        rate += " ✓"
    return Row(view.called(arm.name), view.style(arm.name), (rate, stage, loss, view.voice.seconds(trial.seconds)))


def _description(view: View, arms: Sequence[Arm]) -> str:
    return "; ".join(
        f"{view.called(arm.name)}: "
        + ", ".join(f"{power_of_ten(t.rate)} {_loss(view, t)}" for t in sorted(arm.trials, key=lambda t: t.rate))
        for arm in arms
    )
