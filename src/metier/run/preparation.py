"""The door from a recipe to a checked job."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from metier.recipe import CellsTask, ChatTask, ClassifyTask, CompleteTask, OwnTask, Recipe
from metier.run import guards, text, values
from metier.run.job import check_machine, doubts, nothing_kept, nothing_to_rehearse

if TYPE_CHECKING:
    from metier.run.job import Job


def prepare(recipe: Recipe) -> Job:
    """Read and check everything before anything expensive begins.

    Raises:
        MetierError: With every fault that was found.
    """
    check_machine(recipe)
    job = _job(recipe)
    if recipe.train.retain is not None and not job.keeps:
        raise nothing_kept(recipe)
    return replace(job, notes=(*job.notes, *doubts(job)))


def _job(recipe: Recipe) -> Job:
    if recipe.data.replay is not None and isinstance(recipe.task, CellsTask | OwnTask):
        raise nothing_to_rehearse(recipe)
    if isinstance(recipe.task, CellsTask | OwnTask):
        guards.check(recipe, "values")
    match recipe.task:
        case ChatTask() | CompleteTask() | ClassifyTask():
            return text.prepare(recipe, recipe.task)
        case CellsTask():
            return values.prepare_cells(recipe, recipe.task)
        case OwnTask():
            return values.prepare_own(recipe, recipe.task)
        case _:
            assert_never(recipe.task)
