"""An optimizer step taken inside the backward pass, one parameter at a time.

The gradients of the whole network never exist together: each is used as soon as it is whole, and freed.

Source: Lv et al. 2024, arXiv:2306.09782.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from metier.core import DivergedError, RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

UNTOUCHED = "training, before the optimizer step; the weights are unchanged"
"""Where a step is refused that has moved nothing."""


def step_in_backward(summed: Tensor, optimizer: Optimizer, weight: float) -> float:
    """Run the last backward pass of a step, and take the step on the way.

    Gradients of earlier passes are there already, and each parameter moves once the last pass has added to its own.

    Args:
        summed: The loss of the last pass, as a sum.
        optimizer: Moves parameters that have a gradient; one call a parameter.
        weight: By what the gradients are divided: everything that the whole step scored.

    Returns:
        Norm of the mean gradient.

    Raises:
        DivergedError: If a gradient is not finite. Parameters above it have moved.
        RecipeError: If memory runs out when parameters have moved, so that the step cannot be taken anew.
    """
    early = _Early(optimizer, weight)
    hooks = [parameter.register_post_accumulate_grad_hook(early.move) for parameter in early.groups]
    try:
        summed.backward()  # type: ignore[no-untyped-call]
        # What earlier passes reached and the last one did not, such as an expert that no token chose.
        for parameter in early.groups:
            if parameter.grad is not None:
                early.move(parameter)
    except (MemoryError, RuntimeError) as error:
        if early.squares and is_memory(error):
            raise _too_late() from error
        raise
    finally:
        for hook in hooks:
            hook.remove()
    return math.sqrt(sum(early.squares))


def is_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out; on a CPU, torch says so in words alone."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class _Early:
    """Where a step that is taken on the way stands."""

    def __init__(self, optimizer: Optimizer, weight: float) -> None:
        self._optimizer, self._weight = optimizer, weight
        self.groups: dict[nn.Parameter, dict[str, Any]] = {
            parameter: group for group in optimizer.param_groups for parameter in group["params"]
        }
        self.squares: list[float] = []

    @torch.no_grad()
    def move(self, parameter: Tensor) -> None:
        """Move one parameter by its gradient, and free that."""
        gradient = parameter.grad
        if gradient is None:
            return
        norm = float(gradient.norm()) / self._weight
        if not norm < float("inf"):
            raise DivergedError(
                f"a gradient of norm {norm:g}",
                where="training, inside the backward pass; parameters above it have moved, the last checkpoint stays",
                hint="lower train.learning_rate to a third, or look for broken rows with `metier check`",
            )
        # The same operation as after the backward pass, for the same bits in every format.
        torch._foreach_mul_([gradient], 1.0 / self._weight)
        # From here on the step cannot be taken anew, even if what follows fails.
        self.squares.append(norm**2)
        whole = self._optimizer.param_groups
        # The optimizer sees this parameter alone, with its own settings as they are now.
        self._optimizer.param_groups = [{**self.groups[parameter], "params": [parameter]}]  # type: ignore[index]
        try:
            self._optimizer.step()
        finally:
            self._optimizer.param_groups = whole
        parameter.grad = None


def _too_late() -> RecipeError:
    return RecipeError(
        "memory ran out inside a step whose parameters had begun to move, so it cannot be taken anew in smaller parts",
        where="train.micro_batch_tokens",
        hint="halve it, and resume from the last checkpoint; or set train.optimizer.during_backward to false",
    )
