"""`metier plan`: what a checked job would take, by formula, and by a few real steps when asked."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from metier import adapt, planning, training
from metier.core import log
from metier.core.meter import Meter
from metier.recipe import LoRAMethod
from metier.run.job import choose_device, learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from metier.planning import Plan
    from metier.planning.probing import Sample
    from metier.run.job import Job


def plan_job(job: Job, *, probe: bool) -> Plan:
    """The plan of a job.

    Args:
        job: Checked, its rows encoded.
        probe: Load the model and take a few steps with the recipe's method, whose figures are then measured.

    Raises:
        MetierError: If the model cannot be loaded for the probe, or the method does not fit it.
    """
    recipe = job.recipe
    device = choose_device(recipe)
    plan = job.plan(flops_per_second=planning.measure_flops_per_second(str(device)))
    if not probe:
        return plan
    log.note(f"probing {recipe.method.kind} with a few real steps")
    small, large = min(plan.micro_batch_tokens // 2, 512), plan.micro_batch_tokens
    measured = planning.probe(_stepper(job, device), small=small, large=max(large, small + 1))
    return planning.confirm(plan, recipe.method.kind, measured)


def warn_if_too_large(job: Job) -> None:
    """Tell the user before the work starts when, by formula, memory will not do."""
    plan = job.plan(flops_per_second=None)
    method = plan.method(job.recipe.method.kind)
    if method is not None and method.fits is False and plan.machine.memory_bytes is not None:
        log.warn(
            f"this run may need {method.peak_bytes / 1e9:.1f} GB; {plan.machine.memory_bytes / 1e9:.1f} GB are free: "
            "lower train.micro_batch_tokens, or see `metier plan`"
        )


def _stepper(job: Job, device: Any) -> Callable[[int], Sample]:
    """Loads the model and gives a function that takes one real step of about so many tokens."""
    recipe = job.recipe
    precision = training.choose(recipe.train, device)
    model = job.load()
    adapted = adapt.adapt(model.module, recipe.method, head=job.head, new=(*model.new, *model.whole))
    precision.place(adapted.module)
    optimizer = training.build_optimizer(
        recipe.train.optimizer,
        adapted.module,
        learning_rate=learning_rate(job)[0],
        adapters=isinstance(recipe.method, LoRAMethod),
    )
    task = job.task.suited(adapted.module)
    sizes = job.sizes()
    longest_first = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)

    def step(tokens: int) -> Sample:
        rows = [job.train[i] for i in longest_first[: max(1, tokens // sizes[longest_first[0]])]]
        batch = task.collate(rows)
        meter = Meter()
        adapted.module.train()
        began = time.perf_counter()
        with meter.phase("probe"), adapt.lean(adapted.module):
            training.train_step(
                adapted.module,
                task,
                [batch],
                optimizer,
                precision=precision,
                max_grad_norm=recipe.train.max_grad_norm,
            )
        seconds = time.perf_counter() - began
        return planning.Sample(tokens=task.read(rows), peak_bytes=meter.phases[0].peak_memory_bytes, seconds=seconds)

    return step
