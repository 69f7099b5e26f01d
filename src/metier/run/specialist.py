"""A finished run as an object that answers and measures: what text and numbers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier import data
from metier.core import RecipeError
from metier.recipe import Recipe
from metier.run.job import measured_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from metier.core.evidence import Measure
    from metier.data.records import Record
    from metier.models import Model
    from metier.tasks import Task


@dataclass(frozen=True)
class Specialist(ABC):
    """A tuned model, ready to use; `load` makes one from a run folder.

    Attributes:
        recipe: The recipe of the run.
        folder: Where it stands.
        model: Base network and what reads text for it; for a fully tuned run, the tuned network.
        module: The tuned network; for LoRA, the base wrapped by the adapter.
        task: What it was taught.
    """

    recipe: Recipe
    folder: Path
    model: Model
    module: nn.Module
    task: Task[Any]

    @property
    def replies(self) -> bool:
        """Whether it can be talked to."""
        return False

    @abstractmethod
    def predict(self, questions: Any, *, max_new_tokens: int | None = None) -> Any:
        """The answers: texts for texts, numbers for rows, and for a table of cells the table with its proteins."""

    @abstractmethod
    def evaluate(self, file: str | None = None) -> tuple[Measure, ...]:
        """The domain figures on the run's test rows, or on those of another file."""

    def _rows(self, file: str | None) -> Sequence[Record]:
        """The run's test rows that are measured, or all rows of another file in the same format."""
        recipe = self.recipe
        section = recipe.data.model_copy(update={"test": file, "overlap": "allow"}) if file else recipe.data
        splits = data.read(section, accepts=data.formats_for(recipe.task.kind))
        return splits.test if file else measured_rows(splits.test, recipe.evaluate.rows, recipe.data.seed)

    def chat(
        self,
        question: str | Sequence[Mapping[str, str]],  # noqa: ARG002
        *,
        max_new_tokens: int | None = None,  # noqa: ARG002
    ) -> str:
        """The reply to a message; only models of text reply.

        Raises:
            RecipeError: If this is none.
        """
        hint = "use predict"
        raise RecipeError(f"task {self.recipe.task.kind} has no replies", where=str(self.folder), hint=hint)
