"""The training loop: the only place where weights move.

A step is the exact gradient of the mean loss over the whole batch, however the batch is cut to fit in memory: losses
arrive as sums, and the gradient is divided once, by everything that was scored. The loop knows no model family and
no task; it never branches on a name.
"""

from __future__ import annotations

import gc
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import get_total_norm

from metier.core import DataError, DivergedError, RecipeError, StepRecord
from metier.core.log import warn
from metier.tasks import to_device

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from metier.core import Batch
    from metier.recipe import TrainSection
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
    section: TrainSection,
) -> Iterator[StepRecord]:
    """Train until the steps end, yielding a record after each.

    The caller owns what happens between steps -- logging, validation, checkpoints, stopping -- and does it in its
    own `for record in fit(...)`; there are no callbacks to register.

    Raises:
        DivergedError: If the gradient is not finite.
        RecipeError: If not even one example at a time fits in memory.
    """
    most_tokens = section.micro_batch_tokens
    for step in steps:
        began = time.perf_counter()
        module.train()
        rows = [examples[i] for i in step.rows]
        rate = float(optimizer.param_groups[0]["lr"])
        while True:
            cuts = task.cut(rows, most_tokens)
            batches = (task.collate([rows[i] for i in cut]) for cut in cuts)
            try:
                loss, grad_norm, weight = train_step(
                    module, task, batches, optimizer, precision=precision, max_grad_norm=section.max_grad_norm
                )
            except (MemoryError, RuntimeError) as error:
                most_tokens = _less(error, [task.read([rows[i] for i in cut]) for cut in cuts], len(rows))
            else:
                break
        schedule.step()
        yield StepRecord(
            step=step.number,
            epoch=step.epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            weight=weight,
            tokens=sum(task.size(row) for row in rows),
            seconds=time.perf_counter() - began,
        )


def _less(error: Exception, read: Sequence[int], rows: int) -> int:
    """Half the tokens of the largest cut, for a step that did not fit in memory and is taken anew with that.

    The gradient does not depend on the cut, and a step that fails has moved nothing.

    Raises:
        Exception: The error itself, where it is none of memory.
        RecipeError: If every cut was one row already.
    """
    if not _is_memory(error):
        raise error
    if len(read) == rows:
        raise RecipeError(
            f"a row of {max(read):,} tokens does not fit in memory, even alone",
            where="train.micro_batch_tokens",
            hint="shorten rows with task.max_tokens, take method=lora, or a smaller model",
        ) from error
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    warn(f"out of memory at {max(read):,} tokens: cut to {max(read) // 2:,} from here on, with the same gradient")
    return max(read) // 2


def _is_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


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
        DataError: If nothing in the batch is scored.
    """
    optimizer.zero_grad(set_to_none=True)
    total = weight = 0.0
    for batch in micro_batches:
        with precision.arithmetic():
            loss = task.loss(module, to_device(batch, precision.device))
        summed = loss.total_B.sum()
        summed.backward()  # type: ignore[no-untyped-call]
        total, weight = total + float(summed.detach()), weight + float(loss.weight_B.sum())
    if not weight:
        raise DataError(
            f"no {task.unit} of these rows is learnt, so the step has no gradient",
            where="training, before the optimizer step; the weights are unchanged",
            hint="look for rows without targets with `metier check`, or raise train.batch_size",
        )
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
