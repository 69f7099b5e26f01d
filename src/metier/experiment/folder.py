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
    def base(self) -> Path:
        """What the base scored."""
        return self.path / "trials" / "base"

    def remembered(self, name: str) -> Any:
        """What was decided on the way, such as what the budget left out; None where nothing was."""
        try:
            return json.loads((self.path / "trials" / f"{name}.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    def remember(self, name: str, value: Any) -> None:
        """Keep a decision, so that whoever goes on decides the same."""
        write_json(self.path / "trials" / f"{name}.json", value)


def folder_of(recipe: Recipe) -> ExperimentFolder:
    """Beside `export.folder`, with "-compare" behind its name."""
    path = Path(recipe.export.folder)
    return ExperimentFolder(path.with_name(f"{path.name}-compare"))
