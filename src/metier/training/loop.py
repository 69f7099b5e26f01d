"""The training loop: the only place where weights move.

A step is the exact gradient of the mean loss over the whole batch, however the batch is cut to fit in memory: losses
arrive as sums, and the gradient is divided once, by everything that was scored. The loop knows no model family and
no task; it never branches on a name.
"""

from __future__ import annotations

import gc
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import get_total_norm

from metier.core import DataError, DivergedError, RecipeError, StepRecord
from metier.core.log import warn
from metier.tasks import to_device
from metier.training.ahead import Ahead
from metier.training.early import UNTOUCHED, is_memory, step_in_backward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from metier.core import Batch
    from metier.recipe import TrainSection
    from metier.tasks import Task
    from metier.training.batches import Step
    from metier.training.precision import Precision
    from metier.training.watch import Watch


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
    watch: Watch | None = None,
    begin: Callable[[Step], None] | None = None,
) -> Iterator[StepRecord]:
    """Train until the steps end, yielding a record after each.

    The caller owns what happens between steps -- logging, validation, checkpoints, stopping -- and does it in its
    own `for record in fit(...)`. The steps are asked for one ahead, so that a device need not wait for its next batch;
    `begin` is told of each when it is its turn.

    Raises:
        DivergedError: If loss or gradient are not finite, or the watch sees the weights ruined.
        RecipeError: If not even one example at a time fits in memory.
    """
    most_tokens = section.token_budget
    ahead = Ahead(steps, examples, task)
    while (turn := ahead.take(most_tokens)) is not None:
        began = time.perf_counter()
        if begin is not None:
            begin(turn.step)
        module.train()
        rate = float(optimizer.param_groups[0]["lr"])
        while True:
            try:
                loss, grad_norm, weight = train_step(
                    module,
                    task,
                    turn.batches,
                    optimizer,
                    precision=precision,
                    max_grad_norm=section.max_grad_norm,
                    during_backward=section.optimizer.during_backward,
                    check=None if watch is None else partial(watch.check, rows=turn.rows),
                    meanwhile=partial(ahead.prepare, most_tokens),
                )
            except (MemoryError, RuntimeError) as error:
                read = [task.read([turn.rows[i] for i in cut]) for cut in turn.cuts]
                most_tokens = less(error, read, len(turn.rows))
                turn = ahead.again(turn, most_tokens)
            else:
                break
        schedule.step()
        yield StepRecord(
            step=turn.step.number,
            epoch=turn.step.epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=rate,
            weight=weight,
            tokens=sum(map(task.size, turn.rows)),
            seconds=time.perf_counter() - began,
            most_tokens=most_tokens,
        )


def less(error: Exception, read: Sequence[int], rows: int) -> int:
    """Half the tokens of the largest cut, for a step that did not fit in memory and is taken anew with that.

    The gradient does not depend on the cut, and a step that fails has moved nothing.

    Raises:
        Exception: The error itself, where it is none of memory.
        RecipeError: If every cut was one row already.
    """
    if not is_memory(error):
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


def train_step(
    module: nn.Module,
    task: Task[Any],
    micro_batches: Iterable[Batch],
    optimizer: Optimizer,
    *,
    precision: Precision,
    max_grad_norm: float | None,
    during_backward: bool = False,
    check: Callable[[float], None] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[float, float, float]:
    """Take one optimizer step on one batch, given as micro-batches.

    Args:
        module: The network.
        task: What is learnt.
        micro_batches: The parts of the batch.
        optimizer: Moves what has a gradient.
        precision: Number format and device.
        max_grad_norm: Longer gradients are scaled down to this norm; None never does.
        during_backward: Whether each parameter moves inside the last backward pass, as soon as its gradient is whole;
            there is no clipping then.
        check: Sees the finite mean loss before anything moves, and may raise.
        meanwhile: Called when all of the gradient is on its way; a device is still at work then.

    Returns:
        Mean loss per scored element, norm of the mean gradient before clipping, scored elements.

    Raises:
        DivergedError: If loss or gradient is not finite; the weights are then left untouched, except that a gradient
            found inside the backward pass leaves those that have moved.
        DataError: If nothing in the batch is scored.
        RecipeError: If memory runs out inside a step that is half taken.
    """
    optimizer.zero_grad(set_to_none=True)
    totals: list[Tensor] = []
    weights: list[Tensor] = []
    for batch, is_last in _with_last(micro_batches):
        with precision.arithmetic():
            loss = task.loss(module, to_device(batch, precision.device))
        summed = loss.total_B.sum()
        totals.append(summed.detach())
        weights.append(loss.weight_B.sum())
        if during_backward and is_last:
            total, weight = _sum(totals), _sum(weights)
            mean = _mean(total, weight, task)
            _check_finite(mean, 0.0, weight, task)
            if check is not None:
                check(mean)
            return mean, step_in_backward(summed, optimizer, weight), weight
        summed.backward()  # type: ignore[no-untyped-call]
    if meanwhile is not None:
        meanwhile()
    # To read a number is to wait for the device: once, and when there is nothing else to do.
    total, weight = _sum(totals), _sum(weights)
    mean, grad_norm = checked(optimizer, total, weight, task)
    if check is not None:
        check(mean)
    move(optimizer, weight, grad_norm, max_grad_norm)
    return mean, grad_norm, weight


def checked(optimizer: Optimizer, total: float, weight: float, task: Task[Any]) -> tuple[float, float]:
    """Mean loss per scored element and norm of the mean gradient, both numbers; the gradients are still sums.

    Raises:
        DivergedError: If loss or gradient is not finite.
        DataError: If nothing is scored.
    """
    mean = _mean(total, weight, task)
    grad_norm = float(get_total_norm(_gradients(optimizer))) / weight
    _check_finite(mean, grad_norm, weight, task)
    return mean, grad_norm


def move(optimizer: Optimizer, weight: float, grad_norm: float, max_grad_norm: float | None) -> None:
    """Take the step whose gradients are there as sums over `weight` scored elements."""
    scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (grad_norm + 1e-6))
    # Mean and clipping in one pass over memory: for a small model on a CPU, passes are what a step costs.
    torch._foreach_mul_(_gradients(optimizer), scale / weight)
    optimizer.step()


def _sum(found: list[Tensor]) -> float:
    return math.fsum(torch.stack(found).tolist()) if found else 0.0


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _with_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each batch, and whether it is the last one."""
    waiting: Batch | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting, False
        waiting = batch
    if waiting is not None:
        yield waiting, True


def _mean(total: float, weight: float, task: Task[Any]) -> float:
    """Loss per scored element.

    Raises:
        DataError: If nothing is scored.
    """
    if not weight:
        raise DataError(
            f"no {task.unit} of these rows is learnt, so the step has no gradient",
            where=UNTOUCHED,
            hint="look for rows without targets with `metier check`, or raise train.batch_size",
        )
    return total / weight


def _check_finite(mean: float, grad_norm: float, weight: float, task: Task[Any]) -> None:
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise DivergedError(
            f"loss {mean:g}, gradient norm {grad_norm:g} over {weight:g} {task.unit}s",
            where=UNTOUCHED,
            hint="lower train.learning_rate to a third, or look for broken rows with `metier check`",
        )
