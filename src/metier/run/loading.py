"""From a run folder back to a model that can be used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from metier import adapt, models, tasks
from metier.core import ModelError, RecipeError
from metier.core.log import note
from metier.recipe import CellsTask, ChatTask, ClassifyTask, CompleteTask, ModelSection, OwnTask, Recipe
from metier.run import value_specialist
from metier.run.folder import RunFolder
from metier.run.job import choose_device
from metier.run.text_specialist import TextSpecialist

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from metier.models import Model
    from metier.recipe import TextTaskSection
    from metier.run.specialist import Specialist
    from metier.tasks import TextTask


def load(folder: str | Path, *, device: str = "auto") -> Specialist:
    """Load a finished run.

    Raises:
        RecipeError: If the folder is no finished run.
        ModelError: If the base is not the one that the adapter was trained on.
    """
    run = RunFolder(Path(folder))
    recipe, facts = run.recipe(), run.read_facts()
    if recipe.method.kind == "lora" and not run.adapter.is_dir():
        raise ModelError(
            "the adapter is gone", where=str(run.adapter), hint="copy the run folder again, or train again"
        )
    section = recipe.model if run.adapter.exists() else recipe.model.model_copy(update={"base": str(run.path)})
    place = choose_device(recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})}))
    note(f"loading {run.path}: {recipe.task.kind} on {recipe.model.base}")
    match recipe.task:
        case CellsTask():
            model, task = value_specialist.load_cells(recipe, recipe.task, section, facts)
            module = _adapted(run, recipe, model, facts).to(place).eval()
            return value_specialist.CellSpecialist(recipe, run.path, model, module, task)
        case OwnTask():
            whole = not run.adapter.exists()
            model, own = models.load_own(section, recipe.train.seed, strict=whole), tasks.build_own(recipe.task)
            module = _adapted(run, recipe, model, facts).to(place).eval()
            return value_specialist.OwnSpecialist(recipe, run.path, model, module, own)
        case ChatTask() | CompleteTask() | ClassifyTask():
            model, told = _text(recipe, recipe.task, section, facts)
            module = _adapted(run, recipe, model, facts).to(place).eval()
            return TextSpecialist(recipe, run.path, model, module, told.suited(module))
        case _:
            assert_never(recipe.task)


def _text(
    recipe: Recipe, task: TextTaskSection, section: ModelSection, facts: Mapping[str, Any]
) -> tuple[Model, TextTask[Any]]:
    labels = tuple(facts["labels"])
    if section.base != recipe.model.base:
        # A run folder stands alone: revision and trusted code were the base's.
        section = ModelSection(base=section.base)
    model = models.load(section, head=facts["head"], labels=labels or None, seed=recipe.train.seed)
    shape, tokenizer = models.describe(section), models.tokenizer_of(model)
    built = tasks.build(
        task, tokenizer, head=facts["head"], labels=labels, context=shape.context, seed=recipe.train.seed
    )
    return model, built


def _adapted(run: RunFolder, recipe: Recipe, model: Model, facts: Mapping[str, Any]) -> nn.Module:
    """The network with the run's adapter, where it has one."""
    if not run.adapter.exists():
        return model.module
    if model.lineage.fingerprint != facts["base_fingerprint"]:
        raise ModelError(
            f"{recipe.model.base} is not the base that this adapter was trained on: its weights differ",
            where=str(run.adapter),
            hint="get the same revision of the base, or tune again",
        )
    if run.fitted.exists():
        models.fill(model.module, models.read_weights(run.fitted), where=str(run.fitted))
    return adapt.load_adapter(model.module, run.adapter)


def load_base(recipe: Recipe) -> Specialist:
    """The untuned base behind the same doors, for comparison side by side.

    Raises:
        RecipeError: If the task has no replies, or needs an output layer that only tuning makes.
    """
    if not isinstance(recipe.task, ChatTask | CompleteTask | ClassifyTask):
        raise RecipeError(f"task {recipe.task.kind} has no replies", where="task", hint="use `metier predict`")
    shape = models.describe(recipe.model)
    head = tasks.head_for(recipe.task, models.describe_head(recipe.model))
    if head == "classifier":
        raise RecipeError("the base has no output layer for this task", where="model.base", hint="load the run itself")
    model = models.load(recipe.model, head=head, seed=recipe.train.seed)
    labels = getattr(recipe.task, "labels", None) or ()
    task = tasks.build(
        recipe.task,
        models.tokenizer_of(model),
        head=head,
        labels=labels,
        context=shape.context,
        seed=recipe.train.seed,
    )
    module = model.module.to(choose_device(recipe)).eval()
    return TextSpecialist(recipe, Path(), model, module, task.suited(module))
