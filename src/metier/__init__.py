"""metier: turn a general pretrained model into a specialist, and prove it.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metier.core.version import __version__

if TYPE_CHECKING:
    from metier.api import (
        Compared,
        Run,
        Several,
        check,
        compare,
        compare_tasks,
        init,
        load,
        plan,
        plan_comparison,
        resolve,
        train,
    )
    from metier.core import (
        BusyError,
        DataError,
        DivergedError,
        InterruptedRunError,
        MetierError,
        ModelError,
        RecipeError,
        StorageError,
        UnsafeError,
    )
    from metier.core.comparison import Comparison
    from metier.core.evidence import Evidence
    from metier.recipe import Recipe
    from metier.tasks import ValueTask


_HOME = {
    **dict.fromkeys(
        (
            "Compared",
            "Run",
            "Several",
            "check",
            "compare",
            "compare_tasks",
            "init",
            "load",
            "plan",
            "plan_comparison",
            "resolve",
            "train",
        ),
        "metier.api",
    ),
    **dict.fromkeys(
        (
            "BusyError",
            "DataError",
            "DivergedError",
            "InterruptedRunError",
            "MetierError",
            "ModelError",
            "RecipeError",
            "StorageError",
            "UnsafeError",
        ),
        "metier.core",
    ),
    "Comparison": "metier.core.comparison",
    "Evidence": "metier.core.evidence",
    "Recipe": "metier.recipe",
    "ValueTask": "metier.tasks",
}

__all__ = [
    "BusyError",
    "Compared",
    "Comparison",
    "DataError",
    "DivergedError",
    "Evidence",
    "InterruptedRunError",
    "MetierError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "Run",
    "Several",
    "StorageError",
    "UnsafeError",
    "ValueTask",
    "__version__",
    "check",
    "compare",
    "compare_tasks",
    "init",
    "load",
    "plan",
    "plan_comparison",
    "resolve",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'metier' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
