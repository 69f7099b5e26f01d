"""What is set beside each other: each way to tune under its own name, with the recipe that trains it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from metier.core import Fault, RecipeError
from metier.recipe import FreezeMethod, FullMethod, LoRAMethod, MethodSection, Recipe, Tuning, read_tuning

if TYPE_CHECKING:
    from collections.abc import Sequence

    from metier.run.job import Job

GUARDS = {
    "kl": "KL to the base, {:g}",
    "mask_improbable": "improbable tokens masked, above {:g}",
    "l2_sp": "L2-SP, {:g}",
    "replay": "replay, {:g}",
}
"""What a reader calls a guard of some strength."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to tune.

    Attributes:
        name: As given, such as "lora:rank=8+kl=0.1".
        title: What a reader calls it.
        tuning: What moves, and what holds it back.
    """

    name: str
    title: str
    tuning: Tuning

    @property
    def method(self) -> MethodSection:
        """What moves."""
        return self.tuning.method

    @property
    def folder(self) -> str:
        """The name as a folder of any system can have it."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower())

    @property
    def guards(self) -> dict[str, float]:
        """What holds it back from forgetting, by key, and how strongly."""
        tuning = self.tuning
        found = {key: float(getattr(tuning.guards, key)) for key in tuning.guards.on}
        return found if tuning.replay is None else {**found, "replay": tuning.replay.share}

    def unguarded(self, arms: Sequence[Arm]) -> Arm | None:
        """The arm that moves the same and is not held back; None where there is none."""
        return next((arm for arm in arms if arm.method == self.method and not arm.guards), None)

    def job(self, job: Job) -> Job:
        """What this arm trains: the job with its method and guards, and with the rows that it replays."""
        return replace(job, recipe=job.recipe.tuned(self.tuning)).rehearsing()


def arms_of(recipe: Recipe) -> tuple[Arm, ...]:
    """The arms of a recipe, in the order given.

    Raises:
        RecipeError: If two words mean the same.
    """
    found = [Arm(word, "", read_tuning(word, recipe.tuning)) for word in recipe.compare.methods]
    faults = [
        Fault("compare.methods", f"{one.name!r} and {two.name!r} are the same", "name each method once")
        for place, two in enumerate(found)
        for one in found[:place]
        if one.tuning == two.tuning
    ]
    if faults:
        raise RecipeError.of(faults)
    return tuple(replace(arm, title=_title(arm)) for arm in found)


def guards_title(arm: Arm) -> str:
    """What a reader calls the guards of an arm."""
    return "; ".join(GUARDS[key].format(value) for key, value in arm.guards.items())


def _title(arm: Arm) -> str:
    return f"{_method_title(arm.method)}{f'; {guards_title(arm)}' if arm.guards else ''}"


def _method_title(method: MethodSection) -> str:
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
