"""A finished run as an object that answers and measures: what text and numbers have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metier.core import RecipeError
from metier.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from metier.core.evidence import Measure
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
