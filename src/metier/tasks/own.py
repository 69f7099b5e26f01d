"""Tasks that somebody else wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metier.core import RecipeError
from metier.models import called
from metier.tasks.values import ValueTask

if TYPE_CHECKING:
    from metier.recipe import OwnTask


def build(section: OwnTask) -> ValueTask[Any]:
    """The task that `task.use` names.

    Raises:
        RecipeError: If it cannot be imported or called, is no ValueTask, or names no targets.
    """
    task = called(section.use, section.arguments, where="task.use")
    if not isinstance(task, ValueTask):
        raise RecipeError(f"{section.use} is no metier.ValueTask", where="task.use", hint="derive the class from it")
    names = getattr(task, "names", None)
    if not names or isinstance(names, str):
        raise RecipeError(f"{section.use} names no targets", where="task.use", hint='such as names = ("yield",)')
    return task
