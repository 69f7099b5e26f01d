"""The whole of what a user says in one file."""

from __future__ import annotations

from typing import Any

from metier.recipe.compare import CompareSection, Tuning
from metier.recipe.data import DataSection
from metier.recipe.evaluate import EvaluateSection
from metier.recipe.export import ExportSection
from metier.recipe.guards import GuardsSection
from metier.recipe.method import LoRAMethod, MethodSection
from metier.recipe.model import ModelSection
from metier.recipe.section import Section
from metier.recipe.task import TaskSection
from metier.recipe.train import TrainSection


class Recipe(Section):
    """One fine-tuning job."""

    model: ModelSection
    """The pretrained model to start from."""
    data: DataSection
    """The rows to learn from and the rows to be judged on."""
    task: TaskSection
    """What is learnt from a row: chat, complete, classify, cells or own."""
    method: MethodSection = LoRAMethod()
    """Which parameters move: full, freeze or lora."""
    train: TrainSection = TrainSection()
    """How the parameters move."""
    guards: GuardsSection = GuardsSection()
    """What holds the network back from forgetting while it trains."""
    evaluate: EvaluateSection = EvaluateSection()
    """What is measured, before and after."""
    compare: CompareSection = CompareSection()
    """Which ways to tune `metier compare` sets beside each other."""
    export: ExportSection = ExportSection()
    """Where the result goes."""

    @property
    def tuning(self) -> Tuning:
        """The way to tune that the recipe says."""
        return Tuning(method=self.method, guards=self.guards, replay=self.data.replay)

    def tuned(self, tuning: Tuning) -> Recipe:
        """The same job with another way to tune."""
        data = self.data.model_copy(update={"replay": tuning.replay})
        return self.model_copy(update={"data": data, "method": tuning.method, "guards": tuning.guards})

    def with_train(self, **settings: Any) -> Recipe:
        """The same job with other settings of `train`, which are taken as they are: checked already."""
        return self.model_copy(update={"train": self.train.model_copy(update=settings)})
