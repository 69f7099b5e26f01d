"""The training loop: the only place where weights move.

A step is the exact gradient of the mean loss over the whole batch, however the batch is cut to fit in memory: losses
arrive as sums, and the gradient is divided once, by everything that was scored. The loop knows no model family and
no task; it never branches on a name.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import get_total_norm

from metier.core import DivergedError, StepRecord
from metier.tasks import to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from metier.core import Batch
    from metier.tasks import Task
    from metier.training.batches import Step
    from metier.training.precision import Precision


def fit(
    module: nn.Module,
    task: Task[Any],
    examples: Sequence[Any],
    steps: Iterable[Step],
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    precision: Precision,
    max_grad_norm: float,
) -> Iterator[StepRecord]:
    """Train until the steps end, yielding a record after each.

    The caller owns what happens between steps -- logging, validation, checkpoints, stopping -- and does it in its
    own `for record in fit(...)`; there are no callbacks to register.

    Raises:
        DivergedError: If the gradient is not finite.
    """
    for step in steps:
        began = time.perf_counter()
        module.train()
        batches = (task.collate([examples[i] for i in indices]) for indices in step.micro_batches)
        rate = float(optimizer.param_groups[0]["lr"])
        loss, grad_norm, weight = train_step(
            module, task, batches, optimizer, precision=precision, max_grad_norm=max_grad_norm
        )
        schedule.step()
        yield StepRecord(
            step=step.number,
            epoch=step.epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            weight=weight,
            tokens=sum(task.size(examples[i]) for indices in step.micro_batches for i in indices),
            seconds=time.perf_counter() - began,
        )


def train_step(
    module: nn.Module,
    task: Task[Any],
    micro_batches: Iterable[Batch],
    optimizer: Optimizer,
    *,
    precision: Precision,
    max_grad_norm: float,
) -> tuple[float, float, float]:
    """Take one optimizer step on one batch, given as micro-batches.

    Returns:
        Mean loss per scored element, norm of the mean gradient before clipping, scored elements.

    Raises:
        DivergedError: If loss or gradient is not finite; the weights are then left untouched.
    """
    optimizer.zero_grad(set_to_none=True)
    total = weight = 0.0
    for batch in micro_batches:
        with precision.arithmetic():
            loss = task.loss(module, to_device(batch, precision.device))
        summed = loss.total_B.sum()
        summed.backward()  # type: ignore[no-untyped-call]
        total, weight = total + float(summed.detach()), weight + float(loss.weight_B.sum())
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = float(get_total_norm(gradients)) / weight
    mean = total / weight
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise DivergedError(
            f"loss {mean:g}, gradient norm {grad_norm:g} over {weight:g} {task.unit}s",
            where="training, before the optimizer step; the weights are unchanged",
            hint="lower train.learning_rate to a third, or look for broken rows with `metier check`",
        )
    # Mean and clipping in one pass over memory: for a small model on a CPU, passes are what a step costs.
    torch._foreach_mul_(gradients, min(1.0, max_grad_norm / (grad_norm + 1e-6)) / weight)
    optimizer.step()
    return mean, grad_norm, weight
