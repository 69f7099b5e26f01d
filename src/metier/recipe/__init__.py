"""Everything a user may say, and nothing else: no torch, no work."""

from metier.recipe.compare import CompareSection, Tuning, read_tuning, split_methods
from metier.recipe.data import DataSection, ReplaySection
from metier.recipe.evaluate import EvaluateSection
from metier.recipe.export import ExportSection
from metier.recipe.files import dump, json_schema, load, parse
from metier.recipe.guards import GuardsSection
from metier.recipe.method import FreezeMethod, FullMethod, LoRAMethod, MethodSection
from metier.recipe.model import ModelSection
from metier.recipe.recipe import Recipe
from metier.recipe.section import Section
from metier.recipe.task import CellsTask, ChatTask, ClassifyTask, CompleteTask, OwnTask, TaskSection, TextTaskSection
from metier.recipe.train import (
    Adam,
    AdamW,
    Constant,
    Cosine,
    Linear,
    OptimizerSection,
    ScheduleSection,
    Step,
    TrainSection,
)

__all__ = [
    "Adam",
    "AdamW",
    "CellsTask",
    "ChatTask",
    "ClassifyTask",
    "CompareSection",
    "CompleteTask",
    "Constant",
    "Cosine",
    "DataSection",
    "EvaluateSection",
    "ExportSection",
    "FreezeMethod",
    "FullMethod",
    "GuardsSection",
    "Linear",
    "LoRAMethod",
    "MethodSection",
    "ModelSection",
    "OptimizerSection",
    "OwnTask",
    "Recipe",
    "ReplaySection",
    "ScheduleSection",
    "Section",
    "Step",
    "TaskSection",
    "TextTaskSection",
    "TrainSection",
    "Tuning",
    "dump",
    "json_schema",
    "load",
    "parse",
    "read_tuning",
    "split_methods",
]
