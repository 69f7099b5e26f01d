"""Training as curves: the lines of a run's log become panels over one axis of steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from metier.report.charts import Line, Mark, Scale, number, panel
from metier.report.voice import Voice

POINTS = 600
"""Most points of one line; longer runs are averaged in equal pieces, for a screen shows no more."""
TABLE_ROWS = 40
"""Most steps in the table behind the figure."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Curves:
    """What the page shows of training.

    Attributes:
        loss: The panel of training and validation loss.
        others: Panels below it, with their titles.
        best: Mark of the kept step, "" where there is none.
        has_validation: Whether a validation loss was taken.
        validation: The validation losses: (step, epoch, loss, whether kept).
        steps: Some of the steps: (step, epoch, loss, learning rate, gradient norm, tokens per second).
    """

    loss: Markup
    others: Sequence[tuple[str, Markup]]
    best: str
    has_validation: bool
    validation: Sequence[tuple[int, float, float, bool]]
    steps: Sequence[tuple[int, float, float, float, float, float]]


def draw(lines: Sequence[Mapping[str, Any]], best_step: int, voice: Voice) -> Curves | None:
    """The curves of a run, or None where its log is empty."""
    steps = [line for line in lines if line["kind"] == "step"]
    checks = [line for line in lines if line["kind"] == "validation"]
    if not steps and not checks:
        return None
    axis = Scale(0, max(1.0, *(float(line["step"]) for line in [*steps, *checks])))
    kept = next((_finite(line["loss"]) for line in checks if line["step"] == best_step), None)
    best = voice.say("best_step", step=voice.count(best_step))
    marks = [Mark(best_step, kept, best)] if checks and best_step <= axis.high else []
    return Curves(
        loss=_loss_panel(steps, checks, axis, marks, voice),
        others=_other_panels(steps, axis, marks, voice),
        best=best if marks else "",
        has_validation=bool(checks),
        validation=[
            (int(line["step"]), float(line["epoch"]), float(line["loss"]), line["step"] == best_step) for line in checks
        ],
        steps=[_step_row(line) for line in _some(steps, TABLE_ROWS)],
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about a twentieth of the steps, its start corrected.

    Source: Kingma and Ba 2015, arXiv:1412.6980, section 3 (bias correction).
    """
    keep = 1 - 1 / max(1.0, len(points) / 20)
    mean, weight, found = 0.0, 0.0, []
    for x, y in points:
        mean, weight = keep * mean + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, mean / weight))
    return found


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points: the means of equal pieces."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    pieces = [points[start:end] for start, end in itertools.pairwise(edges)]
    return [(sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)) for piece in pieces]


def _loss_panel(
    steps: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    axis: Scale,
    marks: Sequence[Mark],
    voice: Voice,
) -> Markup:
    train = _points(steps, "loss")
    lines = [Line("faint", thinned(train)), Line("smooth", thinned(smoothed(train)))]
    lines.append(Line("validation", _points(checks, "loss")))
    said = [voice.say(key) for key, found in (("train_loss", train), ("validation_loss", checks)) if found]
    return panel(
        [line for line in lines if line.points],
        axis,
        height=220,
        title=voice.say("loss_nats"),
        description=" · ".join([*said, *(mark.label for mark in marks)]),
        marks=marks,
    )


def _other_panels(
    steps: Sequence[Mapping[str, Any]], axis: Scale, marks: Sequence[Mark], voice: Voice
) -> list[tuple[str, Markup]]:
    keys = [key for key in ("learning_rate", "grad_norm") if _points(steps, key)]
    plain = [Mark(mark.x, None, mark.label) for mark in marks]
    return [
        (
            voice.say(key),
            panel(
                [Line("single", thinned(_points(steps, key)))],
                axis,
                height=84,
                title=voice.say(key),
                description=_range(_points(steps, key)),
                marks=plain,
                show_x=number if key == keys[-1] else None,
            ),
        )
        for key in keys
    ]


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    found = ((float(line["step"]), _finite(line.get(key))) for line in lines)
    return [(x, y) for x, y in found if y is not None]


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(float(value)) else None


def _range(points: Sequence[Point]) -> str:
    rises = [y for _, y in points]
    return f"{number(min(rises))} – {number(max(rises))}"


def _some(lines: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    if len(lines) <= most:
        return list(lines)
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]


def _step_row(line: Mapping[str, Any]) -> tuple[int, float, float, float, float, float]:
    numbers = [float(line.get(key, math.nan)) for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second")]
    return int(line["step"]), float(line.get("epoch", math.nan)), numbers[0], numbers[1], numbers[2], numbers[3]
