"""The story of a run, and what can be done with its result.

Names are loaded when they are first used, so that a list of runs needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metier.run.folder import RunFolder, find_runs
    from metier.run.foresee import plan_job
    from metier.run.job import Job, say
    from metier.run.loading import load, load_base
    from metier.run.preparation import prepare
    from metier.run.specialist import Specialist
    from metier.run.start import draft
    from metier.run.story import run

_HOME = {
    "Job": "job",
    "RunFolder": "folder",
    "Specialist": "specialist",
    "draft": "start",
    "find_runs": "folder",
    "load": "loading",
    "load_base": "loading",
    "plan_job": "foresee",
    "prepare": "preparation",
    "run": "story",
    "say": "job",
}

__all__ = [
    "Job",
    "RunFolder",
    "Specialist",
    "draft",
    "find_runs",
    "load",
    "load_base",
    "plan_job",
    "prepare",
    "run",
    "say",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"metier.run.{_HOME[name]}"), name)
    raise AttributeError(f"module 'metier.run' has no attribute {name!r}")
