"""What an experiment would do and take, before it begins: trainings, time and memory of each arm, what is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metier import planning
from metier.core import log
from metier.core.evidence import Value
from metier.experiment import budget
from metier.experiment.budget import Prices, Size
from metier.experiment.trials import PATH
from metier.report import Voice, plain
from metier.run.foresee import plan_job
from metier.run.job import choose_device
from metier.run.strength import SHARES

if TYPE_CHECKING:
    from metier.experiment.arms import Arm
    from metier.planning import MethodPlan, Plan
    from metier.run.job import Job

PACK_TOKENS = {"off": (0, 0), "neutral": (20_600, 1_900), "neutral-en": (8_600, 700), "neutral-zh": (11_900, 1_300)}
"""Tokens of the shipped retention pack, and of the texts by which a strength is chosen, as SmolLM2 counts them; a pack
of the user's is taken for the whole of ours."""
ANSWERING = 3.0
"""What a generated token costs, in tokens that are read: each is a pass of its own over the weights. Judgement."""


class ArmOutline(Value):
    """What the plan says of one arm."""

    name: str
    """As given."""
    title: str
    """What a reader calls it."""
    parameters_moved: int | None
    """Numbers that training changes; None where the plan does not know the method on this network."""
    seconds: float | None
    """Wall time of one whole training, validation included; None where no formula knows the network."""
    peak_memory_bytes: int | None
    """Highest memory while training."""
    fits: bool | None
    """Whether that stays within the free memory."""


class Outline(Value):
    """The plan of an experiment."""

    arms: tuple[ArmOutline, ...]
    """Every arm that is asked for."""
    steps: int
    """Optimizer steps of a whole training."""
    trainings: int
    """Trainings in all, long and short; more where a search has to go beyond the end of its grid."""
    trials: int
    """Trials of the search for each arm, a third as long as a whole training."""
    seeds: int
    """Whole trainings of each arm."""
    shares: tuple[float, ...]
    """Parts of the training rows below all of them."""
    rows: int
    """Test rows that are measured."""
    seconds: float | None
    """Wall time of it all; None where no formula knows the network."""
    budget_seconds: float | None
    """The budget; None where none was given."""
    left_out: tuple[str, ...]
    """What is left out to keep to it."""


@dataclass(frozen=True)
class Foreseen:
    """The plans behind an outline.

    Attributes:
        plans: The plan of each arm by name.
        methods: What the plan says of each arm by name; None where it does not know the method.
        prices: What one thing costs, as foretold.
        steps: Optimizer steps of a whole training.
    """

    plans: Mapping[str, Plan]
    methods: Mapping[str, MethodPlan | None]
    prices: Prices
    steps: int


def wanted(job: Job, arms: Sequence[Arm]) -> Size:
    """The experiment that the recipe asks for."""
    section = job.recipe.compare
    return Size(
        arms=tuple(arm.name for arm in arms),
        trials=section.trials,
        seeds=section.seeds,
        shares=tuple(share / 100 for share in section.data_curve if share < 100),
        rows=len(job.test),
    )


def foresee(job: Job, arms: Sequence[Arm]) -> Foreseen:
    """The plan of every arm, and the prices that follow from it.

    Raises:
        RecipeError: If a LoRA target names no layer.
    """
    # Once for all: arms are set beside each other on one machine, whose speed drifts.
    speed = planning.measure_flops_per_second(str(choose_device(job.recipe)))
    plans = {
        arm.name: plan_job(
            arm.job(job),
            probe=False,
            flops_per_second=speed,
        )
        for arm in arms
    }
    methods = {arm.name: plans[arm.name].method(arm.method.kind) for arm in arms}
    one = plans[arms[0].name]
    train = {
        name: method.seconds * _with_validation(job, one.steps)
        for name, method in methods.items()
        if method is not None and method.seconds is not None
    }
    return Foreseen(plans, methods, _prices(job, train, one), one.steps)


def _with_validation(job: Job, steps: int) -> float:
    """Training with its validations over training alone; a row that is only read costs a third of one that teaches."""
    taught = steps * job.recipe.train.batch_size
    return 1 + job.recipe.train.evaluations * len(job.validation) / taught / 3


def _prices(job: Job, train: Mapping[str, float], plan: Plan) -> Prices:
    if not train:
        return Prices(train)
    # Reading a token is a third of what the dearest method pays for it.
    token = max(train.values()) / max(plan.tokens, 1) / 3
    evaluate = job.recipe.evaluate
    answers = ANSWERING * evaluate.max_new_tokens if evaluate.generate and job.head in {"causal", "seq2seq"} else 0.0
    mean = plan.tokens / max(plan.steps * job.recipe.train.batch_size, 1)
    general, choosing = PACK_TOKENS.get(evaluate.retention, PACK_TOKENS["neutral"])
    has_floor = job.recipe.train.retain is not None
    shares = SHARES if has_floor else PATH
    tried = token * len(shares) * (mean * len(job.validation) + choosing)
    strengths = tried if (has_floor or job.recipe.compare.strengths) and job.keeps else 0.0
    return Prices(train, row=token * (mean + answers), fixed=token * general, strengths=strengths, has_floor=has_floor)


def outline(foreseen: Foreseen, arms: Sequence[Arm], asked: Size, size: Size, allowed: float | None) -> Outline:
    """The plan as one value."""
    known = all(arm.name in foreseen.prices.train for arm in arms)
    return Outline(
        arms=tuple(_arm(arm, foreseen) for arm in arms),
        steps=foreseen.steps,
        trainings=size.trainings,
        trials=size.trials,
        seeds=size.seeds,
        shares=size.shares,
        rows=size.rows,
        seconds=budget.seconds_left(size, foreseen.prices, budget.Done()) if known else None,
        budget_seconds=allowed,
        left_out=budget.left_out(asked, size),
    )


def _arm(arm: Arm, foreseen: Foreseen) -> ArmOutline:
    method = foreseen.methods[arm.name]
    return ArmOutline(
        name=arm.name,
        title=arm.title,
        parameters_moved=method.parameters_moved if method else None,
        seconds=foreseen.prices.train.get(arm.name),
        peak_memory_bytes=method.peak_bytes if method else None,
        fits=method.fits if method else None,
    )


def say(found: Outline) -> None:
    """Tell the plan before the work begins."""
    voice = Voice("en")
    time = "an unknown time" if found.seconds is None else f"about {voice.seconds(found.seconds)}"
    log.note(
        f"{found.trainings} trainings in {time}: for each of {len(found.arms)} methods {found.trials} trials of the "
        f"learning rate at a third of {found.steps:,} steps, then {found.seeds} seeds"
        + (", the first with two rates" if found.trials > budget.CHECKED else "")
        + (f", and on {', '.join(f'{share:.0%}' for share in found.shares)} of the rows" if found.shares else ""),
        **found.model_dump(mode="json"),
    )
    for arm in found.arms:
        seconds = "time not known" if arm.seconds is None else f"{voice.seconds(arm.seconds)} a training"
        memory = "memory not known" if arm.peak_memory_bytes is None else f"{voice.size(arm.peak_memory_bytes)} at most"
        log.note(plain(f"  {arm.name}: {arm.title}; {seconds}, {memory}"))
        if arm.fits is False:
            log.warn(f"{arm.name} may not fit in the memory that is free: lower train.micro_batch_tokens")
    for text in found.left_out:
        log.warn(f"to keep to the budget: {text}")
