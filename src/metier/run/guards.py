"""Guards against forgetting that work while a network trains: which may be asked for, and what they make of a job."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metier import adapt, tasks, training
from metier.core import Fault, RecipeError
from metier.recipe import LoRAMethod
from metier.run.replay import answered
from metier.tasks.causal import TokenTask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from metier.models import Head, Model
    from metier.recipe import Recipe
    from metier.run.job import Job

MOST_MASKED = 0.4
"""Share of the learnt tokens that may be left out: of more, too little of the task would be left. Judgement."""


@dataclass(frozen=True, slots=True)
class Learnt:
    """What is learnt under the guards of a recipe.

    Attributes:
        train: Encoded training rows.
        masked: Share of the learnt tokens that are not learnt; None where none was to be left out.
    """

    train: Sequence[Any]
    masked: float | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if self.masked is None:
            return ()
        return (f"{self.masked:.1%} of the learnt tokens are improbable to the base and are not learnt",)


def check(recipe: Recipe, head: Head) -> None:
    """Refuse guards that the task or the method cannot have.

    Raises:
        RecipeError: For each of them.
    """
    section, faults = recipe.guards, []
    if head != "causal":
        what = "only a causal language model has a probability for every token that the base could be asked for"
        faults += [
            Fault(f"guards.{name}", what, "leave it out, or take train.retain or data.replay")
            for name in section.on
            if name != "l2_sp"
        ]
    if section.l2_sp is not None and isinstance(recipe.method, LoRAMethod):
        what = "an adapter begins at nothing, so that it has no value of the base to be pulled to"
        hint = "leave it out, take method=full or freeze, or set train.optimizer.weight_decay, which pulls to nothing"
        faults.append(Fault("guards.l2_sp", what, hint))
    if faults:
        raise RecipeError.of(faults)


def learnt(job: Job, module: nn.Module) -> Learnt:
    """What is learnt, once the base was asked what the guards must know of the rows.

    Args:
        job: Its task is suited to the network.
        module: The network; where it has an adapter, the base is the network without it.

    Raises:
        RecipeError: If more than `MOST_MASKED` of the learnt tokens would be left out.
    """
    section, train, masked = job.recipe.guards, job.train, None
    if not isinstance(job.task, TokenTask):
        return Learnt(train)
    with adapt.switched_off(module):
        train = answered(train, module, job.task.tokenizer)
        if section.mask_improbable is not None:
            found = tasks.surprise(job.task, module, train)
            masked = _share(found, section.mask_improbable)
            train = found.masked(section.mask_improbable)
        if section.kl is not None:
            train = tasks.taught(job.task, module, train, section.kl)
    return Learnt(train, masked)


def pull(job: Job, model: Model, module: nn.Module) -> training.Pull | None:
    """What draws weights back to where they are now, if the recipe wants it.

    Args:
        job: The job.
        model: The base, of which `module` was made.
        module: The network, adapted and not yet moved.
    """
    strength = job.recipe.guards.l2_sp
    return None if strength is None else training.Pull(module, strength, new=model.new)


def _share(found: tasks.Surprise, perplexity: float) -> float:
    """The share of the tokens that is left out."""
    share = found.share(perplexity)
    if share > MOST_MASKED:
        raise RecipeError(
            f"{share:.0%} of the learnt tokens have a perplexity above {perplexity:g} under the base, and would not be "
            f"learnt; at most {MOST_MASKED:.0%} may be left out",
            where="guards.mask_improbable",
            hint=f"set it to {math.ceil(100 * found.perplexity(MOST_MASKED)) / 100:.2f} or more, or leave it out",
        )
    return share
