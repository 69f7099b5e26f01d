"""What must be right before anything is trained: rows enough to learn from, to choose by, and to be judged on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from metier.core import DataError, Fault, RecipeError
from metier.core.words import first_few
from metier.data.records import Labelled
from metier.recipe import LoRAMethod
from metier.run import guards, prepare
from metier.run.text import TextJob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.experiment.arms import Arm
    from metier.recipe import Recipe
    from metier.run.job import Job

LEAST_VALIDATION = 8
"""With fewer rows the loss by which rates are chosen is chance. Judgement."""
LEAST_TEST = 20
"""With fewer rows no interval tells two methods apart: that of a share is wider than 20 points to each side.
Source: Wilson 1927."""


def check(job: Job) -> None:
    """Refuse what no verdict could come of.

    Raises:
        DataError: With every split that is too small or lacks a class; each with what would be enough.
        RecipeError: If a part of the data curve is too small for one step.
    """
    faults = [*_too_few(job), *_lacking(job)]
    if faults:
        raise DataError.of(faults)
    _check_parts(job)


def check_arms(job: Job, arms: Sequence[Arm]) -> None:
    """Refuse guards that an arm cannot have.

    Raises:
        RecipeError: For each arm that cannot.
    """
    faults = []
    for arm in arms:
        try:
            guards.check(job.recipe.tuned(arm.tuning), job.head)
            arm.job(job)
        except RecipeError as error:
            faults += [replace(fault, where=f"compare.methods: {arm.name}: {fault.where}") for fault in error.faults]
    if faults:
        raise RecipeError.of(faults)


def _too_few(job: Job) -> list[Fault]:
    found = []
    for name, rows, least in (
        ("validation", len(job.validation), LEAST_VALIDATION),
        ("test", len(job.test), LEAST_TEST),
    ):
        if rows < least:
            what = f"{rows} {name} rows are too few to compare methods by: at least {least} are needed"
            hint = f"give more with data.{name}, as a share or a file"
            if name == "test" and len(job.splits.test) >= least:
                hint = f"set evaluate.rows to {least} or more"
            found.append(Fault(f"data.{name}", what, hint))
    return found


def _lacking(job: Job) -> list[Fault]:
    """Classes that a split lacks: what is not there can be neither chosen by nor judged."""
    if not job.labels:
        return []
    wanted = set(job.labels)
    found = []
    for name, rows in (("train", job.splits.train), ("validation", job.splits.validation), ("test", job.test)):
        lacking = sorted(wanted - _classes(rows))
        if lacking:
            listed = first_few(lacking)
            enough = f"each class needs a row in every split, so that {len(wanted)} {name} rows are the least"
            hint = f"{enough}; give more rows with data.{name}"
            if name == "test" and not wanted - _classes(job.splits.test):
                hint = f"{enough}; raise evaluate.rows, or set it to null"
            found.append(Fault(f"data.{name}", f"no row of class {listed}", hint))
    return found


def _classes(rows: Sequence[object]) -> set[str]:
    return {row.label for row in rows if isinstance(row, Labelled)}


def _check_parts(job: Job) -> None:
    section, rows = job.recipe.compare, len(job.train)
    smallest = min(section.data_curve, default=100.0)
    counts = Counter(row.label for row in job.splits.train if isinstance(row, Labelled))
    least = max(job.recipe.train.batch_size, len(counts))
    if rows * smallest / 100 < least:
        raise RecipeError(
            f"{smallest:g} % of {rows} training rows are fewer than {least}",
            where="compare.data_curve",
            hint=f"begin at {min(100.0, 100.0 * least / rows):.3g} % or more: a step needs a batch, each class a row",
        )


def tasks_of(recipes: Sequence[Recipe], names: Sequence[str]) -> tuple[TextJob, ...]:
    """The jobs of several tasks, once it is sure that they can share a base.

    Raises:
        RecipeError: With every job that does not fit the first.
    """
    faults = [
        Fault(
            name,
            f"it starts from {recipe.model.base}, {names[0]} from {recipes[0].model.base}",
            "name one base in both",
        )
        for name, recipe in zip(names, recipes, strict=True)
        if recipe.model != recipes[0].model
    ]
    if len(set(names)) < len(names):
        faults.append(Fault("metier compare", "one task is named twice", "name each recipe once"))
    if faults:
        raise RecipeError.of(faults)
    jobs = []
    for name, recipe in zip(names, recipes, strict=True):
        method = recipe.method if isinstance(recipe.method, LoRAMethod) else LoRAMethod()
        job = prepare(recipe.model_copy(update={"method": method}))
        if not isinstance(job, TextJob) or job.head != "causal":
            raise RecipeError(
                "several tasks are compared on causal language models, whose output all tasks share",
                where=name,
                hint="for classes take such a model with task.way=words",
            )
        if recipe.data.replay is not None and recipe.data.replay.rows == "base":
            raise RecipeError(
                "answers of the base are made for one task, and joint training has all of them",
                where=f"{name}: data.replay.rows",
                hint="take neutral, or name a file",
            )
        check(job)
        # What is kept of general ability is the business of each comparison alone.
        jobs.append(replace(job, pack=()))
    if len({job.recipe.method for job in jobs}) > 1:
        raise RecipeError(
            "adapters of different settings cannot be made into one",
            where="method",
            hint="set the same in every recipe",
        )
    return tuple(jobs)
