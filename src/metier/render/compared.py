"""What `metier compare` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from metier.core import RecipeError
from metier.recipe import split_methods
from metier.render.screen import screen

if TYPE_CHECKING:
    from metier.api import Compared, Several
    from metier.experiment import Outline


def asked(*, methods: str | None, seeds: int | None, budget: str | None, data_curve: str | None) -> dict[str, Any]:
    """The words of the command line as values.

    Raises:
        RecipeError: If a share of the data curve is no number.
    """
    return {
        "methods": None if methods is None else split_methods(methods),
        "seeds": seeds,
        "budget": budget,
        "data_curve": None if data_curve is None else [_share(word) for word in data_curve.split(",")],
    }


def told_apart(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Further recipes, and overrides."""
    return [word for word in words if "=" not in word], [word for word in words if "=" in word]


def _share(word: str) -> float:
    try:
        return float(word.strip().removesuffix("%"))
    except ValueError:
        raise RecipeError(
            f"{word!r} is no number", where=f"--data-curve {word}", hint="give percentages, such as 25,50,100"
        ) from None


def show_plan(outline: Outline) -> None:
    """Trainings, time and memory of each method, and what a budget leaves out."""
    from metier.report import Voice, plain

    console, voice = screen(), Voice("en")
    time = "time not known before the first training" if outline.seconds is None else voice.seconds(outline.seconds)
    console.print(
        f"{outline.trainings} trainings, {time}; for each method {outline.trials} trials at a third of "
        f"{outline.steps:,} steps, then {outline.seeds} seeds; {outline.rows:,} test rows",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    for title in ("method", "what", "moves", "time of one", "peak memory", "fits"):
        table.add_column(title, justify="left" if title in {"method", "what"} else "right", overflow="fold")
    for arm in outline.arms:
        table.add_row(
            arm.name,
            arm.title,
            "?" if arm.parameters_moved is None else voice.parameters(arm.parameters_moved),
            "?" if arm.seconds is None else voice.seconds(arm.seconds),
            "?" if arm.peak_memory_bytes is None else voice.size(arm.peak_memory_bytes),
            {True: "yes", False: "no", None: "?"}[arm.fits],
        )
    console.print(table)
    for text in outline.left_out:
        console.print(plain(f"to keep to the budget: {text}"), markup=False)


def show(found: Compared) -> None:
    """The verdict, one line an arm, and where the rest stands."""
    from metier.report import experiment_table, plain

    console, comparison = screen(), found.comparison
    for line in comparison.verdict:
        console.print(plain(line), markup=False)
    console.print(experiment_table(comparison))
    for note in comparison.notes:
        console.print(plain(f"note: {note}"), markup=False)
    console.print(f"\nreport: {found.report}", markup=False, soft_wrap=True)


def as_json(found: Compared) -> dict[str, Any]:
    """The comparison with where it stands."""
    comparison = found.comparison.model_dump(mode="json")
    return {"comparison": comparison, "folder": str(found.path), "report": str(found.report)}


def show_several(found: Several) -> None:
    """Every way to hold the tasks: its scores on each, and what was forgotten."""
    from metier.report import Voice, interference_verdict, plain

    console, held, voice = screen(), found.interference, Voice("en")
    for line in interference_verdict(held):
        console.print(plain(line), markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("way", "after", *held.tasks):
        table.add_column(title, justify="left" if title in {"way", "after"} else "right", overflow="fold")
    for way in held.ways:
        for place, scores in enumerate(way.scores):
            after = held.tasks[place] if len(way.scores) > 1 else ""
            told = (plain(voice.amount(score.value, unit)) for score, unit in zip(scores, held.units, strict=True))
            table.add_row(way.title, after, *told)
    console.print(table)
    for note in held.notes:
        console.print(plain(f"note: {note}"), markup=False)
    console.print(f"\nreport: {found.report}", markup=False, soft_wrap=True)


def several_as_json(found: Several) -> dict[str, Any]:
    """The figures with where they stand."""
    interference = found.interference.model_dump(mode="json")
    return {"interference": interference, "folder": str(found.path), "report": str(found.report)}
