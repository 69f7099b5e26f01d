"""Several runs on one base in memory: all in one pass where that is faster, else one after the other.

Either way each arm ends as if it had been alone, and the base keeps every bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from metier import adapt
from metier.core import DivergedError, RecipeError
from metier.core.log import note
from metier.core.rng import derive, seed_everything
from metier.models.lean import Store, drops, trunk_depth
from metier.recipe import LoRAMethod
from metier.tasks import mean_loss, score, to_device, why_apart
from metier.training import batches
from metier.training.compiling import compiled
from metier.training.course import Course, Outcome, Places, run
from metier.training.passes import Passes, Runner, train
from metier.training.precision import Precision
from metier.training.recomputing import recomputing

if TYPE_CHECKING:
    from torch import nn

    from metier.adapt import Adapted
    from metier.models import Model
    from metier.recipe import TrainSection
    from metier.recipe.method import MethodSection
    from metier.tasks import Task
    from metier.training.checkpoint import Origin


ROOM = 1e-2
"""Largest relative difference of a row's loss: above what the order of sums does to it in bf16. Judgement."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of several runs on a base.

    Attributes:
        name: For messages.
        method: Which parameters move.
        section: The recipe's settings, seed and token budget among them. Activations are computed again where
            `activation_checkpointing` is "on": nobody plans here.
        learning_rate: Peak rate, resolved.
        task: What is learnt.
        examples: Encoded training rows; arms that share the object share the work done on it.
        validation: Encoded rows that choose the best weights.
        places: Where this arm writes, and from where it goes on; no two arms share one.
        origin: What it is made of; to go on, a checkpoint must be of the same.
    """

    name: str
    method: MethodSection
    section: TrainSection
    learning_rate: float
    task: Task[Any]
    examples: Sequence[Any]
    validation: Sequence[Any]
    places: Places
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class Trained:
    """An arm that has ended.

    Attributes:
        arm: As it was given.
        adapted: Its network with the best weights; what stays in it is shared with the base.
        outcome: How it ended; where it diverged, why, and the weights are then of no use.
    """

    arm: Arm
    adapted: Adapted
    outcome: Outcome | DivergedError


def abreast(
    model: Model, arms: Sequence[Arm], *, precision: Precision, one_pass: bool | None = None
) -> Iterator[Trained]:
    """Train every arm on one base, and hand each over as it ends; each begins where an earlier call was interrupted.

    One pass takes LoRA without dropout on networks that read packs. The frozen forward and backward then serve all
    arms, whose rows stand one after the other, up to the smallest token budget among them: a budget that holds one
    arm's step alone joins nothing. That pays where one arm's step does not fill the device. On a CPU small steps gain
    a tenth (bench/results/abreast.md), and arms run one after the other: any method, any network. They share what
    stands below everything that moves, which is computed once for each row by itself, so that it has the same bits
    whoever comes first.

    Args:
        model: The base; it is moved to its device, and else left as it is. A new head begins alike in every arm.
        arms: What to train.
        precision: Number format and device of all arms.
        one_pass: Whether all arms are trained in one pass; None does so on CUDA where they can be.

    Returns:
        Each arm once, in the order given, as it ends. One after the other, the next one begins when it is asked for, so
        that a network that is let go leaves its memory to the next.

    Raises:
        RecipeError: If one pass is asked for and is impossible, a method does not fit the base, or two arms share
            places.
        InterruptedRunError: After SIGINT or SIGTERM, once everything is saved.
        StorageError: If the disk is full.
    """
    folders = [arm.places.checkpoints for arm in arms]
    if len(set(folders)) < len(folders):
        raise RecipeError(
            f"two of the arms {', '.join(arm.name for arm in arms)} would write to one folder",
            where=", ".join(sorted({str(folder) for folder in folders if folders.count(folder) > 1})),
            hint="give each arm places of its own",
        )
    precision.place(model.module)
    base = _Base(model, precision, {id(arm.task): arm.task.suited(model.module) for arm in arms})
    wanted = precision.device.type == "cuda" if one_pass is None else one_pass
    why_not = _why_not(base, arms) if wanted else ""
    if one_pass and why_not:
        raise RecipeError(
            f"these arms cannot be trained in one pass: {why_not}",
            where=", ".join(arm.name for arm in arms),
            hint="leave one_pass out: they then run one after the other on the same base",
        )
    if why_not:
        note(f"arms are trained one after the other: {why_not}")
    return _in_one_pass(base, arms) if wanted and not why_not else (_alone(base, arm) for arm in arms)


def _why_not(base: _Base, arms: Sequence[Arm]) -> str:
    """Why the arms cannot be trained in one pass; empty where they can."""
    if len(arms) < 2:
        return "one pass is for two arms and more"
    for arm in arms:
        if not isinstance(arm.method, LoRAMethod):
            return f"{arm.name} moves the base's own weights"
        if arm.section.compile or arm.section.optimizer.during_backward:
            return f"{arm.name} asks for train.compile or train.optimizer.during_backward"
    started = [base.start(arm) for arm in arms]
    for arm, (adapted, _) in zip(arms, started, strict=True):
        if drops(adapted.module):
            return f"something is dropped in training of {arm.name}, and chances would fall otherwise than alone"
    modules, suited = [adapted.module for adapted, _ in started], [task for _, task in started]
    return why_apart(suited) or adapt.why_apart(modules) or _tried(base, arms, modules, suited)


@torch.no_grad()
def _tried(base: _Base, arms: Sequence[Arm], modules: Sequence[nn.Module], suited: Sequence[Task[Any]]) -> str:
    """Why one row of each arm has another loss in one pass than alone; empty where it has the same."""
    parts = [(number, task, [arm.examples[0]]) for number, (arm, task) in enumerate(zip(arms, suited, strict=True))]
    alone = [float(score(task, module, rows).total_B) for module, (_, task, rows) in zip(modules, parts, strict=True)]
    with adapt.in_one_pass(base.model.module, modules) as (network, lanes):
        try:
            # As `score` does it: without the rounding of mixed precision.
            with Passes(network, lanes, Precision("fp32", base.precision.device), 0).read(parts) as (loss, _):
                together = loss.total_B.tolist()
        except NotImplementedError as error:
            return str(error)
    fits = all(map(partial(math.isclose, rel_tol=ROOM), together, alone))
    return "" if fits else "the network answers otherwise in one pass"


@dataclass(frozen=True)
class _Base:
    """What arms have in common.

    Attributes:
        model: The base, on its device.
        precision: Number format and device.
        suited: Each task suited to the base, by the identity of the one that was given.
        stores: States below everything that moves, by how many blocks that is.
        kept: Rows whose states are kept, by the identities of the store and of the examples.
    """

    model: Model
    precision: Precision
    suited: dict[int, Task[Any]]
    stores: dict[int, Store] = field(default_factory=dict)
    kept: dict[tuple[int, int], set[int]] = field(default_factory=dict)

    def start(self, arm: Arm) -> tuple[Adapted, Task[Any]]:
        """The arm's network before its first step, and its task suited to that."""
        model = self.model
        seed_everything(derive(arm.section.seed, "adapt"))
        adapted = adapt.beside(
            model.module,
            arm.method,
            head=model.head,
            base_name=model.lineage.reference,
            new=(*model.new, *model.whole),
        )
        self.precision.follow(adapted.module)
        return adapted, self.suited[id(arm.task)].suited(adapted.module)

    def store(self, module: nn.Module) -> Store:
        """Where the states are kept that this network does not move."""
        return self.stores.setdefault(trunk_depth(module), Store())

    @torch.no_grad()
    def keep_states(
        self, store: Store, module: nn.Module, task: Task[Any], examples: Sequence[Any], rows: set[int]
    ) -> None:
        """Keep the states of rows, each read by itself, so that they depend on nothing but the row."""
        kept = self.kept.setdefault((id(store), id(examples)), set())
        for row in sorted(rows - kept):
            with self.precision.arithmetic():
                task.loss(module, to_device(task.collate([examples[row]]), self.precision.device))
        kept |= rows


# ------------------------------------------------------------------------------------------------ one after the other


def _alone(base: _Base, arm: Arm) -> Trained:
    """Train one arm by itself."""
    adapted, task = base.start(arm)
    module, section = adapted.module, arm.section
    engine: AbstractContextManager[Any] = (
        compiled(module) if section.compile else adapt.lean(module, base.store(module))
    )
    outcome: Outcome | DivergedError
    with engine as store, recomputing(module, wanted=section.activation_checkpointing == "on"):
        if isinstance(store, Store):
            total = section.total_steps(len(arm.examples))
            read = {row for step in batches.steps(len(arm.examples), section, last=total) for row in step.rows}
            base.keep_states(store, module, task, arm.examples, read)
            base.keep_states(store, module, task, arm.validation, set(range(len(arm.validation))))
        try:
            outcome = run(
                module,
                task,
                arm.examples,
                section,
                learning_rate=arm.learning_rate,
                adapters=isinstance(arm.method, LoRAMethod),
                precision=base.precision,
                validate=partial(mean_loss, task, module, arm.validation),
                places=arm.places,
                origin=arm.origin,
            )
        except DivergedError as error:
            outcome = error.with_traceback(None)  # its frames would keep the optimizer
    return Trained(arm, adapted, outcome)


# ------------------------------------------------------------------------------------------------ in one pass


def _in_one_pass(base: _Base, arms: Sequence[Arm]) -> Iterator[Trained]:
    started = [base.start(arm) for arm in arms]
    modules = [adapted.module for adapted, _ in started]
    with ExitStack() as stack:
        lowest = base.store(min(modules, key=trunk_depth))
        network, lanes = stack.enter_context(adapt.in_one_pass(base.model.module, modules, lowest))
        wanted = any(arm.section.activation_checkpointing == "on" for arm in arms)
        stack.enter_context(recomputing(network, wanted=wanted))
        for module in modules:
            stack.enter_context(adapt.lean(module, base.store(module)))
        courses = [_course(arm, module, task) for arm, module, (_, task) in zip(arms, modules, started, strict=True)]
        for course in courses:
            stack.enter_context(course.closing())
        runners = [
            Runner(number, course, task, arm.examples, arm.section, score=partial(mean_loss, task, adapted.module))
            for number, (arm, course, (adapted, task)) in enumerate(zip(arms, courses, started, strict=True))
        ]
        budget = min(course.cut().token_budget for course in courses)
        train(Passes(network, lanes, base.precision, budget), runners)
        outcomes = [runner.end() for runner in runners]
    for arm, (adapted, _), outcome in zip(arms, started, outcomes, strict=True):
        yield Trained(arm, adapted, outcome)


def _course(arm: Arm, module: nn.Module, task: Task[Any]) -> Course:
    return Course(
        module,
        arm.section,
        rows=len(arm.examples),
        learning_rate=arm.learning_rate,
        adapters=True,
        validate=partial(mean_loss, task, module, arm.validation),
        places=arm.places,
        origin=arm.origin,
    )
