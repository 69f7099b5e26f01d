"""What is set beside each other: each way to tune under its own name, with the recipe that trains it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from metier.core import Fault, RecipeError
from metier.recipe import FreezeMethod, FullMethod, LoRAMethod, MethodSection, Recipe, read_method


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to tune.

    Attributes:
        name: As given, such as "lora:rank=8".
        title: What a reader calls it.
        method: What moves.
    """

    name: str
    title: str
    method: MethodSection

    @property
    def folder(self) -> str:
        """The name as a folder of any system can have it."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower())

    def recipe(self, recipe: Recipe, *, rate: float, seed: int, steps: int, evaluations: int) -> Recipe:
        """The recipe that trains this arm once, over so many steps with the whole schedule."""
        made = recipe.with_train(learning_rate=rate, seed=seed, max_steps=steps, evaluations=evaluations)
        return made.model_copy(update={"method": self.method})


def arms_of(recipe: Recipe) -> tuple[Arm, ...]:
    """The arms of a recipe, in the order given.

    Raises:
        RecipeError: If two words mean the same.
    """
    found = [Arm(word, "", read_method(word, recipe.method)) for word in recipe.compare.methods]
    faults = [
        Fault("compare.methods", f"{one.name!r} and {two.name!r} are the same", "name each method once")
        for place, two in enumerate(found)
        for one in found[:place]
        if one.method == two.method
    ]
    if faults:
        raise RecipeError.of(faults)
    return tuple(Arm(arm.name, _title(arm.method), arm.method) for arm in found)


def _title(method: MethodSection) -> str:
    match method:
        case LoRAMethod():
            kind = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}[method.variant]
            where = "" if method.targets == "auto" else f", {', '.join(method.targets)}"
            return f"{kind}, rank {method.rank}{'' if method.alpha == 32 else f', alpha {method.alpha:g}'}{where}"
        case FullMethod():
            return "Full fine-tuning"
        case FreezeMethod():
            blocks = "the head alone" if not method.blocks else f"last {method.blocks} blocks"
            return f"Frozen but {blocks}"
