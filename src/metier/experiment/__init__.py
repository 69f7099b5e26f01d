"""Several ways to tune one base, set beside each other on the same rows and seeds: which one, for these data.

Names are loaded when they are first used, so that a typo in a recipe answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metier.experiment.folder import ExperimentFolder, find_comparisons, folder_of
    from metier.experiment.outline import Outline
    from metier.experiment.story import compare, plan
    from metier.experiment.tasks import compare_tasks

_HOME = {
    "ExperimentFolder": "folder",
    "Outline": "outline",
    "compare": "story",
    "compare_tasks": "tasks",
    "find_comparisons": "folder",
    "folder_of": "folder",
    "plan": "story",
}

__all__ = ["ExperimentFolder", "Outline", "compare", "compare_tasks", "find_comparisons", "folder_of", "plan"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"metier.experiment.{_HOME[name]}"), name)
    raise AttributeError(f"module 'metier.experiment' has no attribute {name!r}")
