"""The folder of an experiment: beside the run folder that `metier train` would write, so that both can be there."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core.files import write_json
from metier.run.folder import RunFolder

if TYPE_CHECKING:
    from metier.recipe import Recipe

RESULT = "result.json"
"""Written last of a training, whole or not at all."""


@dataclass(frozen=True, slots=True)
class ExperimentFolder(RunFolder):
    """Names of the files in the folder of an experiment."""

    @property
    def given(self) -> Path:
        """The recipe as the user wrote it."""
        return self.path / "compare.yaml"

    @property
    def resolved(self) -> Path:
        """The recipe with every default written out."""
        return self.path / "compare.resolved.yaml"

    @property
    def comparison(self) -> Path:
        """Everything the experiment found."""
        return self.path / "comparison.json"

    @property
    def interference(self) -> Path:
        """Everything that was found of several tasks."""
        return self.path / "interference.json"

    @property
    def base(self) -> Path:
        """What the base scored."""
        return self.path / "trials" / "base"

    @property
    def holds_tasks(self) -> bool:
        """Whether several tasks are compared, and not several ways to tune for one."""
        return any((self.path / "trials").glob("task-*.yaml"))

    def is_compared(self) -> bool:
        """Whether everything that was asked for last is made and told."""
        found = self.interference if self.holds_tasks else self.comparison
        return found.exists() and found.stat().st_mtime >= self.resolved.stat().st_mtime

    def trainings(self) -> int:
        """Trainings that are made and need not be made again."""
        return sum(1 for _ in (self.path / "trials").rglob(RESULT))

    def remembered(self, name: str) -> Any:
        """What was decided on the way, such as what the budget left out; None where nothing was."""
        try:
            return json.loads((self.path / "trials" / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def remember(self, name: str, value: Any) -> None:
        """Keep a decision, so that whoever goes on decides the same."""
        write_json(self.path / "trials" / f"{name}.json", value)


def find_comparisons(root: Path) -> list[ExperimentFolder]:
    """Folders of comparisons at or below `root`, at most three levels deep, newest first."""
    found = [
        ExperimentFolder(p.parent) for depth in range(4) for p in root.glob("*/" * depth + "compare.resolved.yaml")
    ]
    return sorted(found, key=lambda one: one.resolved.stat().st_mtime, reverse=True)


def folder_of(recipe: Recipe) -> ExperimentFolder:
    """Beside `export.folder`, with "-compare" behind its name."""
    path = Path(recipe.export.folder)
    return ExperimentFolder(path.with_name(f"{path.name}-compare"))
